"""Arithmetic of two operands, element by element; inputs have one shape and one dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ops.build import (
    Operand,
    cast,
    mul,
    neg,
    result_dtype,
    scale,
    zeros_like,
)
from daggc.ops.complex_numbers import real
from daggc.ops.elementwise import (
    binary,
    floating,
    import_binary,
    keep,
    piecewise_constant,
    register_scalar,
    where_zero,
)
from daggc.ops.opdef import (
    VJP,
    Importer,
)


def _extremum_vjp(wins: str) -> VJP:
    """Ties share the cotangent in halves, as in torch."""

    def vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
        (ct,), (x, y) = cts, node.inputs
        assert ct is not None
        share = b.emit("where", b.emit("eq", x, y), scale(b, ct, 0.5), ct)
        first = where_zero(b, b.emit("logical_not", b.emit(wins, y, x)), share)
        second = where_zero(b, b.emit("logical_not", b.emit(wins, x, y)), share)
        return first, second

    return vjp


def _add_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    return cts[0], cts[0]


def _sub_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,) = cts
    assert ct is not None
    return ct, neg(b, ct)


def _mul_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,), (x, y) = cts, node.inputs
    assert ct is not None
    return mul(b, ct, y), mul(b, ct, x)


def _div_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,), y = cts, node.inputs[1]
    assert ct is not None
    return b.emit("div", ct, y), neg(b, mul(b, ct, b.emit("div", node.output, y)))


def _not_negative(b: Builder, x: Value) -> Value:
    """Where numbers are real and not negative."""
    result = b.emit("ge_scalar", real(b, x), value=0)
    is_real = b.emit("eq_scalar", b.emit("imag", x), value=0) if x.type.is_complex else None
    return result if is_real is None else b.emit("logical_and", result, is_real)


def _power(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """NumPy refuses negative powers of integers; torch rounds 1 / x ** n towards zero."""
    kind_of = np.result_type(x, y).kind
    if kind_of == "c":
        return _complex_power(x, y)
    if kind_of != "i":
        return np.power(x, y)
    inverse = np.where(np.abs(x) == 1, np.power(x, np.abs(y)), np.zeros_like(x))
    return np.where(y < 0, inverse, np.power(x, np.maximum(y, 0)))


_MULTIPLIED = (0, 1, 2, 3, -0.5, -1, -2)  # exponents that torch takes for products and quotients


def _complex_power(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """As torch has it: a tensor as exponent gives exp(y log x), so 0 ** 0 is nan; the number 0 as exponent gives 1."""
    if isinstance(y, np.generic) and y in _MULTIPLIED:
        return np.where((x == 0) & (np.real(y) < 0), complex(np.inf, np.nan), np.power(x, y))
    if isinstance(y, np.generic) and y == 0.5:
        return np.sqrt(x)
    return np.exp(_c_product(y, np.log(x)))


def _c_product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The product of complex numbers as C has it (Annex G): of an infinity it is infinite, even where a part is nan."""
    product = np.asarray(x * y)
    parts = np.real(product), np.imag(product)
    infinite_x, infinite_y = np.isinf(x), np.isinf(y)
    lost = np.isnan(parts[0]) & np.isnan(parts[1]) & (infinite_x | infinite_y)
    (a, b), (c, d) = _limits(x, infinite_x), _limits(y, infinite_y)
    limits = np.inf * (a * c - b * d), np.inf * (a * d + b * c)
    kept = [np.where(lost, limit, part) for limit, part in zip(limits, parts, strict=True)]
    return np.stack(kept, axis=-1).view(product.dtype)[..., 0]


def _limits(z: np.ndarray, infinite: np.ndarray) -> list[np.ndarray]:
    """Both parts: of an infinite number 1 where they are infinite, else 0, with their signs; 0 for nan."""
    parts = [np.where(np.isnan(part), np.copysign(0, part), part) for part in (np.real(z), np.imag(z))]
    return [np.where(infinite, np.copysign(np.isinf(part), part), part) for part in parts]


def _pow_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    """torch's pow_backward: zero where the exponent is zero, and for 0 ** y with y >= 0."""
    (ct,), (x, y) = cts, node.inputs
    assert ct is not None
    slope = mul(b, y, b.emit("pow", x, b.emit("add_scalar", y, value=-1)))
    first = where_zero(b, b.emit("ne_scalar", y, value=0), mul(b, ct, slope))
    zero = b.emit("logical_and", b.emit("eq_scalar", x, value=0), _not_negative(b, y))
    log = where_zero(b, b.emit("logical_not", zero), mul(b, node.output, b.emit("log", x)))
    return first, mul(b, ct, log)


def _pow_scalar_vjp(b: Builder, node: Node, ct: Value) -> Value:
    exponent = node.attrs["value"]
    if exponent == 0:
        return zeros_like(b, node.inputs[0])
    return mul(b, ct, scale(b, b.emit("pow_scalar", node.inputs[0], value=exponent - 1), exponent))


def _remainder_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,) = cts
    assert ct is not None
    return ct, neg(b, mul(b, ct, b.emit("floor_divide", *node.inputs)))


def _rpow_scalar_vjp(b: Builder, node: Node, ct: Value) -> Value:
    base, (x,) = node.attrs["value"], node.inputs
    if x.type.is_complex:
        log = complex(np.log(complex(base))) if base else complex("-inf")
        slope = mul(b, ct, scale(b, node.output, log))
        return slope if base else where_zero(b, b.emit("logical_not", _not_negative(b, x)), slope)
    if base == 0:  # zero where the exponent is not negative, as in torch
        slope = scale(b, node.output, float("-inf"))
        return mul(b, ct, where_zero(b, b.emit("logical_not", b.emit("ge_scalar", x, value=0)), slope))
    return mul(b, ct, scale(b, node.output, float(np.log(base)) if base > 0 else float("nan")))


def _above(b: Builder, node: Node, ct: Value) -> Value:
    return where_zero(b, b.emit("ge_scalar", node.inputs[0], value=node.attrs["value"]), ct)


def _below(b: Builder, node: Node, ct: Value) -> Value:
    return where_zero(b, b.emit("le_scalar", node.inputs[0], value=node.attrs["value"]), ct)


def _import_scaled(op: str) -> Importer:
    """add and sub multiply their second operand by ``alpha`` first."""
    plain = import_binary(op, keep, commutes=True)

    def importer(b: Builder, x: Operand, y: Operand, *rest: Any, alpha: float = 1, **_: Any) -> Value:
        alpha = rest[0] if rest else alpha
        if alpha != 1:
            y = scale(b, cast(b, y, result_dtype(x, y)), alpha) if isinstance(y, Value) else y * alpha
        if op == "sub" and not isinstance(x, Value):
            assert isinstance(y, Value)
            return plain_add(b, neg(b, y), x)
        return plain(b, x, y)

    plain_add = import_binary("add", keep, commutes=True)
    return importer


def _import_rsub(b: Builder, x: Value, y: Operand, alpha: float = 1, **_: Any) -> Value:
    """``y - alpha * x``; the negation is exact, so nothing is rounded twice."""
    return _import_scaled("add")(b, neg(b, scale(b, x, alpha)), y)


binary(
    "add",
    np.add,
    _add_vjp,
    lambda b, n, ct: ct,
    "{0} + {1}",
    importers=dict.fromkeys(("add.Tensor", "add.Scalar"), _import_scaled("add")),
)
binary(
    "sub",
    np.subtract,
    _sub_vjp,
    lambda b, n, ct: ct,
    "{0} - {1}",
    kinds="ifc",
    importers={
        "sub.Tensor": _import_scaled("sub"),
        "sub.Scalar": _import_scaled("sub"),
        "rsub.Scalar": _import_rsub,
        "rsub.Tensor": _import_rsub,
    },
)
binary("mul", np.multiply, _mul_vjp, lambda b, n, ct: scale(b, ct, n.attrs["value"]), "{0} * {1}", commutes=True)
binary(
    "div",
    np.divide,
    _div_vjp,
    lambda b, n, ct: b.emit("div_scalar", ct, value=n.attrs["value"]),
    "{0} / {1}",
    domain="positive",
    kinds="fc",
    operand_dtype=floating,
)
binary(
    "pow",
    _power,
    _pow_vjp,
    _pow_scalar_vjp,
    "torch.pow({0}, {1})",
    flops=10,
    domain="positive",
    kinds="ifc",
    aten=("pow.Tensor_Tensor", "pow.Tensor_Scalar", "pow.Scalar"),
)
binary(
    "maximum",
    np.maximum,
    _extremum_vjp("gt"),
    _above,
    "torch.maximum({0}, {1})",
    aten=("maximum.default",),
    with_scalar=False,
    kinds="bif",
)
binary(
    "minimum",
    np.minimum,
    _extremum_vjp("lt"),
    _below,
    "torch.minimum({0}, {1})",
    aten=("minimum.default",),
    with_scalar=False,
    kinds="bif",
)
register_scalar("maximum", np.maximum, _above, "torch.clamp_min({0}, {1})", value=0.3, kinds="if")
register_scalar("minimum", np.minimum, _below, "torch.clamp_max({0}, {1})", value=0.3, kinds="if")
register_scalar(
    "div",
    lambda x, value: np.divide(value, x),
    lambda b, n, ct: neg(b, mul(b, ct, b.emit("div", n.output, n.inputs[0]))),
    "{1} / {0}",
    domain="positive",
    prefix="r",
    kinds="fc",
)
register_scalar(
    "pow",
    lambda x, value: _power(value, x),
    _rpow_scalar_vjp,
    "torch.pow({1}, {0})",
    flops=10,
    prefix="r",
    kinds="ifc",
)
binary(
    "floor_divide",
    np.floor_divide,
    lower="torch.floor_divide({0}, {1})",
    domain="positive",
    kinds="if",
    aten=("floor_divide.default", "floor_divide.Scalar"),
    vjp=piecewise_constant,
    scalar_vjp=piecewise_constant,
)
binary(
    "remainder",
    np.remainder,
    _remainder_vjp,
    lambda b, n, ct: ct,
    "torch.remainder({0}, {1})",
    domain="positive",
    kinds="if",
)
