"""Choice by a mask, and casts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import DTYPES, TensorType
from daggc.ops.build import (
    Operand,
    broadcast_together,
    cast,
    kind,
    reshape,
    result_dtype,
)
from daggc.ops.elementwise import (
    weak,
    where_zero,
)
from daggc.ops.opdef import (
    AS_IT_IS,
    Arg,
    OpDef,
    Sample,
    copy_cost,
    elementwise_cost,
    register,
    require,
    same_axes,
    sample,
    scalar,
    t,
    torch_dtype,
)


def _infer_where(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    mask, x, y = inputs
    require(mask.dtype == "bool" and mask.shape == x.shape, "a bool mask of the shape of the choices is required")
    require(x == y, "choices of one type are required")
    return (x,)


def _infer_where_scalar(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    mask, x = inputs
    value = attrs["value"]
    fits = isinstance(value, bool | int | float) or (isinstance(value, complex) and x.is_complex)
    require(fits, f"value is a number that {x} can hold, got {value!r}")
    fits = x.differentiable or isinstance(value, bool) or (type(value) is int and x.is_integer)
    require(fits, f"value={value!r} would change the dtype {x.dtype}; cast first")
    return _infer_where((mask, x, x), attrs)


def _where_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,), mask = cts, node.inputs[0]
    assert ct is not None
    return None, where_zero(b, mask, ct), where_zero(b, b.emit("logical_not", mask), ct)


def _where_scalar_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    assert cts[0] is not None
    return None, where_zero(b, node.inputs[0], cts[0])


def _import_where(b: Builder, mask: Value, x: Operand, y: Operand) -> Value:
    dtype = result_dtype(x, y)
    values = [
        cast(b, item, dtype) if isinstance(item, Value) else b.emit("full", value=item, shape=(), dtype=dtype)
        for item in (x, y)
    ]
    return b.emit("where", *broadcast_together(b, cast(b, mask, "bool"), *values))


def _import_masked_fill(b: Builder, x: Value, mask: Value, value: Operand) -> Value:
    """``masked_fill``: x where the mask does not hold, the value elsewhere, in x's dtype."""
    if isinstance(value, Value):
        return b.emit("where", *broadcast_together(b, mask, cast(b, value, x.type.dtype), x))
    mask, x = broadcast_together(b, mask, x)
    value = {"b": bool, "i": int, "f": float}.get(kind(x.type.dtype), complex)(value)
    return b.emit("where_scalar", b.emit("logical_not", mask), x, value=value)


def _import_masked_scatter(b: Builder, x: Value, mask: Value, source: Value) -> Value:
    """Where the mask holds, the elements of the source in turn: the n-th of them at the n-th place."""
    mask, x = broadcast_together(b, cast(b, mask, "bool"), x)
    if not source.type.numel or not x.type.numel:
        return x
    flat = reshape(b, mask, (mask.type.numel,))
    turn = b.emit("sub_scalar", b.emit("cumsum", cast(b, flat, "i64"), dim=0), value=1)
    turn = b.emit("where_scalar", flat, turn, value=0)
    taken = b.emit("index_select", reshape(b, source, (source.type.numel,)), turn, dim=0)
    return b.emit("where", mask, reshape(b, cast(b, taken, x.type.dtype), x.type.shape), x)


_MASK = Arg(t(3, 4, dtype="bool"), "bool")
_REAL = Arg(t(3, 4))
register(
    OpDef(
        name="where",
        infer=_infer_where,
        evaluate=lambda node, mask, x, y: np.where(mask, x, y),
        vjp=_where_vjp,
        complex=AS_IT_IS,
        cost=elementwise_cost(1),
        axes=same_axes,
        lower=lambda node, args: f"torch.where({', '.join(args)})",
        aten={
            "where.self": _import_where,
            "where.ScalarOther": _import_where,
            "where.ScalarSelf": _import_where,
            "masked_scatter.default": _import_masked_scatter,
        },
        samples=(Sample((_MASK, _REAL, _REAL)),),
    )
)
register(
    OpDef(
        name="where_scalar",
        infer=_infer_where_scalar,
        evaluate=lambda node, mask, x: np.where(mask, x, weak(node.attrs["value"], x.dtype)),
        vjp=_where_scalar_vjp,
        complex=AS_IT_IS,
        cost=elementwise_cost(1),
        axes=same_axes,
        lower=lambda node, args: f"torch.where({args[0]}, {args[1]}, {scalar(node.attrs['value'])})",
        aten={"masked_fill.Scalar": _import_masked_fill, "masked_fill.Tensor": _import_masked_fill},
        samples=(Sample((_MASK, _REAL), {"value": -1.5}),),
    )
)


def _infer_cast(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    return (x.with_(dtype=attrs["dtype"]),)


def _cast_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    assert cts[0] is not None
    return (cast(b, cts[0], node.inputs[0].type.dtype),)


def _evaluate_cast(node: Node, x: np.ndarray) -> np.ndarray:
    """Of complex numbers the real part, as torch has it; they are True unless both parts are zero."""
    y = node.output.type
    return (x if y.is_complex or y.dtype == "bool" else np.real(x)).astype(y.numpy_dtype)


def _lower_cast(node: Node, args: Sequence[str]) -> str:
    x, y = node.inputs[0].type, node.output.type
    part = ".real" if x.is_complex and not y.is_complex and y.dtype != "bool" else ""  # torch would warn
    return f"{args[0]}{part}.to({torch_dtype(y.dtype)})"


def _import_to(b: Builder, x: Value, *args: Any, dtype: str | None = None, **_: Any) -> Value:
    """``to``, ``_to_copy``, ``type_as``: the dtype, if one is given; devices are the planner's business."""
    for arg in (dtype, *args):
        if isinstance(arg, str) and arg in DTYPES:
            return cast(b, x, arg)
        if isinstance(arg, Value):
            return cast(b, x, arg.type.dtype)
    return x


register(
    OpDef(
        name="cast",
        infer=_infer_cast,
        evaluate=_evaluate_cast,
        vjp=_cast_vjp,
        complex=AS_IT_IS,
        cost=copy_cost,
        axes=same_axes,
        lower=_lower_cast,
        aten=dict.fromkeys(
            ("to.dtype", "to.dtype_layout", "to.device", "to.other", "_to_copy.default", "type_as.default"), _import_to
        ),
        samples=(
            sample((3, 4), dtype="f32"),
            sample((3, 4), dtype="bf16"),
            Sample((Arg(t(3, dtype="i64"), "small"),), {"dtype": "f64"}),
            sample((3, 4), dtype="c128"),
            Sample((Arg(t(3, 4, dtype="c128")),), {"dtype": "f64"}),
        ),
    )
)
