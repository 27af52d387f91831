"""Complex numbers where one ATen call does not do."""

from __future__ import annotations

import torch


def view_as_complex(x: torch.Tensor) -> torch.Tensor:
    """Pairs along the innermost axis as complex numbers: a view where memory allows one."""
    aligned = x.storage_offset() % 2 == 0 and all(
        stride % 2 == 0 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1
    )
    in_pairs = x.stride(-1) == 1 and aligned
    return torch.view_as_complex(x if in_pairs else x.clone(memory_format=torch.contiguous_format))
