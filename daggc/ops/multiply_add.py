"""Products and quotients added to a tensor, and linear interpolation: one kernel each in torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import broadcast_together, cast, kind, mul, neg, result_dtype, scale, sub
from daggc.ops.elementwise import weak
from daggc.ops.opdef import (
    HOLOMORPHIC,
    Importer,
    Infer,
    OpDef,
    elementwise_cost,
    register,
    require,
    same_axes,
    sample,
    scalar,
    upcast,
)


def _infer(count: int, kinds: str, value: str | None) -> Infer:
    def infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        require(len(inputs) == count, f"{count} inputs are required, got {len(inputs)}")
        require(len(set(inputs)) == 1, "inputs of one type are required (cast and broadcast are ops)")
        (x, *_) = inputs
        require(kind(x.dtype) in kinds, f"a {'number' if 'i' in kinds else 'float'} tensor is required, got {x}")
        if value is not None:
            number = attrs[value]
            fits = (
                type(number) is int
                or (type(number) is float and x.differentiable)
                or (type(number) is complex and x.is_complex)
            )
            require(fits, f"{value} is a number of the kind of {x.dtype}, got {number!r}")
        return (x,)

    return infer


def _importer(op: str, to_float: bool = False) -> Importer:
    def importer(b: Builder, *operands: Value, value: float = 1) -> Value:
        dtype = result_dtype(*operands)
        if to_float and kind(dtype) in "bi":
            raise NotImplementedError("torch refuses to divide integers here")
        return b.emit(op, *broadcast_together(b, *(cast(b, x, dtype) for x in operands)), value=value)

    return importer


def _addcmul(node: Node, x: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return x + weak(node.attrs["value"], x.dtype) * first * second


def _addcmul_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,), (_, first, second), value = cts, node.inputs, node.attrs["value"]
    assert ct is not None
    return ct, mul(b, ct, scale(b, second, value)), mul(b, ct, scale(b, first, value))


def _addcdiv(node: Node, x: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return x + weak(node.attrs["value"], x.dtype) * first / second


def _addcdiv_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,), (_, first, second), value = cts, node.inputs, node.attrs["value"]
    assert ct is not None
    slope = b.emit("div", scale(b, first, value), mul(b, second, second))
    return ct, mul(b, ct, b.emit("rdiv_scalar", second, value=value)), mul(b, neg(b, ct), slope)


def _lerp(start: np.ndarray, end: np.ndarray, weight: Any) -> np.ndarray:
    """From the nearer end, as torch does."""
    return np.where(np.abs(weight) < 0.5, start + weight * (end - start), end - (end - start) * (1 - weight))


def _lerp_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,), (start, end, weight) = cts, node.inputs
    assert ct is not None
    rest = b.emit("add_scalar", neg(b, weight), value=1.0)
    return mul(b, ct, rest), mul(b, ct, weight), mul(b, ct, sub(b, end, start))


def _lerp_scalar_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,), weight = cts, node.attrs["weight"]
    assert ct is not None
    return scale(b, ct, 1 - weight), scale(b, ct, weight)


def _import_lerp(b: Builder, start: Value, end: Value, weight: Value | float) -> Value:
    if isinstance(weight, Value):
        return b.emit("lerp", *broadcast_together(b, start, end, cast(b, weight, start.type.dtype)))
    if isinstance(weight, complex):
        raise NotImplementedError("lerp by a complex number")
    return b.emit("lerp_scalar", *broadcast_together(b, start, end), weight=weight)


for _name, _function, _vjp, _kinds in (
    ("addcmul", _addcmul, _addcmul_vjp, "ifc"),
    ("addcdiv", _addcdiv, _addcdiv_vjp, "fc"),
):
    register(
        OpDef(
            name=_name,
            infer=_infer(3, _kinds, "value"),
            evaluate=upcast(_function),
            vjp=_vjp,
            complex=HOLOMORPHIC,
            cost=elementwise_cost(3),
            axes=same_axes,
            lower=lambda node, args, name=_name: (
                f"torch.{name}({', '.join(args)}, value={scalar(node.attrs['value'])})"
            ),
            aten={f"{_name}.default": _importer(_name, to_float=_kinds == "fc")},
            samples=(sample((3, 4), (3, 4), (3, 4), domain="positive", value=0.5),),
        )
    )
register(
    OpDef(
        name="lerp",
        infer=_infer(3, "f", None),
        evaluate=upcast(lambda node, start, end, weight: _lerp(start, end, weight)),
        vjp=_lerp_vjp,
        cost=elementwise_cost(4),
        axes=same_axes,
        lower=lambda node, args: f"torch.lerp({', '.join(args)})",
        aten={"lerp.Tensor": _import_lerp},
        samples=(sample((3, 4), (3, 4), (3, 4)),),
    )
)
register(
    OpDef(
        name="lerp_scalar",
        infer=_infer(2, "f", "weight"),
        evaluate=upcast(lambda node, start, end: _lerp(start, end, weak(node.attrs["weight"], start.dtype))),
        vjp=_lerp_scalar_vjp,
        cost=elementwise_cost(4),
        axes=same_axes,
        lower=lambda node, args: f"torch.lerp({args[0]}, {args[1]}, {scalar(node.attrs['weight'])})",
        aten={"lerp.Scalar": _import_lerp},
        samples=(sample((3, 4), (3, 4), weight=0.3), sample((3, 4), (3, 4), weight=0.7)),
    )
)
