"""Norms by the kernels that eager calls, with f32 statistics for f16 and bf16.

torch's CPU kernels round the statistics of 16-bit inputs to 16 bits, unless the weights are f32. Those of layer
and group norm then give the same y, bit for bit, so their weights are cast; batch norm's do not, so its statistics
are rounded and then cast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


def _narrow_on_cpu(x: Tensor) -> bool:
    return x.dtype in _HALF and x.device.type == "cpu"


def _wide(param: Tensor | None, shape: Sequence[int], fill: float) -> Tensor:
    """An f32 parameter, which makes CPU kernels keep f32 statistics."""
    return torch.full(tuple(shape), fill) if param is None else param.float()


def _contiguous(param: Tensor | None) -> Tensor | None:
    """Kernels read parameters of group and batch norm, and statistics, as if they were contiguous."""
    return None if param is None else param.contiguous()


def _as(dtype: torch.dtype, *values: Tensor) -> tuple[Tensor, ...]:
    return tuple(value.to(dtype) for value in values)


def _stats_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in _HALF else x.dtype


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, normalized_shape: tuple[int, ...], eps: float
) -> tuple[Tensor, ...]:
    """y, mean, rstd."""
    if _narrow_on_cpu(x):
        weight = _wide(weight, normalized_shape, 1.0)
        bias = None if bias is None else bias.float()
    return torch.native_layer_norm(x, normalized_shape, weight, bias, eps)


def layer_norm_backward(
    ct: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    normalized_shape: tuple[int, ...],
    count: int,
) -> tuple[Tensor, ...]:
    """The first ``count`` of the cotangents of x, weight, bias."""
    mask = [True, count > 1, count > 2]
    own = weight
    if _narrow_on_cpu(x):
        own = _wide(weight, normalized_shape, 1.0)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    grads = _aten.native_layer_norm_backward(ct, x, normalized_shape, mean, rstd, own, own, mask)
    return grads[:1] if weight is None else (grads[0], *_as(weight.dtype, *grads[1:count]))


def _rms_composite(x: Tensor, weight: Tensor | None) -> bool:
    """Where torch composes RMS norm of simple ops instead of calling its fused kernel."""
    return x.device.type == "cpu" or (weight is not None and weight.dtype != x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, normalized_shape: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    """y, rstd."""
    return _aten._fused_rms_norm(x, normalized_shape, weight, eps)


def rms_norm_backward(
    ct: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, normalized_shape: tuple[int, ...], count: int
) -> tuple[Tensor, ...]:
    """The first ``count`` of the cotangents of x and weight."""
    if not _rms_composite(x, weight):
        return _aten._fused_rms_norm_backward(ct, x, normalized_shape, rstd, weight, [True, count > 1])[:count]
    dims = tuple(range(-len(normalized_shape), 0))
    wide, unit = ct.to(rstd.dtype), x.to(rstd.dtype) * rstd
    slope = wide if weight is None else wide * weight.to(rstd.dtype)
    x_ct = ((slope - unit * (slope * unit).mean(dims, keepdim=True)) * rstd).to(x.dtype)
    if weight is None:
        return (x_ct,)
    rows = math.prod(x.shape[: x.dim() - len(normalized_shape)])
    weight_ct = (wide * unit).reshape(rows, *normalized_shape).sum(0)
    return x_ct, weight_ct.to(weight.dtype)


def _dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """What group norm's kernels take: contiguous, or, on CPU, channels_last (if ``like`` is so)."""
    model = x if like is None else like
    if model.device.type == "cpu" and model.dim() == 4 and not model.is_contiguous():
        last = torch.channels_last
        return x.contiguous(memory_format=last) if model.is_contiguous(memory_format=last) else x.contiguous()
    return x.contiguous()


def group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> tuple[Tensor, ...]:
    """y, mean, rstd."""
    if _narrow_on_cpu(x):
        weight = _wide(weight, x.shape[1:2], 1.0)
        bias = _wide(bias, x.shape[1:2], 0.0)
    sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]))
    weight, bias = _contiguous(weight), _contiguous(bias)
    y, *statistics = torch.native_group_norm(_dense(x), weight, bias, *sizes, groups, eps)
    return y, *_as(_stats_dtype(x), *statistics)


def group_norm_backward(
    ct: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int, count: int
) -> tuple[Tensor, ...]:
    """The first ``count`` of the cotangents of x, weight, bias."""
    own = weight
    if _narrow_on_cpu(x):
        own = _wide(weight, x.shape[1:2], 1.0)
    elif x.dtype in _HALF and (weight is None or weight.dtype == x.dtype):
        mean, rstd = _as(x.dtype, mean, rstd)
    x = _dense(x)
    sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]))
    mask = [True, count > 1, count > 2]
    grads = _aten.native_group_norm_backward(
        _dense(ct, x), x, mean.contiguous(), rstd.contiguous(), _contiguous(own), *sizes, groups, mask
    )
    return grads[:1] if weight is None else (grads[0], *_as(weight.dtype, *grads[1:count]))


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """y, mean, rstd and, if there are running statistics, their new values."""
    if running_mean is None:
        y, *statistics = _aten._native_batch_norm_legit.no_stats(x, weight, bias, True, momentum, eps)
        return y, *_as(_stats_dtype(x), *statistics)
    y, mean, rstd, *running = _aten._native_batch_norm_legit_functional(
        x, weight, bias, running_mean, running_var, True, momentum, eps
    )
    return y, *_as(_stats_dtype(x), mean, rstd), *running


def batch_norm_backward(
    ct: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Cotangents of x and, if there is a weight, of weight and bias."""
    if weight is None:
        return _aten.native_batch_norm_backward(
            ct, x, None, None, None, mean, rstd, True, 0.0, [True, False, False]
        )[:1]  # fmt: skip
    if _narrow_on_cpu(x):
        mean, rstd = _as(weight.dtype, mean, rstd)
    mean, rstd, own = mean.contiguous(), rstd.contiguous(), _contiguous(weight)
    return _aten.native_batch_norm_backward(ct, x, own, None, None, mean, rstd, True, 0.0, [True, True, True])


def batch_norm_eval_backward(
    ct: Tensor, x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    """Cotangents of x and, if there is a weight, of weight and bias, with constant statistics."""
    mask = [True, weight is not None, weight is not None]
    own, running_mean, running_var = _contiguous(weight), running_mean.contiguous(), running_var.contiguous()
    grads = _aten.native_batch_norm_backward(ct, x, own, running_mean, running_var, None, None, False, eps, mask)
    return grads if weight is not None else grads[:1]
