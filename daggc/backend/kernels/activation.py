"""Backward kernels of activations that need more than one ATen call."""

from __future__ import annotations

import torch


def log_sigmoid_backward(ct: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``ct * sigmoid(-x)`` by torch's kernel, whose buffer ``exp(-abs(x))`` is made anew (CUDA ignores it)."""
    return torch.ops.aten.log_sigmoid_backward(ct, x, torch.exp(-x.abs()))


def celu_backward(ct: torch.Tensor, x: torch.Tensor, alpha: float) -> torch.Tensor:
    """The gradient of celu by the kernel of elu; torch takes ``1 / alpha`` of alpha in f32, whatever x is."""
    inverse = 1.0 / torch.tensor(alpha, dtype=torch.float32).item()
    return torch.ops.aten.elu_backward(ct, alpha, 1.0, inverse, False, x)
