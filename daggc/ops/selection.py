"""One element picked by its rank or how often it occurs: max, min and median of all, medians, kthvalue, mode.

Those of all elements share the cotangent evenly among ties; those along an axis also give the position of the
element, which alone gets the cotangent. ``argmax`` and ``sort`` are in ``order.py``, ``amax`` is in ``reduce.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import broadcast, cast, kind, norm_dim, reshape, sum_dims
from daggc.ops.opdef import (
    Arg,
    Cost,
    Importer,
    OpDef,
    Sample,
    node_bytes,
    reduction_cost,
    register,
    require,
    sample,
    t,
    whole,
)
from daggc.ops.order import selected_vjp, wide
from daggc.ops.shape import Cotangents, squeeze
from daggc.ops.slicing import axes_but_dim


def _is_nan(x: np.ndarray) -> np.ndarray:
    return np.isnan(x) if x.dtype.kind == "f" else np.zeros(x.shape, bool)


def _median_rank(x: np.ndarray, skip_nan: bool) -> np.ndarray:
    """The rank of the lower median of each row, NaN the largest; of a row with NaN, that of NaN unless skipped."""
    size, nans = x.shape[-1], _is_nan(x).sum(-1)
    if skip_nan:
        return np.maximum(size - nans - 1, 0) // 2
    return np.where(nans > 0, size - nans, (size - 1) // 2)


# --- of all elements ----------------------------------------------------------------------------------


def _infer_all(kinds: str, of_nothing: bool) -> Callable[[Sequence[TensorType], Attrs], tuple[TensorType, ...]]:
    def infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        (x,) = inputs
        some = x.numel > 0 or (of_nothing and x.is_float)
        require(some and kind(x.dtype) in kinds, f"elements of a kind of {kinds} are required, got {x}")
        return (x.with_(shape=()),)

    return infer


def _all_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """Every element equal to the result gets the same part; if the result is NaN, every NaN does."""
    (ct,), (x,), y = cts, node.inputs, node.output
    assert ct is not None
    found = broadcast(b, y, x.type.shape)
    both_nan = b.emit("logical_and", b.emit("isnan", x), b.emit("isnan", found))
    chosen = b.emit("logical_or", b.emit("eq", x, found), both_nan)
    count = sum_dims(b, cast(b, chosen, ct.type.dtype), range(x.type.rank))
    part = broadcast(b, b.emit("div", ct, count), x.type.shape)
    return (b.emit("where_scalar", chosen, part, value=0.0),)


def _median_of_all(skip_nan: bool) -> Callable[[np.ndarray], np.ndarray]:
    def median(x: np.ndarray) -> np.ndarray:
        flat = x.reshape(-1)
        if not flat.size:
            return np.asarray(np.nan)
        return np.sort(flat)[_median_rank(flat, skip_nan)]

    return median


def _import_all(op: str) -> Importer:
    return lambda b, x: b.emit(op, x)


for _op, _function, _kinds in (
    ("max", np.max, "bif"),
    ("min", np.min, "bif"),
    ("median", _median_of_all(skip_nan=False), "if"),
    ("nanmedian", _median_of_all(skip_nan=True), "if"),
):
    register(
        OpDef(
            name=_op,
            infer=_infer_all(_kinds, of_nothing="median" in _op),
            evaluate=lambda node, x, function=_function: np.asarray(function(wide(x)), node.output.type.numpy_dtype),
            vjp=_all_vjp,
            cost=reduction_cost(1 if _op in ("max", "min") else 10),
            axes=whole,
            lower=lambda node, args, op=_op: f"torch.{op}({args[0]})",
            aten={f"{_op}.default": _import_all(_op)},
            samples=(sample((3, 4), domain="distinct"), sample((), domain="distinct")),
        )
    )

# --- along an axis ------------------------------------------------------------------------------------


def _infer_along(kinds: str) -> Callable[[Sequence[TensorType], Attrs], tuple[TensorType, ...]]:
    def infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        (x,), dim, k = inputs, attrs["dim"], attrs.get("k", 1)
        require(kind(x.dtype) in kinds, f"elements of a kind of {kinds} are required, got {x}")
        require(type(dim) is int and 0 <= dim < x.rank, f"dim must be an axis of {x}, got {dim}")
        require(type(k) is int and 1 <= k <= x.shape[dim], f"k must be from 1 to {x.shape[dim]}, got {k}")
        value = x.with_(shape=(*x.shape[:dim], 1, *x.shape[dim + 1 :]))
        return value, value.with_(dtype="i64")

    return infer


Pick = Callable[[np.ndarray, np.ndarray, Node], np.ndarray]


def _evaluate_along(pick: Pick) -> Callable[[Node, np.ndarray], tuple[np.ndarray, ...]]:
    """``pick(rows in order, their order, node)`` gives the place of the element in each sorted row: ``[..., 1]``."""

    def evaluate(node: Node, x: np.ndarray) -> tuple[np.ndarray, ...]:
        dim = node.attrs["dim"]
        rows = np.moveaxis(wide(x), dim, -1)
        order = np.argsort(rows, axis=-1, kind="stable")
        place = pick(np.take_along_axis(rows, order, -1), order, node)
        index = np.moveaxis(np.take_along_axis(order, place, -1), -1, dim)
        return np.take_along_axis(x, index, dim), index.astype(np.int64)

    return evaluate


def _pick_median(skip_nan: bool) -> Pick:
    return lambda ordered, order, node: _median_rank(ordered, skip_nan)[..., None]


def _pick_kth(ordered: np.ndarray, order: np.ndarray, node: Node) -> np.ndarray:
    return np.full((*ordered.shape[:-1], 1), node.attrs["k"] - 1)


def _pick_mode(ordered: np.ndarray, order: np.ndarray, node: Node) -> np.ndarray:
    """The smallest of the most frequent elements, at its last position; NaNs differ from each other, as in torch."""
    size = ordered.shape[-1]
    starts = np.ones(ordered.shape, bool)
    starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    places = np.arange(size)
    length = places - np.maximum.accumulate(np.where(starts, places, 0), -1)
    return np.argmax(length, -1)[..., None]


def _order_cost(node: Node) -> Cost:
    return Cost(10 * node.inputs[0].type.numel, node_bytes(node), "reduction")


def emit_along(b: Builder, op: str, x: Value, dim: int, keepdim: bool, **attrs: Attr) -> tuple[Value, ...]:
    """Values and positions along an axis; a scalar is its own, at position 0."""
    if not x.type.rank:
        values, indices = b.emit_many(op, reshape(b, x, (1,)), dim=0, **attrs)
        return reshape(b, values, ()), reshape(b, indices, ())
    dim = norm_dim(dim, x.type.rank)
    values, indices = b.emit_many(op, x, dim=dim, **attrs)
    return (values, indices) if keepdim else (squeeze(b, values, dim), squeeze(b, indices, dim))


def _import_along(op: str) -> Importer:
    return lambda b, x, dim=-1, keepdim=False: emit_along(b, op, x, dim, keepdim)


def _import_kthvalue(b: Builder, x: Value, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Value, ...]:
    return emit_along(b, "kthvalue", x, dim, keepdim, k=k)


_SAMPLES = (sample((3, 5), domain="distinct", dim=1), sample((4, 2), domain="distinct", dim=0))
for _op, _torch, _pick, _kinds in (
    ("median_along", "median", _pick_median(skip_nan=False), "if"),
    ("nanmedian_along", "nanmedian", _pick_median(skip_nan=True), "if"),
    ("kthvalue", "kthvalue", _pick_kth, "if"),
    ("mode", "mode", _pick_mode, "bif"),
):
    _kth = _op == "kthvalue"
    register(
        OpDef(
            name=_op,
            infer=_infer_along(_kinds),
            evaluate=_evaluate_along(_pick),
            vjp=selected_vjp,
            cost=_order_cost,
            axes=axes_but_dim,
            lower=lambda node, args, name=_torch: (
                f"torch.{name}({', '.join([args[0], *(['k=' + str(node.attrs['k'])] if 'k' in node.attrs else [])])}, "
                f"dim={node.attrs['dim']}, keepdim=True)"
            ),
            aten={"kthvalue.default": _import_kthvalue}
            if _kth
            else {f"{_torch}.{'default' if _op == 'mode' else 'dim'}": _import_along(_op)},
            samples=tuple(replace(s, attrs={**s.attrs, **({"k": 2} if _kth else {})}) for s in _SAMPLES)
            + ((Sample((Arg(t(2, 6, dtype="i64"), "small"),), {"dim": 1}),) if _op == "mode" else ()),
        )
    )
