"""What layer, RMS, group and batch norm have in common: ``(x - mean) * rstd`` over some axes, times weight, plus bias.

The backward ops take mean and rstd as inputs of their own and are differentiated as such; the norms' statistics
are differentiable outputs. Together that gives exact second derivatives without computing anything twice.
In RMS norm the mean is absent: None here.

f16 and bf16 are computed in f32, and have statistics in f32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ir.types import DTYPES, TensorType
from daggc.ops.build import add, broadcast, cast, full, mul, reshape, scale, sub, sum_dims
from daggc.ops.opdef import require


@dataclass(frozen=True, slots=True)
class Layout:
    """Over which axes a norm runs.

    Attributes:
        shape: of x.
        view: the shape as which x is looked at.
        dims: the axes of the view that are averaged over.
        stats: the shape of mean and rstd.
        params: the axes of x that weight and bias have.
    """

    shape: tuple[int, ...]
    view: tuple[int, ...]
    dims: tuple[int, ...]
    stats: tuple[int, ...]
    params: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """The view's shape after averaging, with axes of size 1 kept."""
        return tuple(1 if axis in self.dims else size for axis, size in enumerate(self.view))

    @property
    def count(self) -> int:
        """How many elements each mean is over."""
        return math.prod(self.view[axis] for axis in self.dims)

    @property
    def param_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.params)

    @property
    def param_view(self) -> tuple[int, ...]:
        """The shape in which a parameter broadcasts against x."""
        return tuple(size if axis in self.params else 1 for axis, size in enumerate(self.shape))

    @property
    def other_axes(self) -> tuple[int, ...]:
        """The axes of x that parameters lack: their cotangents are sums over these."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.params)


def wide_dtype(dtype: str) -> str:
    """The dtype of statistics: f32 for 16-bit floats."""
    return "f32" if DTYPES[dtype].itemsize == 2 else dtype


def stats_type(x: TensorType, layout: Layout) -> TensorType:
    return TensorType(wide_dtype(x.dtype), layout.stats)


def check_params(x: TensorType, params: Sequence[TensorType], layout: Layout) -> None:
    """Weight and bias have one dtype: that of x, or that of its statistics."""
    require(x.is_float, f"x of a float dtype is required, got {x}")
    for param in params:
        fits = param.dtype in (x.dtype, wide_dtype(x.dtype)) and param.dtype == params[0].dtype
        require(
            fits and param.shape == layout.param_shape,
            f"weight and bias {TensorType(x.dtype, layout.param_shape)} are required, got {param}",
        )


# --- NumPy --------------------------------------------------------------------------------------------


def widen(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(a.astype(np.float32) if a.dtype.itemsize == 2 else a for a in arrays)


def evaluate_norm(
    x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None, layout: Layout, eps: float, centered: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, mean (zeros where not centered) and rstd, of at least f32."""
    view = x.reshape(layout.view)
    averaged = centered and layout.count  # the mean of nothing is 0, as in torch's kernels, its variance NaN
    mean = view.mean(layout.dims, keepdims=True) if averaged else np.zeros(layout.kept, x.dtype)
    variance = np.square(view - mean).mean(layout.dims, keepdims=True)
    rstd = (1 / np.sqrt(variance + eps)).astype(x.dtype)
    y = ((view - mean) * rstd).reshape(x.shape)
    if weight is not None:
        y = y * weight.reshape(layout.param_view)
    if bias is not None:
        y = y + bias.reshape(layout.param_view)
    return y, mean.reshape(layout.stats), rstd.reshape(layout.stats)


def evaluate_norm_backward(
    ct: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray | None,
    rstd: np.ndarray,
    weight: np.ndarray | None,
    layout: Layout,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cotangents of x, weight and bias; the formula of :func:`norm_backward`."""
    rstd = rstd.reshape(layout.kept)
    view = x.reshape(layout.view)
    unit = (view if mean is None else view - mean.reshape(layout.kept)) * rstd
    slope = (ct if weight is None else ct * weight.reshape(layout.param_view)).reshape(layout.view)
    x_ct = slope - unit * (slope * unit).mean(layout.dims, keepdims=True)
    if mean is not None:
        x_ct = x_ct - slope.mean(layout.dims, keepdims=True)
    weight_ct = (ct * unit.reshape(x.shape)).sum(layout.other_axes)
    return (x_ct * rstd).reshape(x.shape), weight_ct, ct.sum(layout.other_axes)


# --- IR -----------------------------------------------------------------------------------------------


def _average(b: Builder, x: Value, layout: Layout) -> Value:
    """The mean over the layout's axes, broadcast back."""
    return broadcast(b, b.emit("mean", x, dims=layout.dims, keepdim=True), layout.view)


def spread(b: Builder, statistic: Value, layout: Layout) -> Value:
    """A mean or rstd for each element of the view."""
    return broadcast(b, reshape(b, statistic, layout.kept), layout.view)


def _param(b: Builder, param: Value, layout: Layout, dtype: str) -> Value:
    return broadcast(b, reshape(b, cast(b, param, dtype), layout.param_view), layout.shape)


def _viewed(b: Builder, x: Value, layout: Layout) -> Value:
    return reshape(b, cast(b, x, wide_dtype(x.type.dtype)), layout.view)


def norm(
    b: Builder, x: Value, weight: Value | None, bias: Value | None, layout: Layout, eps: float, centered: bool
) -> tuple[Value, Value | None, Value]:
    """y, mean (None where not centered) and rstd."""
    view = _viewed(b, x, layout)
    mean = None
    if centered:
        if layout.count:
            mean = b.emit("mean", view, dims=layout.dims, keepdim=True)
        else:
            mean = full(b, 0.0, layout.kept, view.type.dtype)
        view = sub(b, view, broadcast(b, mean, layout.view))
    variance = b.emit("mean", mul(b, view, view), dims=layout.dims, keepdim=True)
    rstd = b.emit("rsqrt", b.emit("add_scalar", variance, value=eps))
    y = reshape(b, mul(b, view, broadcast(b, rstd, layout.view)), layout.shape)
    if weight is not None:
        y = mul(b, y, _param(b, weight, layout, y.type.dtype))
    if bias is not None:
        y = add(b, y, _param(b, bias, layout, y.type.dtype))
    mean = None if mean is None else reshape(b, mean, layout.stats)
    return cast(b, y, x.type.dtype), mean, reshape(b, rstd, layout.stats)


def norm_backward(
    b: Builder,
    ct: Value,
    x: Value,
    mean: Value | None,
    rstd: Value,
    weight: Value | None,
    layout: Layout,
) -> tuple[Value, Value, Value]:
    """Cotangents of x, weight and bias.

    With ``g = ct * weight`` and ``u = (x - mean) * rstd``: ``x_ct = rstd * (g - E[g] - u * E[g * u])``; without
    a mean, the term ``E[g]`` is missing.
    """
    dtype = x.type.dtype
    wide = cast(b, ct, wide_dtype(dtype))
    centered = _viewed(b, x, layout)
    if mean is not None:
        centered = sub(b, centered, spread(b, mean, layout))
    scales = spread(b, rstd, layout)
    unit = mul(b, centered, scales)
    slope = wide if weight is None else mul(b, wide, _param(b, weight, layout, wide.type.dtype))
    slope = reshape(b, slope, layout.view)
    x_ct = sub(b, slope, mul(b, unit, _average(b, mul(b, slope, unit), layout)))
    if mean is not None:
        x_ct = sub(b, x_ct, _average(b, slope, layout))
    x_ct = cast(b, reshape(b, mul(b, x_ct, scales), layout.shape), dtype)
    weight_ct = sum_dims(b, mul(b, wide, reshape(b, unit, layout.shape)), layout.other_axes)
    bias_ct = sum_dims(b, wide, layout.other_axes)
    param_dtype = dtype if weight is None else weight.type.dtype
    return x_ct, cast(b, weight_ct, param_dtype), cast(b, bias_ct, param_dtype)


def statistics_vjp(
    b: Builder,
    x: Value,
    mean: Value | None,
    rstd: Value,
    layout: Layout,
    mean_ct: Value | None,
    rstd_ct: Value | None,
) -> Value | None:
    """What cotangents of mean and rstd give to x: ``dmean/dx = 1/n``, ``drstd/dx = -rstd**3 * (x - mean) / n``."""
    total = None
    if rstd_ct is not None:
        centered = _viewed(b, x, layout)
        if mean is not None:
            centered = sub(b, centered, spread(b, mean, layout))
        cube = b.emit("pow_scalar", rstd, value=3)
        total = mul(b, centered, spread(b, scale(b, mul(b, rstd_ct, cube), -1 / max(1, layout.count)), layout))
    if mean_ct is not None:
        part = spread(b, scale(b, mean_ct, 1 / max(1, layout.count)), layout)
        total = part if total is None else add(b, total, part)
    return None if total is None else cast(b, reshape(b, total, layout.shape), x.type.dtype)


def sum_present(b: Builder, *values: Value | None) -> Value | None:
    """The sum of what is there."""
    present = [value for value in values if value is not None]
    total = None
    for value in present:
        total = value if total is None else add(b, total, value)
    return total
