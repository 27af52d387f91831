"""Connectionist temporal classification on torch tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    zero_infinity: bool,
) -> Tensor:
    """Losses [N] of log probabilities [T, N, C] and targets [N, S]."""
    operands = log_probs, targets.contiguous(), input_lengths, target_lengths
    return torch.ops.aten._ctc_loss(*operands, blank, zero_infinity)[0]


def ctc_loss_backward(
    ct: Tensor,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    zero_infinity: bool,
) -> Tensor:
    """The cotangent of the log probabilities; the forward's table is computed anew."""
    operands = log_probs, targets.contiguous(), input_lengths, target_lengths
    losses, table = torch.ops.aten._ctc_loss(*operands, blank, zero_infinity)
    return torch.ops.aten._ctc_loss_backward(ct.contiguous(), *operands, losses, table, blank, zero_infinity)
