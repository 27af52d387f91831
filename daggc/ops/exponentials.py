"""Exponentials and logarithms of several operands, entropies, powers in double precision.

The derivatives are written as torch writes them, operation by operation, so that they are infinite, nan or zero in
the same places, and so are the derivatives of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import Operand, broadcast_together, cast, kind, mul, neg, result_dtype, scale, sub
from daggc.ops.elementwise import binary, floating, import_binary, keep, one_input, unary, where_zero
from daggc.ops.opdef import (
    NOT_DIFFERENTIABLE,
    VJP,
    Arg,
    OpDef,
    Sample,
    elementwise_cost,
    register,
    require,
    same_axes,
    sample,
    scalar,
    t,
    upcast,
)


def _plus(b: Builder, x: Value, value: float) -> Value:
    return b.emit("add_scalar", x, value=value)


# --- logarithms of sums -------------------------------------------------------------------------------


def _share_vjp(power: Callable[[Builder, Value], Value]) -> VJP:
    """Each operand gets the share ``1 / (1 + power(other - own))`` of the cotangent."""

    def vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
        (ct,), (x, y) = cts, node.inputs
        assert ct is not None
        first = b.emit("div", ct, _plus(b, power(b, sub(b, y, x)), 1.0))
        return first, b.emit("div", ct, _plus(b, power(b, sub(b, x, y)), 1.0))

    return vjp


for _name, _function, _power in (
    ("logaddexp", np.logaddexp, lambda b, x: b.emit("exp", x)),
    ("logaddexp2", np.logaddexp2, lambda b, x: b.emit("rpow_scalar", x, value=2.0)),
):
    binary(
        _name,
        _function,
        _share_vjp(_power),
        NOT_DIFFERENTIABLE,
        f"torch.{_name}({{0}}, {{1}})",
        flops=20,
        with_scalar=False,
        kinds="f",
        aten=(f"{_name}.default",),
        shapes=((3, 4),),
    )


# --- x log y ------------------------------------------------------------------------------------------


def _xlogy_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,), (x, y) = cts, node.inputs
    assert ct is not None
    gone = b.emit("logical_and", b.emit("eq_scalar", x, value=0.0), b.emit("le_scalar", y, value=0.0))
    first = where_zero(b, b.emit("logical_not", gone), b.emit("xlogy", ct, y))
    return first, b.emit("div", mul(b, ct, x), y)


def _xlog1py_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,), (x, y) = cts, node.inputs
    assert ct is not None
    gone = b.emit("logical_and", b.emit("eq_scalar", x, value=0.0), b.emit("le_scalar", y, value=-1.0))
    first = where_zero(b, b.emit("logical_not", gone), b.emit("xlog1py", ct, y))
    return first, b.emit("div", mul(b, ct, x), _plus(b, y, 1.0))


def _numpy_xlogy(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(y), np.nan, np.where(x == 0, 0, x * np.log(y)))


def _numpy_xlog1py(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(y), np.nan, np.where(x == 0, 0, x * np.log1p(y)))


binary(
    "xlogy",
    _numpy_xlogy,
    _xlogy_vjp,
    NOT_DIFFERENTIABLE,
    "torch.xlogy({0}, {1})",
    flops=10,
    domain="positive",
    with_scalar=False,
    kinds="f",
    operand_dtype=floating,
    aten=(
        *(f"xlogy.{overload}" for overload in ("Tensor", "Scalar_Self", "Scalar_Other")),
        *(f"special_xlogy.{overload}" for overload in ("default", "self_scalar", "other_scalar")),
    ),
    shapes=((3, 4),),
)
binary(
    "xlog1py",
    _numpy_xlog1py,
    _xlog1py_vjp,
    NOT_DIFFERENTIABLE,
    "torch.special.xlog1py({0}, {1})",
    flops=10,
    domain="positive",
    with_scalar=False,
    kinds="f",
    operand_dtype=floating,
    aten=tuple(f"special_xlog1py.{overload}" for overload in ("default", "self_scalar", "other_scalar")),
    shapes=((3, 4),),
)
unary(
    "entr",
    special.entr,
    lambda b, n, ct: mul(b, ct, neg(b, _plus(b, b.emit("log", n.inputs[0]), 1.0))),
    "torch.special.entr",
    flops=10,
    domain="positive",
    kinds="f",
    aten=("special_entr.default",),
    shapes=((3, 4),),
)
unary(
    "log10",
    np.log10,
    lambda b, n, ct: b.emit("div", ct, scale(b, n.inputs[0], math.log(10))),
    flops=8,
    domain="positive",
    shapes=((3, 4),),
)


# --- log odds -----------------------------------------------------------------------------------------


def _infer_logit(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    require(len(inputs) == 1 and inputs[0].is_float, "one float tensor is required")
    eps = attrs["eps"]
    require(eps is None or (isinstance(eps, int | float) and not isinstance(eps, bool)), f"eps is a number, got {eps}")
    return (inputs[0],)


def _evaluate_logit(node: Node, x: np.ndarray) -> np.ndarray:
    eps = node.attrs["eps"]
    if eps is not None:
        x = np.clip(x, x.dtype.type(eps), x.dtype.type(1 - eps))
    return np.log(x / (1 - x))


def _logit_rule(b: Builder, node: Node, ct: Value) -> Value:
    """Nan outside of [0, 1]; with ``eps``, zero outside of ``[eps, 1 - eps]``."""
    (x,), eps = node.inputs, node.attrs["eps"]
    low, high = (0.0, 1.0) if eps is None else (eps, 1.0 - eps)
    inside = b.emit("logical_and", b.emit("ge_scalar", x, value=low), b.emit("le_scalar", x, value=high))
    slope = b.emit("div", ct, mul(b, x, _plus(b, neg(b, x), 1.0)))
    return b.emit("where_scalar", inside, slope, value=float("nan") if eps is None else 0.0)


def _import_logit(b: Builder, x: Value, eps: float | None = None) -> Value:
    return b.emit("logit", x if x.type.differentiable else cast(b, x, "f32"), eps=None if eps is None else float(eps))


def _lower_logit(node: Node, args: Sequence[str]) -> str:
    eps = node.attrs["eps"]
    return f"torch.logit({args[0]}, {'None' if eps is None else scalar(eps)})"


register(
    OpDef(
        name="logit",
        infer=_infer_logit,
        evaluate=upcast(_evaluate_logit),
        vjp=one_input(_logit_rule),
        cost=elementwise_cost(10),
        axes=same_axes,
        lower=_lower_logit,
        aten={"logit.default": _import_logit, "special_logit.default": _import_logit},
        samples=(sample((3, 4), domain="unit", eps=None), sample((3, 4), domain="unit", eps=0.01)),
    )
)


# --- powers -------------------------------------------------------------------------------------------


def _import_float_power(b: Builder, x: Operand, y: Operand, **_: Any) -> Value:
    """``pow`` in double precision, whatever the operands."""
    wide = [
        cast(b, item, "c128" if kind(item.type.dtype) == "c" else "f64")
        if isinstance(item, Value)
        else (item if isinstance(item, complex) else float(item))
        for item in (x, y)
    ]
    return import_binary("pow", keep, commutes=False)(b, *wide)


def _infer_ldexp(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    require(len(inputs) == 2, f"two inputs are required, got {len(inputs)}")
    x, exponent = inputs
    require(x.is_float and exponent.is_integer, f"a float and an integer tensor are required, got {x} and {exponent}")
    require(x.shape == exponent.shape, "inputs of one shape are required")
    return (x,)


def _ldexp_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    """torch takes the power of two in integers, so that the slope at negative exponents is zero; so it is here."""
    (ct,), (x, exponent) = cts, node.inputs
    assert ct is not None
    power = b.emit("rpow_scalar", exponent, value=2)
    return mul(b, ct, cast(b, power, x.type.dtype)), None


def _import_ldexp(b: Builder, x: Value, exponent: Value) -> Value:
    """Exponents that are floats are those of a product with a power of two."""
    dtype = floating(result_dtype(x, exponent))
    x = cast(b, x, dtype)
    if kind(exponent.type.dtype) != "i":
        power = b.emit("rpow_scalar", cast(b, exponent, dtype), value=2.0)
        return import_binary("mul", keep, commutes=True)(b, x, power)
    return b.emit("ldexp", *broadcast_together(b, x, exponent))


register(
    OpDef(
        name="ldexp",
        infer=_infer_ldexp,
        evaluate=upcast(lambda node, x, exponent: np.ldexp(x, exponent.astype(np.int64))),
        vjp=_ldexp_vjp,
        cost=elementwise_cost(2),
        axes=same_axes,
        lower=lambda node, args: f"torch.ldexp({args[0]}, {args[1]})",
        aten={
            "ldexp.Tensor": _import_ldexp,
            **dict.fromkeys(
                ("float_power.Tensor_Tensor", "float_power.Tensor_Scalar", "float_power.Scalar"), _import_float_power
            ),
        },
        samples=(Sample((Arg(t(3, 4)), Arg(t(3, 4, dtype="i64"), "index:4"))),),
    )
)
