"""Looking for values: places in sorted rows, membership, the positions of what is not zero."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import Operand, Scalar, cast, full, promote_dtypes, reshape
from daggc.ops.histogram import import_histc, import_histogram, import_histogramdd
from daggc.ops.opdef import (
    NOT_DIFFERENTIABLE,
    Arg,
    Axes,
    Cost,
    OpDef,
    Sample,
    copy_cost,
    letters,
    node_bytes,
    register,
    require,
    t,
    whole,
)
from daggc.ops.order import wide
from daggc.ops.segments import import_repeat_interleave, import_repeats

# --- searchsorted -------------------------------------------------------------------------------------


def _infer_searchsorted(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    rows, x = inputs
    require(rows.dtype == x.dtype, f"values of one dtype are required, got {rows} and {x}")
    require(x.dtype != "bool" and not x.is_complex, f"numbers that have an order are required, got {x}")
    fits = rows.rank == 1 or (rows.rank == x.rank > 1 and rows.shape[:-1] == x.shape[:-1])
    require(fits, f"one sorted row, or one for each row of {x}, is required, got {rows}")
    require(isinstance(attrs["right"], bool), f"right must be a bool, got {attrs['right']!r}")
    return (x.with_(dtype="i64"),)


def _evaluate_searchsorted(node: Node, rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    side = "right" if node.attrs["right"] else "left"
    rows, x = wide(rows), wide(x)
    if rows.ndim == 1:
        return np.searchsorted(rows, x, side).astype(np.int64)
    result = np.zeros(x.shape, np.int64)
    for place in np.ndindex(x.shape[:-1]):
        result[place] = np.searchsorted(rows[place], x[place], side)
    return result


def _searchsorted_axes(node: Node) -> Axes:
    rows, x = (value.type for value in node.inputs)
    labels = letters(x.rank)
    return Axes(((None,) if rows.rank == 1 else (*labels[:-1], None), labels), (labels,))


def _find(b: Builder, rows: Value, x: Operand, right: bool, out_int32: bool) -> Value:
    values = x if isinstance(x, Value) else full(b, x, (), rows.type.dtype)
    return cast(b, b.emit("searchsorted", rows, values, right=right), "i32" if out_int32 else "i64")


def _import_searchsorted(
    b: Builder,
    rows: Value,
    x: Operand,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Value | None = None,
) -> Value:
    if sorter is not None:
        rows = b.emit("gather", rows, cast(b, sorter, "i64"), dim=rows.type.rank - 1)
    return _find(b, rows, x, right or side == "right", out_int32)


def _import_bucketize(b: Builder, x: Operand, edges: Value, *, out_int32: bool = False, right: bool = False) -> Value:
    return _find(b, edges, x, right, out_int32)


register(
    OpDef(
        name="searchsorted",
        infer=_infer_searchsorted,
        evaluate=_evaluate_searchsorted,
        vjp=NOT_DIFFERENTIABLE,
        cost=lambda node: Cost(10 * node.output.type.numel, node_bytes(node), "elementwise"),
        axes=_searchsorted_axes,
        lower=lambda node, args: (
            f"torch.searchsorted({args[0]}.contiguous(), {args[1]}.contiguous(), right={node.attrs['right']})"
        ),
        aten={
            **dict.fromkeys(("searchsorted.Tensor", "searchsorted.Scalar"), _import_searchsorted),
            **dict.fromkeys(("bucketize.Tensor", "bucketize.Scalar"), _import_bucketize),
            "histc.default": import_histc,
            "repeat_interleave.Tensor": import_repeats,
            "repeat_interleave.self_Tensor": import_repeat_interleave,
            **dict.fromkeys(("histogram.bin_ct", "histogram.bins_tensor"), import_histogram),
            **{f"histogramdd.{form}": import_histogramdd for form in ("default", "int_bins", "TensorList_bins")},
        },
        # The rows of samples are not in order: some place is found all the same, by the same comparisons.
        samples=(
            Sample((Arg(t(1)), Arg(t(3, 4))), {"right": False}),
            Sample((Arg(t(2, 1, dtype="i64"), "small"), Arg(t(2, 5, dtype="i64"), "small")), {"right": True}),
        ),
    )
)

# --- isin ---------------------------------------------------------------------------------------------


def _infer_isin(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, others = inputs
    require(x.dtype == others.dtype, f"values of one dtype are required, got {x} and {others}")
    require(x.dtype != "bool" and not x.is_complex, f"integers or floats are required, got {x}")
    return (x.with_(dtype="bool"),)


def _import_isin(
    b: Builder, x: Value | Scalar, others: Value | Scalar, *, assume_unique: bool = False, invert: bool = False
) -> Value:
    if not isinstance(others, Value):
        assert isinstance(x, Value), "one operand is a tensor"
        found = b.emit("eq_scalar", x, value=others)
    else:
        x = x if isinstance(x, Value) else full(b, x, (), others.type.dtype)
        dtype = promote_dtypes(x.type.dtype, others.type.dtype)
        found = b.emit("isin", cast(b, x, dtype), reshape(b, cast(b, others, dtype), (others.type.numel,)))
    return b.emit("logical_not", found) if invert else found


def _isin_axes(node: Node) -> Axes:
    x, others = (value.type for value in node.inputs)
    return Axes((letters(x.rank), (None,) * others.rank), (letters(x.rank),))


register(
    OpDef(
        name="isin",
        infer=_infer_isin,
        evaluate=lambda node, x, others: np.isin(wide(x), wide(others)),
        vjp=NOT_DIFFERENTIABLE,
        cost=lambda node: Cost(10 * node.output.type.numel, node_bytes(node), "elementwise"),
        axes=_isin_axes,
        lower=lambda node, args: f"torch.isin({args[0]}, {args[1]})",
        aten=dict.fromkeys(("isin.Tensor_Tensor", "isin.Tensor_Scalar", "isin.Scalar_Tensor"), _import_isin),
        samples=(Sample((Arg(t(3, 4, dtype="i64"), "small"), Arg(t(3, dtype="i64"), "small"))),),
    )
)

# --- nonzero_static -----------------------------------------------------------------------------------


def _infer_nonzero(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,), size, fill = inputs, attrs["size"], attrs["fill"]
    require(type(size) is int and size >= 0, f"size must be a number of rows, got {size!r}")
    require(type(fill) is int, f"fill must be an integer, got {fill!r}")
    return (TensorType("i64", (size, x.rank)),)


def _evaluate_nonzero(node: Node, x: np.ndarray) -> np.ndarray:
    found = np.argwhere(x != 0)[: node.attrs["size"]]
    result = np.full(node.output.type.shape, node.attrs["fill"], np.int64)
    result[: len(found)] = found
    return result


def _import_nonzero(b: Builder, x: Value) -> Value:
    """Of nothing, nothing; anything else has a shape that depends on data."""
    if x.type.numel:
        raise NotImplementedError("nonzero gives a tensor of data-dependent shape")
    return full(b, 0, (0, x.type.rank), "i64")


def _import_nonzero_by_axis(b: Builder, x: Value) -> tuple[Value, ...]:
    if x.type.numel:
        raise NotImplementedError("nonzero gives tensors of data-dependent shape")
    return tuple(full(b, 0, (0,), "i64") for _ in range(x.type.rank))


register(
    OpDef(
        name="nonzero_static",
        infer=_infer_nonzero,
        evaluate=_evaluate_nonzero,
        vjp=NOT_DIFFERENTIABLE,
        cost=copy_cost,
        axes=whole,
        lower=lambda node, args: (
            f"torch.nonzero_static({args[0]}, size={node.attrs['size']}, fill_value={node.attrs['fill']})"
        ),
        aten={
            "nonzero_static.default": lambda b, x, *, size, fill_value=-1: b.emit(
                "nonzero_static", x, size=size, fill=fill_value
            ),
            **dict.fromkeys(("nonzero.default", "argwhere.default"), _import_nonzero),
            "nonzero_numpy.default": _import_nonzero_by_axis,
        },
        samples=(
            Sample((Arg(t(3, 4, dtype="bool"), "bool"),), {"size": 15, "fill": -1}),
            Sample((Arg(t(5, dtype="i64"), "small"),), {"size": 2, "fill": 0}),
        ),
    )
)
