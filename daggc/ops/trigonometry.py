"""Inverse trigonometric and hyperbolic functions, angles and distances of real numbers.

The derivatives are written as torch writes them, operation by operation, so that they are infinite, nan or zero in
the same places, and so are the derivatives of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ops.build import full, mul, neg, scale, sub
from daggc.ops.elementwise import binary, floating, import_binary, unary, where_zero
from daggc.ops.opdef import NOT_DIFFERENTIABLE, Importer


def _plus(b: Builder, x: Value, value: float) -> Value:
    return b.emit("add_scalar", x, value=value)


def _square(b: Builder, x: Value) -> Value:
    return mul(b, x, x)


def _over_root(inside: Callable[[Builder, Value], Value], sign: int = 1) -> Callable[[Builder, Node, Value], Value]:
    """The rule of functions whose slope is ``sign / sqrt(inside(x))``."""

    def rule(b: Builder, node: Node, ct: Value) -> Value:
        slope = b.emit("rsqrt", inside(b, node.inputs[0]))
        return mul(b, ct, slope if sign > 0 else neg(b, slope))

    return rule


def _acosh_rule(b: Builder, node: Node, ct: Value) -> Value:
    """Of complex numbers, the root of a product is not the product of the roots."""
    (x,) = node.inputs
    if not x.type.is_complex:
        return mul(b, ct, b.emit("rsqrt", _plus(b, _square(b, x), -1.0)))
    return mul(b, ct, mul(b, b.emit("rsqrt", _plus(b, x, 1.0)), b.emit("rsqrt", _plus(b, x, -1.0))))


def _below_one(b: Builder, x: Value) -> Value:
    return _plus(b, mul(b, neg(b, x), x), 1.0)


def _atan2_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    """Zero at the origin, which has no angle."""
    (ct,), (y, x) = cts, node.inputs
    assert ct is not None
    square = b.emit("add", _square(b, y), _square(b, x))
    inverse = where_zero(b, b.emit("ne_scalar", square, value=0.0), b.emit("reciprocal", square))
    return mul(b, mul(b, ct, x), inverse), mul(b, mul(b, ct, neg(b, y)), inverse)


def _hypot_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,), (x, y) = cts, node.inputs
    assert ct is not None
    return b.emit("div", mul(b, ct, x), node.output), b.emit("div", mul(b, ct, y), node.output)


def _sinc_vjp(b: Builder, node: Node, ct: Value) -> Value:
    """``(a cos(a) - sin(a)) / (pi x ** 2)`` with ``a = pi x``, and zero at zero."""
    x = node.inputs[0]
    angle, square = scale(b, x, math.pi), scale(b, _square(b, x), math.pi)
    slope = b.emit("div", sub(b, mul(b, angle, b.emit("cos", angle)), b.emit("sin", angle)), square)
    zero = full(b, 0.0, x.type.shape, x.type.dtype)
    return b.emit("where", b.emit("eq_scalar", square, value=0.0), zero, mul(b, ct, slope))


def _import_scaled(factor: float) -> Importer:
    def importer(b: Builder, x: Value) -> Value:
        return scale(b, x if x.type.differentiable else b.emit("cast", x, dtype="f32"), factor)

    return importer


unary("asin", np.arcsin, _over_root(_below_one), flops=8, domain="unit", shapes=((3, 4),))
unary("acos", np.arccos, _over_root(_below_one, -1), flops=8, domain="unit", shapes=((3, 4),))
unary("asinh", np.arcsinh, _over_root(lambda b, x: _plus(b, _square(b, x), 1.0)), flops=8, shapes=((3, 4),))
unary(
    "acosh",
    np.arccosh,
    _acosh_rule,
    flops=8,
    domain="large",
    shapes=((3, 4),),
)
unary(
    "atanh",
    np.arctanh,
    lambda b, n, ct: b.emit("div", ct, _plus(b, neg(b, _square(b, n.inputs[0])), 1.0)),
    flops=8,
    domain="unit",
    shapes=((3, 4),),
)
unary("sinc", np.sinc, _sinc_vjp, flops=10, domain="nonzero", kinds="f", shapes=((3, 4),))
binary(
    "atan2",
    np.arctan2,
    _atan2_vjp,
    NOT_DIFFERENTIABLE,
    "torch.atan2({0}, {1})",
    flops=10,
    domain="nonzero",
    with_scalar=False,
    kinds="f",
    importers={
        "atan2.default": import_binary("atan2", floating, commutes=False, with_scalar=False),
        "deg2rad.default": _import_scaled(math.pi / 180),
        "rad2deg.default": _import_scaled(180 / math.pi),
    },
    shapes=((3, 4),),
)
binary(
    "hypot",
    np.hypot,
    _hypot_vjp,
    NOT_DIFFERENTIABLE,
    "torch.hypot({0}, {1})",
    flops=8,
    domain="nonzero",
    with_scalar=False,
    kinds="f",
    aten=("hypot.default",),
    shapes=((3, 4),),
)
