"""Pooling and its gradients; what torch has for two and three axes only is done for one with an axis of size 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_aten = torch.ops.aten


def _input_like(ct: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of which a kernel reads only type, shape and layout (that of the cotangent)."""
    layout = torch.contiguous_format
    if ct.dim() == 4 and not ct.is_contiguous() and ct.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    if ct.dim() == 5 and not ct.is_contiguous() and ct.is_contiguous(memory_format=torch.channels_last_3d):
        layout = torch.channels_last_3d
    return torch.empty(shape, dtype=ct.dtype, device=ct.device, memory_format=layout)


def _plane(numbers: Sequence[int], first: int) -> tuple[int, ...]:
    """Two numbers in place of one: those of an axis of size 1 come first."""
    return (first, *numbers) if len(numbers) == 1 else tuple(numbers)


def max_pool_backward(
    ct: Tensor,
    indices: Tensor,
    input_shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """Scatter the cotangent to where the maxima were."""
    if len(kernel) == 1:
        ct, indices = ct.unsqueeze(2), indices.unsqueeze(2)
    shape = (*input_shape[:2], *_plane(input_shape[2:], 1))
    geometry = (_plane(kernel, 1), _plane(stride, 1), _plane(padding, 0), _plane(dilation, 1), ceil_mode)
    backward = _aten.max_pool3d_with_indices_backward if len(kernel) == 3 else _aten.max_pool2d_with_indices_backward
    return backward(ct, _input_like(ct, shape), *geometry, indices).view(input_shape)


def avg_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Means of windows, for 1 to 3 spatial axes."""
    rest = (ceil_mode, count_include_pad, divisor_override)
    if len(kernel) == 3:
        return _aten.avg_pool3d(x, kernel, stride, padding, *rest)
    if len(kernel) == 2:
        return _aten.avg_pool2d(x, kernel, stride, padding, *rest)
    return _aten.avg_pool2d(x.unsqueeze(2), _plane(kernel, 1), _plane(stride, 1), _plane(padding, 0), *rest).squeeze(2)


def avg_pool_backward(
    ct: Tensor,
    input_shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Spread each window's cotangent over its cells."""
    if len(kernel) == 1:
        ct = ct.unsqueeze(2)
    shape = (*input_shape[:2], *_plane(input_shape[2:], 1))
    geometry = (_plane(kernel, 1), _plane(stride, 1), _plane(padding, 0))
    backward = _aten.avg_pool3d_backward if len(kernel) == 3 else _aten.avg_pool2d_backward
    rest = (ceil_mode, count_include_pad, divisor_override)
    return backward(ct, _input_like(ct, shape), *geometry, *rest).view(input_shape)


def adaptive_avg_pool(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """Means of windows that cover the input evenly."""
    if len(output_size) == 3:
        return _aten._adaptive_avg_pool3d(x, output_size)
    if len(output_size) == 2:
        return _aten._adaptive_avg_pool2d(x, output_size)
    return _aten._adaptive_avg_pool2d(x.unsqueeze(2), (1, *output_size)).squeeze(2)


def adaptive_avg_pool_backward(ct: Tensor, input_shape: Sequence[int]) -> Tensor:
    """Spread each window's cotangent over its cells."""
    if len(input_shape) == 3:
        ct = ct.unsqueeze(2)
    x = _input_like(ct, (*input_shape[:2], *_plane(input_shape[2:], 1)))
    backward = _aten._adaptive_avg_pool3d_backward if ct.dim() == 5 else _aten._adaptive_avg_pool2d_backward
    return backward(ct, x).view(input_shape)
