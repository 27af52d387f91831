"""Backward kernels of losses."""

from __future__ import annotations

import torch
from torch import Tensor


def nll_loss_backward(
    ct: Tensor, target: Tensor, weight: Tensor | None, classes: int, reduction: int, ignore_index: int
) -> Tensor:
    """[N, classes] from the cotangent of a sum (``reduction`` 2) or of each row's loss (0).

    torch's kernel reads only the type of the log probabilities, which are not kept: one number stands for them.
    """
    stand_in = ct.new_zeros(()).expand(target.shape[0], classes)
    total = ct.new_zeros(())  # read for means only
    return torch.ops.aten.nll_loss_backward(ct, stand_in, target, weight, reduction, ignore_index, total)
