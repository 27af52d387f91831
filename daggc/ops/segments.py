"""Importers of what works by segments of an axis, whose lengths are data: segment_reduce, repeat_interleave."""

from __future__ import annotations

import math

from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ops.build import Scalar, broadcast, cast, full, norm_dim, reshape
from daggc.ops.iota import iota
from daggc.ops.opdef import require
from daggc.ops.slicing import slice_dim

_START = {"max": -math.inf, "min": math.inf, "sum": 0.0, "mean": 0.0, "prod": 1.0}
_REDUCTION = {"max": "amax", "min": "amin", "sum": "sum", "mean": "sum", "prod": "prod"}


def _places(b: Builder, ends: Value, count: int) -> Value:
    """For each of ``count`` positions its segment, of rows of segments that end where ``ends`` says."""
    lead = ends.type.shape[:-1]
    positions = broadcast(b, iota(b, count), (*lead, count))
    return b.emit("searchsorted", ends, positions, right=True)


def import_segment_reduce(
    b: Builder,
    x: Value,
    reduce: str,
    *,
    lengths: Value | None = None,
    indices: Value | None = None,
    offsets: Value | None = None,
    axis: int = 0,
    unsafe: bool = False,
    initial: Scalar | None = None,
) -> Value:
    """Segments of an axis, one after the other, reduced to one element each; an empty one is the initial value."""
    if indices is not None or not x.type.is_float or isinstance(initial, complex):
        raise NotImplementedError("segment_reduce by indices, or of numbers that are not floats")
    axis = norm_dim(axis, x.type.rank)
    size = x.type.shape[axis]
    if lengths is not None:
        lengths = cast(b, lengths, "i64")
        ends = b.emit("cumsum", lengths, dim=axis)
    else:
        assert offsets is not None, "torch asks for lengths or offsets"
        offsets = cast(b, offsets, "i64")
        count = offsets.type.shape[axis]
        ends = slice_dim(b, offsets, axis, 1, count)
        lengths = b.emit("sub", ends, slice_dim(b, offsets, axis, 0, count - 1))
    segments = ends.type.shape[axis]
    tail = x.type.shape[axis + 1 :]
    require(ends.type.shape[:axis] == x.type.shape[:axis], f"segments of each row of {x.type} are required")
    place = _places(b, ends, size)
    place = broadcast(b, reshape(b, place, (*place.type.shape, *(1 for _ in tail))), x.type.shape)
    shape = (*x.type.shape[:axis], segments + 1, *tail)  # what comes after the last segment is left out
    start = full(b, _START[reduce] if initial is None else float(initial), shape, x.type.dtype)
    if reduce in ("sum", "mean"):
        total = b.emit("scatter_add", start, place, x, dim=axis)
    else:
        attrs = {"reduce": _REDUCTION[reduce], "include_self": True}
        total = b.emit("scatter_reduce", start, place, x, dim=axis, **attrs)
    total = slice_dim(b, total, axis, 0, segments)
    if reduce != "mean":
        return total
    count = reshape(b, cast(b, lengths, x.type.dtype), (*lengths.type.shape, *(1 for _ in tail)))
    count = broadcast(b, count, total.type.shape)
    mean = b.emit("div", total, count)
    return mean if initial is None else b.emit("where", b.emit("ne_scalar", count, value=0.0), mean, total)


def import_repeats(b: Builder, repeats: Value, *, output_size: int | None = None) -> Value:
    """``repeat_interleave(repeats)``: each position as often as it says."""
    if output_size is None:
        raise NotImplementedError("repeat_interleave without output_size has a data-dependent shape")
    return _places(b, b.emit("cumsum", cast(b, repeats, "i64"), dim=0), output_size)


def import_repeat_interleave(
    b: Builder, x: Value, repeats: Value, dim: int | None = None, *, output_size: int | None = None
) -> Value:
    if dim is None or not x.type.rank:
        x, dim = reshape(b, x, (x.type.numel,)), 0
    dim = norm_dim(dim, x.type.rank)
    times = broadcast(b, reshape(b, repeats, (repeats.type.numel,)), (x.type.shape[dim],))
    return b.emit("index_select", x, import_repeats(b, times, output_size=output_size), dim=dim)
