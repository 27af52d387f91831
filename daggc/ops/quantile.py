"""Importers of quantiles: the sorted numbers at a rank, or between the two nearest ranks."""

from __future__ import annotations

import math

from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ops.build import broadcast, cast, full, mul, norm_dim, reshape, sub, sum_dims
from daggc.ops.opdef import Importer, require
from daggc.ops.shape import movedim

_ROUNDED = {"lower": "floor", "higher": "ceil", "nearest": "round"}


def import_quantile(skip_nan: bool) -> Importer:
    """``quantile``, or ``nanquantile``. ``q`` is a number, or a tensor of them that becomes the first axis."""

    def importer(
        b: Builder,
        x: Value,
        q: Value | float,
        dim: int | None = None,
        keepdim: bool = False,
        *,
        interpolation: str = "linear",
    ) -> Value:
        require(x.type.is_float, f"a float tensor is required, got {x.type}")
        levels = q if isinstance(q, Value) else full(b, float(q), (), x.type.dtype)
        require(levels.type.dtype == x.type.dtype and levels.type.rank <= 1, f"levels like {x.type}, got {levels.type}")
        shape = x.type.shape
        if dim is None or not shape:
            kept = (1,) * len(shape)
            rows = reshape(b, x, (1, x.type.numel))
        else:
            dim = norm_dim(dim, len(shape))
            kept = (*shape[:dim], 1, *shape[dim + 1 :])
            rows = reshape(b, movedim(b, x, dim, -1), (math.prod(kept), shape[dim]))
        found = _of_rows(b, rows, reshape(b, levels, (1, levels.type.numel)), interpolation, skip_nan)
        result = kept if keepdim else () if dim is None else shape[:dim] + shape[dim + 1 :]
        return reshape(b, movedim(b, found, 1, 0), (*levels.type.shape, *result))

    return importer


def _of_rows(b: Builder, rows: Value, levels: Value, interpolation: str, skip_nan: bool) -> Value:
    """Of ``[n, size]`` numbers, the quantiles ``[n, levels]``; as torch orders the steps."""
    (n, size), dtype = rows.type.shape, rows.type.dtype
    ordered = b.emit_many("sort", rows, dim=1, descending=False, stable=False)[0]  # as torch
    shape = (n, levels.type.numel)
    levels = broadcast(b, levels, shape)
    nan = b.emit("isnan", ordered)
    if skip_nan:  # no number at all: rank 0, where NaN stands
        numbers = sum_dims(b, cast(b, b.emit("logical_not", nan), "i64"), (1,), keepdim=True)
        last = cast(b, b.emit("sub_scalar", numbers, value=1), dtype)
        ranks = mul(b, levels, broadcast(b, last, shape))
        ranks = b.emit("where_scalar", b.emit("ge_scalar", ranks, value=0), ranks, value=0.0)
    else:  # any NaN: the last rank, where NaN stands
        ranks = b.emit("mul_scalar", levels, value=size - 1)
        broken = broadcast(b, b.emit("any", nan, dims=(1,), keepdim=True), shape)
        ranks = b.emit("where_scalar", b.emit("logical_not", broken), ranks, value=float(size - 1))
    if interpolation in _ROUNDED:
        return _at(b, ordered, b.emit(_ROUNDED[interpolation], ranks))
    require(interpolation in ("linear", "midpoint"), f"interpolation {interpolation!r} is not known")
    below = _whole(b, ranks)
    weight = full(b, 0.5, shape, dtype) if interpolation == "midpoint" else sub(b, ranks, cast(b, below, dtype))
    lower = b.emit("gather", ordered, below, dim=1)
    return b.emit("lerp", lower, _at(b, ordered, b.emit("ceil", ranks)), weight)


def _whole(b: Builder, ranks: Value) -> Value:
    return cast(b, ranks, "i64")


def _at(b: Builder, ordered: Value, ranks: Value) -> Value:
    return b.emit("gather", ordered, _whole(b, ranks), dim=1)
