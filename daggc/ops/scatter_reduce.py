"""Reductions by index: sums, products, means and extrema of what goes to one place.

``scatter_reduce(base, index, source) {dim, reduce, include_self}``. The derivatives are torch's (FunctionsManual.cpp,
``scatter_reduce_backward``): ties share the cotangent evenly, and products with zeros divide by nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import Scalar, broadcast, cast, full, kind, mul, norm_dim, reshape, zeros_like
from daggc.ops.indexing import bounded, emit_scatter, infer_scatter
from daggc.ops.opdef import Arg, OpDef, Sample, elementwise_cost, register, require, t, upcast
from daggc.ops.segments import import_segment_reduce
from daggc.ops.shape import Cotangents
from daggc.ops.slicing import axes_but_dim

_REDUCTIONS = ("sum", "prod", "mean", "amax", "amin")


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    reduce, include_self = attrs["reduce"], attrs["include_self"]
    require(reduce in _REDUCTIONS, f"reduce must be one of {', '.join(_REDUCTIONS)}, got {reduce!r}")
    require(isinstance(include_self, bool), f"include_self must be a bool, got {include_self!r}")
    (result,) = infer_scatter(inputs, attrs)
    require(kind(result.dtype) in "if", f"integers or floats are required, got {result}")
    return (result,)


# --- the meaning --------------------------------------------------------------------------------------


def _neutral(reduce: str, dtype: np.dtype) -> float | int:
    if reduce in ("sum", "mean"):
        return 0
    if reduce == "prod":
        return 1
    sign = -1 if reduce == "amax" else 1
    if dtype.kind == "f":
        return sign * np.inf
    return np.iinfo(dtype).min if reduce == "amax" else np.iinfo(dtype).max


def _evaluate(node: Node, base: np.ndarray, index: np.ndarray, source: np.ndarray) -> np.ndarray:
    dim, reduce = node.attrs["dim"], node.attrs["reduce"]
    places = list(np.indices(index.shape, sparse=True))
    places[dim] = bounded(index, base.shape[dim])
    key = tuple(places)
    result, counts = base.copy(), np.ones(base.shape, np.int64)
    if not node.attrs["include_self"]:
        result[key], counts[key] = _neutral(reduce, base.dtype), 0
    function = {"prod": np.multiply, "amax": np.maximum, "amin": np.minimum}.get(reduce, np.add)
    function.at(result, key, source)
    if reduce == "mean":
        np.add.at(counts, key, 1)
        result = result / counts if base.dtype.kind == "f" else result // counts
    return result.astype(base.dtype)


# --- the derivative -----------------------------------------------------------------------------------


def _vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    (ct,), index, dim = cts, node.inputs[1], node.attrs["dim"]
    assert ct is not None
    base_ct, source_ct = {"sum": _sum_vjp, "mean": _mean_vjp, "prod": _prod_vjp}.get(
        node.attrs["reduce"], _extremum_vjp
    )(b, node, ct)
    if not node.attrs["include_self"]:
        base_ct = b.emit("scatter", base_ct, index, zeros_like(b, source_ct), dim=dim)
    return base_ct, None, source_ct


def _gather(b: Builder, node: Node, x: Value) -> Value:
    return b.emit("gather", x, node.inputs[1], dim=node.attrs["dim"])


def _add_up(b: Builder, node: Node, base: Value, source: Value) -> Value:
    return b.emit("scatter_add", base, node.inputs[1], source, dim=node.attrs["dim"])


def _sum_vjp(b: Builder, node: Node, ct: Value) -> tuple[Value, Value]:
    return ct, _gather(b, node, ct)


def _mean_vjp(b: Builder, node: Node, ct: Value) -> tuple[Value, Value]:
    _, _, source = node.inputs
    itself = full(b, float(node.attrs["include_self"]), ct.type.shape, ct.type.dtype)
    count = _add_up(b, node, itself, full(b, 1.0, source.type.shape, source.type.dtype))
    if not node.attrs["include_self"]:
        count = b.emit("where_scalar", b.emit("ne_scalar", count, value=0.0), count, value=1.0)
    part = b.emit("div", ct, count)
    return part, _gather(b, node, part)


def _extremum_vjp(b: Builder, node: Node, ct: Value) -> tuple[Value, Value]:
    """A base that equals the result counts as a winner even where it took no part, as in torch."""
    (base, _, source), y = node.inputs, node.output
    base_wins = cast(b, b.emit("eq", base, y), ct.type.dtype)
    source_wins = cast(b, b.emit("eq", source, _gather(b, node, y)), ct.type.dtype)
    part = b.emit("div", ct, _add_up(b, node, base_wins, source_wins))
    return mul(b, base_wins, part), mul(b, source_wins, _gather(b, node, part))


def _without(b: Builder, x: Value, mask: Value) -> Value:
    """x with ones where the mask holds."""
    return b.emit("where_scalar", b.emit("logical_not", mask), x, value=1.0)


def _prod_vjp(b: Builder, node: Node, ct: Value) -> tuple[Value, Value]:
    """The product of the others: the result divided by the factor; where the only zero is the factor, that
    product again with a one in its place."""
    (base, index, source), attrs = node.inputs, dict(node.attrs)
    nonzero_base = _without(b, base, b.emit("eq_scalar", base, value=0.0))
    others = b.emit("scatter_reduce", nonzero_base, index, source, **attrs)
    base_ct = b.emit("div", mul(b, ct, others), nonzero_base)

    zero = b.emit("eq_scalar", source, value=0.0)
    zeros = _add_up(b, node, zeros_like(b, base), cast(b, zero, base.type.dtype))
    single = b.emit("logical_and", zero, b.emit("eq_scalar", _gather(b, node, zeros), value=1.0))
    others = b.emit("scatter_reduce", base, index, _without(b, source, single), **attrs)
    of_zeros = _gather(b, node, mul(b, ct, others))
    of_rest = b.emit("div", _gather(b, node, mul(b, ct, node.output)), _without(b, source, zero))
    return base_ct, b.emit("where", single, of_zeros, of_rest)


# --- importers ----------------------------------------------------------------------------------------


def _import_scatter_reduce(
    b: Builder, base: Value, dim: int, index: Value, source: Value, reduce: str, *, include_self: bool = True
) -> Value:
    if reduce == "sum" and include_self:
        return emit_scatter(b, "scatter_add", base, dim, index, source)
    return emit_scatter(b, "scatter_reduce", base, dim, index, source, reduce=reduce, include_self=include_self)


def _import_scatter_with_reduce(
    b: Builder, base: Value, dim: int, index: Value, source: Value | Scalar, *, reduce: str
) -> Value:
    """``scatter(..., reduce="add")``: the older name. torch has no derivative of it."""
    if base.type.differentiable and not base.type.is_float:
        raise NotImplementedError("scatter of complex numbers with a reduction")
    if not isinstance(source, Value):
        source = full(b, source, index.type.shape, base.type.dtype)
    return _import_scatter_reduce(b, base, dim, index, source, {"add": "sum", "multiply": "prod"}[reduce])


def _import_index_reduce(
    b: Builder, base: Value, dim: int, index: Value, source: Value, reduce: str, *, include_self: bool = True
) -> Value:
    """One index for each slice of the source: the same index all over the slice."""
    if not base.type.rank:
        base, source = reshape(b, base, (1,)), reshape(b, source, (source.type.numel,))
        return reshape(b, _import_index_reduce(b, base, 0, index, source, reduce, include_self=include_self), ())
    dim = norm_dim(dim, base.type.rank)
    shape = (*base.type.shape[:dim], index.type.numel, *base.type.shape[dim + 1 :])
    column = reshape(b, index, [index.type.numel if axis == dim else 1 for axis in range(base.type.rank)])
    source = reshape(b, source, shape)
    return _import_scatter_reduce(b, base, dim, broadcast(b, column, shape), source, reduce, include_self=include_self)


def _lower(node: Node, args: Sequence[str]) -> str:
    dim, reduce, include_self = (node.attrs[name] for name in ("dim", "reduce", "include_self"))
    return (
        f"torch.scatter_reduce({args[0]}, {dim}, {args[1]}, {args[2]}, reduce={reduce!r}, include_self={include_self})"
    )


def _sample(domain: str, dtype: str = "f64", **attrs: object) -> Sample:
    index = Arg(t(3, 5, dtype="i64"), "index:4")
    return Sample((Arg(t(3, 4, dtype=dtype), domain), index, Arg(t(3, 5, dtype=dtype), domain)), {"dim": 1, **attrs})  # pyright: ignore[reportArgumentType]


register(
    OpDef(
        name="scatter_reduce",
        infer=_infer,
        evaluate=upcast(_evaluate),
        vjp=_vjp,
        cost=elementwise_cost(2),
        axes=axes_but_dim,
        lower=_lower,
        aten={
            "scatter_reduce.two": _import_scatter_reduce,
            "index_reduce.default": _import_index_reduce,
            "segment_reduce.default": import_segment_reduce,
            "scatter.reduce": _import_scatter_with_reduce,
            "scatter.value_reduce": _import_scatter_with_reduce,
        },
        samples=(
            _sample("real", reduce="sum", include_self=False),
            _sample("nonzero", reduce="prod", include_self=True),
            _sample("nonzero", reduce="prod", include_self=False),
            _sample("real", reduce="mean", include_self=True),
            _sample("real", reduce="mean", include_self=False),
            _sample("distinct", reduce="amax", include_self=True),
            _sample("distinct", reduce="amin", include_self=False),
            _sample("small", dtype="i64", reduce="mean", include_self=True),
        ),
    )
)
