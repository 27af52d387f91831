"""What looks at numbers as they are represented: their sign, fraction, exponent, neighbours, and which are finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import Operand, broadcast_together, cast, full, kind, mul, result_dtype, sub
from daggc.ops.elementwise import binary, floating, one_input, unary, where_zero
from daggc.ops.opdef import (
    NOT_DIFFERENTIABLE,
    OpDef,
    elementwise_cost,
    register,
    require,
    same_axes,
    sample,
    scalar,
)

_INF = float("inf")


# --- signs and neighbours -----------------------------------------------------------------------------


def _signbit(x: np.ndarray) -> np.ndarray:
    return np.signbit(x) if x.dtype.kind in "fV" else x < np.zeros((), x.dtype)


def _copysign_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    """The ratio of result and magnitude; zero for a magnitude of zero. A sign has no slope."""
    (ct,), (x, y) = cts, node.inputs
    assert ct is not None
    ratio = where_zero(b, b.emit("ne_scalar", x, value=0.0), b.emit("div", node.output, x))
    return mul(b, ct, ratio), full(b, 0.0, y.type.shape, y.type.dtype)


def _nextafter_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,), (x, y) = cts, node.inputs
    assert ct is not None
    return where_zero(b, b.emit("ne", x, y), ct), full(b, 0.0, y.type.shape, y.type.dtype)


unary("signbit", _signbit, NOT_DIFFERENTIABLE, predicate=True, to_float=False, kinds="bif", shapes=((3, 4),))
binary(
    "copysign",
    np.copysign,
    _copysign_vjp,
    NOT_DIFFERENTIABLE,
    "torch.copysign({0}, {1})",
    domain="nonzero",
    with_scalar=False,
    kinds="f",
    operand_dtype=floating,
    aten=("copysign.Tensor", "copysign.Scalar"),
    shapes=((3, 4),),
)
binary(
    "nextafter",
    np.nextafter,
    _nextafter_vjp,
    NOT_DIFFERENTIABLE,
    "torch.nextafter({0}, {1})",
    with_scalar=False,
    kinds="f",
    half=False,
    aten=("nextafter.default",),
    shapes=((3, 4),),
)


# --- mantissa and exponent ----------------------------------------------------------------------------


def _infer_frexp(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    require(len(inputs) == 1 and inputs[0].is_float, "one float tensor is required")
    return inputs[0], inputs[0].with_(dtype="i32")


def _evaluate_frexp(node: Node, x: np.ndarray) -> tuple[np.ndarray, ...]:
    mantissa, exponent = np.frexp(x.astype(np.float64))  # exact
    return mantissa.astype(x.dtype), exponent.astype(np.int32)


def _frexp_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    ct, exponent = cts[0], node.outputs[1]
    if ct is None:
        return (None,)
    # torch takes the power of an i32 tensor: in f32, whatever x is
    power = b.emit("exp2", cast(b, exponent, "f32"))
    return (b.emit("div", ct, cast(b, power, ct.type.dtype)),)


def _import_frac(b: Builder, x: Value) -> Value:
    return sub(b, x, b.emit("trunc", x))


register(
    OpDef(
        name="frexp",
        infer=_infer_frexp,
        evaluate=_evaluate_frexp,
        vjp=_frexp_vjp,
        cost=elementwise_cost(2),
        axes=same_axes,
        lower=lambda node, args: f"torch.frexp({args[0]})",
        aten={"frexp.Tensor": lambda b, x: b.emit_many("frexp", x), "frac.default": _import_frac},
        samples=(sample((3, 4), domain="positive"),),
    )
)


# --- finite or not ------------------------------------------------------------------------------------


def _infer_nan_to_num(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    require(len(inputs) == 1 and inputs[0].is_float, "one float tensor is required")
    for name in ("nan", "posinf", "neginf"):
        value = attrs[name]
        require(value is None or type(value) in (int, float), f"{name} is a number or None, got {value!r}")
    return (inputs[0],)


def _evaluate_nan_to_num(node: Node, x: np.ndarray) -> np.ndarray:
    attrs, limits = node.attrs, ml_dtypes.finfo(x.dtype)
    nan = 0.0 if attrs["nan"] is None else attrs["nan"]
    high = limits.max if attrs["posinf"] is None else attrs["posinf"]
    low = limits.min if attrs["neginf"] is None else attrs["neginf"]
    kinds = [np.isnan(x), x == _INF, x == -_INF]
    return np.select(kinds, [np.asarray(value).astype(x.dtype) for value in (nan, high, low)], x)


def _nan_to_num_rule(b: Builder, node: Node, ct: Value) -> Value:
    finite = _import_isfinite(b, node.inputs[0])
    return mul(b, ct, cast(b, finite, ct.type.dtype))


def _import_nan_to_num(
    b: Builder, x: Value, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Value:
    return b.emit("nan_to_num", x, nan=nan, posinf=posinf, neginf=neginf) if x.type.is_float else x


def _all(b: Builder, x: Value, value: bool) -> Value:
    return full(b, value, x.type.shape, "bool")


def _import_isfinite(b: Builder, x: Value) -> Value:
    """Nan is not less than infinity."""
    if kind(x.type.dtype) in "bi":
        return _all(b, x, True)
    if not x.type.is_float:
        raise NotImplementedError("isfinite of complex numbers")
    return b.emit("lt_scalar", b.emit("abs", x), value=_INF)


def _import_is_infinite(sign: int) -> Any:
    def importer(b: Builder, x: Value) -> Value:
        return b.emit("eq_scalar", x, value=sign * _INF) if x.type.is_float else _all(b, x, False)

    return importer


def _import_isclose(
    b: Builder, x: Value, y: Value, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> Value:
    """``x == y``, or a finite difference of at most ``atol + |rtol y|``; integers are compared in the default float."""
    if x.type.is_complex:
        raise NotImplementedError("isclose of complex numbers")
    x, y = broadcast_together(b, x, y)
    close = b.emit("eq", x, y)
    if equal_nan and x.type.is_float:
        close = b.emit("logical_or", close, b.emit("logical_and", b.emit("isnan", x), b.emit("isnan", y)))
    if rtol == 0 and atol == 0:
        return close
    if not x.type.is_float:
        x, y = cast(b, x, "f32"), cast(b, y, "f32")
    allowed = b.emit("add_scalar", b.emit("abs", b.emit("mul_scalar", y, value=float(rtol))), value=float(atol))
    error = b.emit("abs", sub(b, x, y))
    near = b.emit("logical_and", _import_isfinite(b, error), b.emit("le", error, allowed))
    return b.emit("logical_or", close, near)


def _import_heaviside(b: Builder, x: Value, values: Operand) -> Value:
    """``values`` at zero, 0 below and at nan, 1 above."""
    dtype = result_dtype(x, values)
    assert isinstance(values, Value)
    x, values = broadcast_together(b, cast(b, x, dtype), cast(b, values, dtype))
    zero = 0.0 if x.type.differentiable else 0
    step = cast(b, b.emit("gt_scalar", x, value=zero), dtype)
    return b.emit("where", b.emit("eq_scalar", x, value=zero), values, step)


def _lower_nan_to_num(node: Node, args: Sequence[str]) -> str:
    given = (node.attrs[name] for name in ("nan", "posinf", "neginf"))
    return f"torch.nan_to_num({args[0]}, {', '.join('None' if v is None else scalar(v) for v in given)})"


register(
    OpDef(
        name="nan_to_num",
        infer=_infer_nan_to_num,
        evaluate=_evaluate_nan_to_num,
        vjp=one_input(_nan_to_num_rule),
        cost=elementwise_cost(3),
        axes=same_axes,
        lower=_lower_nan_to_num,
        aten={
            "nan_to_num.default": _import_nan_to_num,
            "isfinite.default": _import_isfinite,
            "isposinf.default": _import_is_infinite(1),
            "isneginf.default": _import_is_infinite(-1),
            "isclose.default": _import_isclose,
            "heaviside.default": _import_heaviside,
        },
        samples=(
            sample((3, 4), nan=None, posinf=None, neginf=None),
            sample((3, 4), nan=1.5, posinf=2.0, neginf=-3.0),
        ),
    )
)
