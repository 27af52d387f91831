"""Gradients of convolution by the kernels that autograd calls, one at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_backward = torch.ops.aten.convolution_backward.default


def _format(rank: int, channels_last: bool) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if rank == 4 else torch.channels_last_3d


def _placeholder(like: Tensor, shape: Sequence[int], memory_format: torch.memory_format) -> Tensor:
    """A tensor of which the kernel reads only type, shape and layout; its memory is never touched."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def conv_channels_last(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """``torch.convolution`` in channels_last layout, which its output then has."""
    layout = _format(x.dim(), True)
    x, weight = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
    return torch.convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


def conv_input_grad(
    ct: Tensor, weight: Tensor, input_shape: Sequence[int], channels_last: bool, *geometry: object
) -> Tensor:
    """The cotangent of a convolution's input, of shape ``input_shape``."""
    layout = _format(ct.dim(), channels_last)
    x = _placeholder(ct, input_shape, layout)
    weight = weight.contiguous(memory_format=layout)
    return _backward(ct, x, weight, [0], *geometry, [True, False, False])[0]


def conv_weight_grad(
    ct: Tensor, x: Tensor, weight_shape: Sequence[int], channels_last: bool, *geometry: object
) -> Tensor:
    """The cotangent of a convolution's weight, of shape ``weight_shape``."""
    layout = _format(ct.dim(), channels_last)
    weight = _placeholder(ct, weight_shape, layout)
    return _backward(ct, x.contiguous(memory_format=layout), weight, [0], *geometry, [False, True, False])[1]
