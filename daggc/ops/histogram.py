"""Importers of histograms: the bin of each number is found, then what falls into each bin is added up.

Counts are constant almost everywhere, and torch has no derivative of them: gradients stop here.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence

from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ops.build import Scalar, add, broadcast, cast, full, reshape, scale, sub, sum_dims
from daggc.ops.opdef import REGISTRY, require
from daggc.ops.slicing import slice_dim


def _stopped(b: Builder, x: Value) -> Value:
    return b.emit("stop_gradient", x) if x.type.differentiable else x


def _flat(b: Builder, x: Value) -> Value:
    require(x.type.dtype in ("f32", "f64"), f"an f32 or f64 tensor is required, got {x.type}")
    return _stopped(b, reshape(b, x, (x.type.numel,)))


def _count(b: Builder, bins: int, place: Value, valid: Value, weight: Value | None, dtype: str) -> Value:
    """The number (or weight) of valid elements at each place below ``bins``."""
    amount = full(b, 1.0, place.type.shape, dtype) if weight is None else weight
    amount = b.emit("where_scalar", valid, amount, value=0.0)
    place = b.emit("where_scalar", valid, place, value=0)
    return b.emit("scatter_add", full(b, 0.0, (bins,), dtype), place, amount, dim=0)


def _bounds(b: Builder, x: Value, low: Scalar, high: Scalar, margin: float) -> tuple[Value, Value]:
    """The given range; that of the numbers if it is empty; a margin to either side if that is empty too."""
    dtype = x.type.dtype
    if low == high and x.type.numel:
        first, last = (b.emit(op, x, dims=(0,), keepdim=False) for op in ("amin", "amax"))
    else:
        first, last = full(b, float(low.real), (), dtype), full(b, float(high.real), (), dtype)
        if low != high:
            return first, last
    wider = scale(b, b.emit("cast", b.emit("eq", first, last), dtype=dtype), margin)
    return sub(b, first, wider), add(b, last, wider)


def import_histc(b: Builder, x: Value, bins: int = 100, min: Scalar = 0, max: Scalar = 0) -> Value:
    """The bin is computed, not looked up: ``(x - low) * bins / (high - low)``."""
    x = _flat(b, x)
    low, high = (broadcast(b, bound, x.type.shape) for bound in _bounds(b, x, min, max, margin=1.0))
    scaled = b.emit("mul_scalar", sub(b, x, low), value=bins)
    inside = b.emit("logical_and", b.emit("ge", x, low), b.emit("le", x, high))
    place = b.emit("where_scalar", inside, b.emit("div", scaled, sub(b, high, low)), value=0.0)
    place = cast(b, place, "i64")
    last = b.emit("eq_scalar", place, value=bins)
    place = b.emit("where_scalar", b.emit("logical_not", last), place, value=bins - 1)
    return _count(b, bins, place, inside, None, x.type.dtype)


def _bins(b: Builder, x: Value, edges: Value) -> tuple[Value, Value]:
    """Of each number its bin between the edges, and whether it has one. The last bin has both of its edges."""
    bins = edges.type.numel - 1
    first, last = (broadcast(b, slice_dim(b, edges, 0, i, i + 1), x.type.shape) for i in (0, bins))
    place = b.emit("sub_scalar", b.emit("searchsorted", edges, x, right=True), value=1)
    place = b.emit("where_scalar", b.emit("lt", x, last), place, value=bins - 1)
    return place, b.emit("logical_and", b.emit("ge", x, first), b.emit("le", x, last))


def _fill(b: Builder, columns: Sequence[Value], edges: Sequence[Value], weight: Value | None, density: bool) -> Value:
    """The histogram of points, given by their coordinates along each axis."""
    sizes = [axis.type.numel - 1 for axis in edges]
    place, inside = _bins(b, columns[0], edges[0])
    for x, axis, size in zip(columns[1:], edges[1:], sizes[1:], strict=True):
        along, fits = _bins(b, x, axis)
        place = add(b, scale(b, place, size), along)
        inside = b.emit("logical_and", inside, fits)
    weight = None if weight is None else _flat(b, weight)
    hist = reshape(b, _count(b, math.prod(sizes), place, inside, weight, columns[0].type.dtype), sizes)
    if density:
        total = sum_dims(b, hist, tuple(range(len(sizes))))
        hist = b.emit("div", hist, broadcast(b, total, sizes))
        for dim, (axis, size) in enumerate(zip(edges, sizes, strict=True)):
            widths = sub(b, slice_dim(b, axis, 0, 1, size + 1), slice_dim(b, axis, 0, 0, size))
            widths = reshape(b, widths, [size if other == dim else 1 for other in range(len(sizes))])
            hist = b.emit("div", hist, broadcast(b, widths, sizes))
    return hist


def _even_edges(b: Builder, x: Value, bins: int, low: float, high: float) -> Value:
    first, last = _bounds(b, x, low, high, margin=0.5)
    return REGISTRY.importers["linspace.Tensor_Tensor"](b, first, last, bins + 1, dtype=x.type.dtype)


def import_histogram(
    b: Builder,
    x: Value,
    bins: int | Value = 100,
    *,
    range: Sequence[float] | None = None,
    weight: Value | None = None,
    density: bool = False,
) -> tuple[Value, Value]:
    """``bins`` is the number of equal bins, or their edges."""
    x = _flat(b, x)
    if isinstance(bins, Value):
        edges = _stopped(b, bins)
    else:
        edges = _even_edges(b, x, bins, *(range or ((0.0, 0.0) if x.type.numel else (0.0, 1.0))))
    return _fill(b, [x], [edges], weight, density), edges


def import_histogramdd(
    b: Builder,
    x: Value,
    bins: int | Sequence[int | Value],
    range: Sequence[float] | None = None,
    weight: Value | None = None,
    density: bool = False,
) -> tuple[Value, list[Value]]:
    """Of points, whose coordinates are along the last axis."""
    size = x.type.shape[-1]
    points = reshape(b, x, (math.prod(x.type.shape[:-1]), size))
    columns = [_flat(b, slice_dim(b, points, 1, i, i + 1)) for i in builtins.range(size)]
    limits = list(range) if range else [0.0, 0.0 if points.type.numel else 1.0] * size
    given = [bins] * size if isinstance(bins, int) else bins
    edges = [
        _stopped(b, axis) if isinstance(axis, Value) else _even_edges(b, column, axis, *limits[2 * i : 2 * i + 2])
        for i, (column, axis) in enumerate(zip(columns, given, strict=True))
    ]
    return _fill(b, columns, edges, weight, density), edges
