"""Functions of one number, element by element."""

from __future__ import annotations

import numpy as np
from scipy import special

from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ops.build import (
    mul,
    neg,
    scale,
)
from daggc.ops.elementwise import (
    piecewise_constant,
    unary,
)
from daggc.ops.opdef import (
    NOT_DIFFERENTIABLE,
)


def _square(b: Builder, x: Value) -> Value:
    return mul(b, x, x)


def _one_minus(b: Builder, x: Value) -> Value:
    return b.emit("add_scalar", neg(b, x), value=1)


unary("neg", np.negative, lambda b, n, ct: neg(b, ct), to_float=False)
unary(
    "sign",
    lambda x: np.where(x == x, np.sign(x), 0),  # torch's sign of NaN is 0
    piecewise_constant,
    to_float=False,
    kinds="if",
    domain="nonzero",
    aten=("sign.default",),
)
unary("exp", np.exp, lambda b, n, ct: mul(b, ct, n.output), flops=8)
unary(
    "exp2",
    np.exp2,
    lambda b, n, ct: mul(b, ct, scale(b, n.output, float(np.log(2)))),
    flops=8,
    kinds="f",
)
unary("expm1", np.expm1, lambda b, n, ct: mul(b, ct, b.emit("add_scalar", n.output, value=1)), flops=8)
unary("log", np.log, lambda b, n, ct: b.emit("div", ct, n.inputs[0]), flops=8, domain="positive")
unary(
    "log2",
    np.log2,
    lambda b, n, ct: b.emit("div", ct, scale(b, n.inputs[0], float(np.log(2)))),
    flops=8,
    domain="positive",
)
unary(
    "log1p",
    np.log1p,
    lambda b, n, ct: b.emit("div", ct, b.emit("add_scalar", n.inputs[0], value=1)),
    flops=8,
    domain="positive",
)
unary("sqrt", np.sqrt, lambda b, n, ct: b.emit("div", ct, scale(b, n.output, 2)), flops=4, domain="positive")
unary(
    "rsqrt",
    lambda x: 1 / np.sqrt(x),
    lambda b, n, ct: mul(b, scale(b, ct, -0.5), b.emit("pow_scalar", n.output, value=3)),
    flops=5,
    domain="positive",
)
unary(
    "reciprocal",
    np.reciprocal,
    lambda b, n, ct: neg(b, mul(b, ct, _square(b, n.output))),
    domain="positive",
)
unary("sin", np.sin, lambda b, n, ct: mul(b, ct, b.emit("cos", n.inputs[0])), flops=8)
unary("cos", np.cos, lambda b, n, ct: mul(b, ct, neg(b, b.emit("sin", n.inputs[0]))), flops=8)
unary("tan", np.tan, lambda b, n, ct: mul(b, ct, b.emit("add_scalar", _square(b, n.output), value=1)), flops=8)
unary(
    "atan",
    np.arctan,
    lambda b, n, ct: b.emit("div", ct, b.emit("add_scalar", _square(b, n.inputs[0]), value=1)),
    flops=8,
)
unary("sinh", np.sinh, lambda b, n, ct: mul(b, ct, b.emit("cosh", n.inputs[0])), flops=8)
unary("cosh", np.cosh, lambda b, n, ct: mul(b, ct, b.emit("sinh", n.inputs[0])), flops=8)
unary(
    "erf",
    special.erf,
    lambda b, n, ct: mul(b, ct, scale(b, b.emit("exp", neg(b, _square(b, n.inputs[0]))), float(2 / np.sqrt(np.pi)))),
    flops=12,
    kinds="f",
)
unary("floor", np.floor, piecewise_constant, to_float=False, kinds="if")
unary("ceil", np.ceil, piecewise_constant, to_float=False, kinds="if")
unary("trunc", np.trunc, piecewise_constant, to_float=False, kinds="if")
unary("round", np.round, piecewise_constant, to_float=False, kinds="if")
unary("isnan", np.isnan, NOT_DIFFERENTIABLE, predicate=True, to_float=False, kinds="bifc")
unary("isinf", np.isinf, NOT_DIFFERENTIABLE, predicate=True, to_float=False, kinds="bifc")
unary("logical_not", np.logical_not, NOT_DIFFERENTIABLE, predicate=True, to_float=False, kinds="bifc")
unary("bitwise_not", np.invert, NOT_DIFFERENTIABLE, to_float=False, kinds="bi")
