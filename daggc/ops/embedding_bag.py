"""``embedding_bag``: rows of a weight looked up and reduced bag by bag, without a tensor of all rows.

Bag ``i`` holds the indices from ``offsets[i]`` to the next offset (the last one to the end). An index equal to
``padding_idx`` counts for nothing; a bag of nothing gives zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import broadcast, cast, full, mul, sum_dims, zeros_like
from daggc.ops.indexing import average_row_gradients, require_room
from daggc.ops.opdef import Arg, Axes, OpDef, Sample, elementwise_cost, register, require, t
from daggc.ops.shape import Cotangents, unsqueeze
from daggc.ops.slicing import slice_dim

MODES = ("sum", "mean", "max")  # in ATen's order


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    """Inputs are weight [V, D], index [n], offsets [B][, factors [n]]; a max gives the rows it chose as well."""
    weight, index, offsets, *factors = inputs
    mode, padding = attrs["mode"], attrs["padding_idx"]
    require(mode in MODES, f"mode is one of {', '.join(MODES)}, got {mode!r}")
    require(weight.is_float and weight.rank == 2, f"a weight [V, D] of floats is required, got {weight}")
    require_room(index, weight.shape[0])
    # torch's kernels read outside of memory
    require(offsets.numel > 0 or not index.numel, f"a bag is required to put {index} in, got offsets {offsets}")
    require(index.dtype in ("i64", "i32") and index.rank == 1, f"indices i64[n] or i32[n] are required, got {index}")
    require(offsets.dtype == index.dtype and offsets.rank == 1, f"offsets of the indices' dtype, got {offsets}")
    fits = padding is None or 0 <= padding < weight.shape[0]
    require(fits, f"padding_idx must be None or in [0, {weight.shape[0]}), got {padding}")
    require(len(factors) <= (mode == "sum"), "factors of the indices are for sums only")
    for factor in factors:
        require(factor == weight.with_(shape=index.shape), f"a factor for each index is required, got {factor}")
    out = weight.with_(shape=(offsets.shape[0], weight.shape[1]))
    return (out, out.with_(dtype=index.dtype)) if mode == "max" else (out,)


def _evaluate(node: Node, weight: np.ndarray, index: np.ndarray, offsets: np.ndarray, *factors: np.ndarray):
    types = [value.type.numpy_dtype for value in node.outputs]
    wide = weight if weight.dtype == np.float64 else weight.astype(np.float32)
    if index.size and (index.min() < 0 or index.max() >= len(weight)):
        raise IndexError(f"indices must be in [0, {len(weight)}), got {index.min()} to {index.max()}")
    if len(offsets) and (offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] > len(index)):
        raise IndexError(f"offsets must rise from 0 to at most {len(index)}, got {offsets.tolist()}")
    bags = np.searchsorted(offsets, np.arange(len(index)), side="right") - 1
    kept = index != node.attrs["padding_idx"] if node.attrs["padding_idx"] is not None else index >= 0
    index, bags, out = index[kept], bags[kept], np.zeros(node.outputs[0].type.shape, wide.dtype)
    if node.attrs["mode"] == "max":
        which, seen = np.zeros(out.shape, types[1]), np.zeros(len(out), bool)
        for bag, row in zip(bags, index, strict=True):
            better = (wide[row] > out[bag]) | ~seen[bag]
            out[bag], which[bag] = np.where(better, wide[row], out[bag]), np.where(better, row, which[bag])
            seen[bag] = True
        return out.astype(types[0]), which
    rows = wide[index]
    if factors:
        rows = rows * factors[0][kept].astype(wide.dtype)[:, None]
    np.add.at(out, bags, rows)
    if node.attrs["mode"] == "mean":
        out = out / np.maximum(np.bincount(bags, minlength=len(out)), 1)[:, None].astype(wide.dtype)
    return out.astype(types[0])


def _bags(b: Builder, index: Value, offsets: Value) -> Value:
    """The bag of each index, i64[n]."""
    count = index.type.shape[0]
    starts = full(b, 0, (count + 1,), "i64")  # bags at the very end have nothing
    starts = b.emit("index_add", starts, offsets, full(b, 1, offsets.type.shape, "i64"), dim=0)
    return b.emit("add_scalar", slice_dim(b, b.emit("cumsum", starts, dim=0), 0, 0, count), value=-1)


def _vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    (weight, index, offsets, *factors), attrs, ct = node.inputs, node.attrs, cts[0]
    assert ct is not None
    dtype, padding = weight.type.dtype, attrs["padding_idx"]
    if not index.type.numel:
        return zeros_like(b, weight), None, None, *(zeros_like(b, factor) for factor in factors)
    kept = None if padding is None else b.emit("ne_scalar", index, value=padding)
    bags = _bags(b, index, offsets)
    if attrs["mode"] != "sum":
        ones = full(b, 1.0, index.type.shape, dtype) if kept is None else cast(b, kept, dtype)
        counts = b.emit("index_add", full(b, 0.0, offsets.type.shape, dtype), bags, ones, dim=0)
        counts = broadcast(b, unsqueeze(b, counts, 1), ct.type.shape)
        if attrs["mode"] == "max":
            ct = b.emit("where_scalar", b.emit("gt_scalar", counts, value=0.0), ct, value=0.0)
            zeros = full(b, 0.0, weight.type.shape, dtype)
            return b.emit("scatter_add", zeros, cast(b, node.outputs[1], "i64"), ct, dim=0), None, None
        ct = b.emit("div", ct, b.emit("maximum_scalar", counts, value=1.0))
    ct_rows = b.emit("index_select", ct, bags, dim=0)
    if not factors:
        return _ct_weight(b, ct_rows, weight, index, padding), None, None
    rows = b.emit("embedding", weight, index, padding_idx=None)
    ct_factors = sum_dims(b, mul(b, ct_rows, rows), (1,))
    if kept is not None:
        ct_factors = b.emit("where_scalar", kept, ct_factors, value=0.0)
    ct_rows = mul(b, ct_rows, broadcast(b, unsqueeze(b, factors[0], 1), ct_rows.type.shape))
    return _ct_weight(b, ct_rows, weight, index, padding), None, None, ct_factors


def _ct_weight(b: Builder, ct_rows: Value, weight: Value, index: Value, padding: int | None) -> Value:
    return b.emit("embedding_backward", ct_rows, index, num_weights=weight.type.shape[0], padding_idx=padding)


def _axes(node: Node) -> Axes:
    """Columns are independent."""
    rest = ((None,),) * (len(node.inputs) - 1)
    return Axes(((None, "e"), *rest), ((None, "e"),) * len(node.outputs))


def _lower(node: Node, args: Sequence[str]) -> str:
    weight, index, offsets, factors = (*args, "None")[:4]
    padding = -1 if node.attrs["padding_idx"] is None else node.attrs["padding_idx"]
    mode = MODES.index(node.attrs["mode"])
    return f"kernels.embedding_bag({weight}, {index}, {offsets}, {factors}, mode={mode}, padding_idx={padding})"


def _import(
    b: Builder,
    weight: Value,
    index: Value,
    offsets: Value,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    factors: Value | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Value | None, ...]:
    if sparse:
        raise TypeRuleError("an embedding_bag with dense gradients is required, got sparse=True")
    if scale_grad_by_freq and MODES[mode] != "max":
        weight = average_row_gradients(b, weight, index)
    if index.type.dtype != offsets.type.dtype:
        index, offsets = cast(b, index, "i64"), cast(b, offsets, "i64")
    if include_last_offset:
        offsets = slice_dim(b, offsets, 0, 0, offsets.type.shape[0] - 1)
    given = [] if factors is None else [cast(b, factors, weight.type.dtype)]
    attrs = {"mode": MODES[mode], "padding_idx": padding_idx}
    return (b.emit_many("embedding_bag", weight, index, offsets, *given, **attrs)[0], None, None, None)


def _import_low(b: Builder, *args: Any, padding_idx: int = -1) -> tuple[Value | None, ...]:
    """``_embedding_bag``, for which -1 is no padding; ``embedding_bag`` counts it from the end."""
    *given, padding_idx = args if len(args) == 9 else (*args, padding_idx)
    return _import(b, *given, padding_idx=padding_idx if padding_idx >= 0 else None)


def _import_bag(b: Builder, weight: Value, *args: Any) -> tuple[Value | None, ...]:
    *given, padding_idx = args if len(args) == 8 else (*args, None)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.type.shape[0]
    return _import(b, weight, *given, padding_idx=padding_idx)


_INDEX, _OFFSETS = Arg(t(4, dtype="i64"), "index:3"), Arg(t(2, dtype="i64"), "index:1")
_WEIGHT, _FACTORS = Arg(t(3, 2), "distinct"), Arg(t(4))

register(
    OpDef(
        name="embedding_bag",
        infer=_infer,
        evaluate=_evaluate,
        vjp=_vjp,
        cost=elementwise_cost(2),
        axes=_axes,
        lower=_lower,
        aten={
            **dict.fromkeys(("embedding_bag.default", "embedding_bag.padding_idx"), _import_bag),
            **dict.fromkeys(("_embedding_bag.default", "_embedding_bag_forward_only.default"), _import_low),
        },
        samples=(
            Sample((_WEIGHT, _INDEX, _OFFSETS, _FACTORS), {"mode": "sum", "padding_idx": None}),
            Sample((_WEIGHT, _INDEX, _OFFSETS), {"mode": "mean", "padding_idx": None}),
            Sample((_WEIGHT, _INDEX, _OFFSETS), {"mode": "max", "padding_idx": None}),
            Sample((_WEIGHT, _INDEX, _OFFSETS), {"mode": "mean", "padding_idx": 1}),
        ),
    )
)
