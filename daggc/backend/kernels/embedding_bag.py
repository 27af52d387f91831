"""Embedding bags on torch tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def embedding_bag(
    weight: Tensor, index: Tensor, offsets: Tensor, factors: Tensor | None, *, mode: int, padding_idx: int
) -> Tensor | tuple[Tensor, Tensor]:
    """Sums (``mode`` 0) or means (1) of rows by bag [B, D], or (2) maxima and the rows that they are from."""
    out, _, _, which = torch.ops.aten._embedding_bag(
        weight.contiguous(), index.contiguous(), offsets.contiguous(), False, mode, False, factors, False, padding_idx
    )
    return (out, which) if mode == 2 else out
