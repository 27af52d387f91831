"""Special functions: of the gamma family, error functions and the normal distribution, Bessel and Airy functions.

Their meaning is scipy's, of the same Cephes ancestry as torch's kernels. The derivatives are written as torch writes
them; where torch has none (most Bessel functions, a first argument of zeta or igamma), there is none here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import special

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import broadcast, cast, mul, neg, scale, sub, sum_dims
from daggc.ops.elementwise import binary, floating, of_kinds, one_input, same_types, unary
from daggc.ops.iota import iota
from daggc.ops.opdef import (
    NOT_DIFFERENTIABLE,
    OpDef,
    elementwise_cost,
    register,
    require,
    same_axes,
    sample,
    upcast,
)

_ROOT_PI = math.sqrt(math.pi)
_ROOT_2PI = math.sqrt(2 * math.pi)


def _plus(b: Builder, x: Value, value: float) -> Value:
    return b.emit("add_scalar", x, value=value)


def _square(b: Builder, x: Value) -> Value:
    return mul(b, x, x)


def _to_float(b: Builder, x: Value) -> Value:
    return x if x.type.differentiable else cast(b, x, "f32")


# --- the gamma family ---------------------------------------------------------------------------------


def _lgamma(x: np.ndarray) -> np.ndarray:
    return np.where(np.isinf(x), np.inf, special.gammaln(x))


def _digamma_rule(b: Builder, node: Node, ct: Value) -> Value:
    return mul(b, ct, b.emit("polygamma", node.inputs[0], n=1))


def _infer_polygamma(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    require(len(inputs) == 1, f"one input is required, got {len(inputs)}")
    require(type(attrs["n"]) is int and attrs["n"] >= 1, f"n is a positive integer, got {attrs['n']!r}")
    return of_kinds("f", same_types)(inputs, attrs)


def _zeta(x: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Nan at infinite q, as in torch."""
    return np.where((q == np.inf) & (x > 1), np.nan, special.zeta(x, q))


def _trigamma(x: np.ndarray) -> np.ndarray:
    """Reflected to x >= 1/2, moved up six steps, then by its asymptotic series: torch's, of ten digits."""
    low = x < 0.5
    at = np.where(low, 1 - x, x)
    result = np.where(low, -((np.pi / np.sin(np.pi * x)) ** 2), 0)
    for _ in range(6):
        result = result + 1 / (at * at)
        at = at + 1
    square = 1 / (at * at)
    series = (1 + 1 / (2 * at) + square * (1 / 6 - square * (1 / 30 - square / 42))) / at
    return np.where(low, -1, 1) * (result + series)


def _evaluate_polygamma(node: Node, x: np.ndarray) -> np.ndarray:
    n = int(node.attrs["n"])  # pyright: ignore[reportArgumentType]  # _infer_polygamma has checked it
    if n == 1:
        return _trigamma(x)
    return (-1.0) ** (n + 1) * special.gamma(n + 1.0) * _zeta(np.asarray(n + 1.0), x)


def _polygamma_rule(b: Builder, node: Node, ct: Value) -> Value:
    return mul(b, ct, b.emit("polygamma", node.inputs[0], n=node.attrs["n"] + 1))


def _import_polygamma(b: Builder, n: int, x: Value) -> Value:
    x = _to_float(b, x)
    return b.emit("digamma", x) if n == 0 else b.emit("polygamma", x, n=n)


def _import_mvlgamma(b: Builder, x: Value, p: int) -> Value:
    """``log(pi) p (p - 1) / 4`` and the sum of lgamma at ``x``, ``x - 1/2``, ... ``x - (p - 1) / 2``."""
    x = _to_float(b, x)
    shape = (*x.type.shape, p)
    steps = broadcast(b, iota(b, p, x.type.dtype, -p / 2 + 0.5, 0.5), shape)
    at = b.emit("add", steps, broadcast(b, b.emit("reshape", x, shape=(*x.type.shape, 1)), shape))
    return _plus(b, sum_dims(b, b.emit("lgamma", at), (x.type.rank,)), p * (p - 1) * math.log(math.pi) / 4)


def _import_ndtr(b: Builder, x: Value) -> Value:
    """``(1 + erf(x / sqrt(2))) / 2``, which is how torch computes it."""
    inner = b.emit("erf", b.emit("div_scalar", _to_float(b, x), value=math.sqrt(2)))
    return scale(b, _plus(b, inner, 1.0), 0.5)


def _zeta_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,), (x, q) = cts, node.inputs
    assert ct is not None
    return None, mul(b, mul(b, ct, neg(b, x)), b.emit("zeta", _plus(b, x, 1.0), q))


def _igamma_vjp(sign: int) -> Callable[..., Sequence[Value | None]]:
    def vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
        (ct,), (a, x) = cts, node.inputs
        assert ct is not None
        powers = mul(b, _plus(b, a, -1.0), b.emit("log", x))
        density = b.emit("exp", sub(b, sub(b, powers, x), b.emit("lgamma", a)))
        return None, mul(b, ct if sign > 0 else neg(b, ct), density)

    return vjp


unary(
    "lgamma",
    _lgamma,
    lambda b, n, ct: mul(b, ct, b.emit("digamma", n.inputs[0])),
    flops=20,
    domain="positive",
    kinds="f",
    aten=("lgamma.default", "special_gammaln.default"),
    shapes=((3, 4),),
)
unary(
    "digamma",
    special.digamma,
    _digamma_rule,
    flops=20,
    domain="positive",
    kinds="f",
    aten=("digamma.default", "special_digamma.default", "special_psi.default"),
    shapes=((3, 4),),
)
register(
    OpDef(
        name="polygamma",
        infer=_infer_polygamma,
        evaluate=upcast(_evaluate_polygamma),
        vjp=one_input(_polygamma_rule),
        cost=elementwise_cost(30),
        axes=same_axes,
        lower=lambda node, args: f"torch.polygamma({node.attrs['n']}, {args[0]})",
        aten={
            "polygamma.default": _import_polygamma,
            "special_polygamma.default": _import_polygamma,
            "mvlgamma.default": _import_mvlgamma,
            "special_multigammaln.default": _import_mvlgamma,
            "special_ndtr.default": _import_ndtr,
        },
        samples=(sample((3, 4), domain="positive", n=1), sample((3, 4), domain="positive", n=2)),
    )
)
binary(
    "zeta",
    _zeta,
    _zeta_vjp,
    NOT_DIFFERENTIABLE,
    "torch.special.zeta({0}, {1})",
    flops=30,
    domain="large",
    with_scalar=False,
    kinds="f",
    half=False,
    operand_dtype=floating,
    aten=tuple(f"special_zeta.{overload}" for overload in ("default", "self_scalar", "other_scalar")),
    shapes=((3, 4),),
)
for _name, _function, _sign, _alias in (
    ("igamma", special.gammainc, 1, "special_gammainc.default"),
    ("igammac", special.gammaincc, -1, "special_gammaincc.default"),
):
    binary(
        _name,
        _function,
        _igamma_vjp(_sign),
        NOT_DIFFERENTIABLE,
        f"torch.{_name}({{0}}, {{1}})",
        flops=50,
        domain="positive",
        with_scalar=False,
        kinds="f",
        aten=(f"{_name}.default", _alias),
        shapes=((3, 4),),
    )


# --- error functions and the normal distribution ------------------------------------------------------


def _erfc_rule(b: Builder, node: Node, ct: Value) -> Value:
    slope = scale(b, b.emit("exp", neg(b, _square(b, node.inputs[0]))), -2 / _ROOT_PI)
    return mul(b, slope, ct)


def _erfinv_rule(b: Builder, node: Node, ct: Value) -> Value:
    slope = scale(b, b.emit("exp", _square(b, node.output)), _ROOT_PI / 2)
    return mul(b, slope, ct)


def _erfcx_rule(b: Builder, node: Node, ct: Value) -> Value:
    slope = _plus(b, mul(b, scale(b, node.inputs[0], 2.0), node.output), -2 / _ROOT_PI)
    return mul(b, slope, ct)


def _ndtri_rule(b: Builder, node: Node, ct: Value) -> Value:
    half = b.emit("div_scalar", _square(b, node.output), value=2.0)
    return mul(b, scale(b, ct, _ROOT_2PI), b.emit("exp", half))


def _log_ndtr_rule(b: Builder, node: Node, ct: Value) -> Value:
    half = b.emit("div_scalar", _square(b, node.inputs[0]), value=2.0)
    ratio = b.emit("exp", neg(b, b.emit("add", node.output, half)))
    return mul(b, b.emit("div_scalar", ct, value=_ROOT_2PI), ratio)


for _name, _function, _rule, _domain, _half, _aten in (
    ("erfc", special.erfc, _erfc_rule, "real", True, ("erfc.default", "special_erfc.default")),
    ("erfinv", special.erfinv, _erfinv_rule, "unit", True, ("erfinv.default", "special_erfinv.default")),
    ("erfcx", special.erfcx, _erfcx_rule, "real", False, ("special_erfcx.default",)),
    ("ndtri", special.ndtri, _ndtri_rule, "unit", False, ("special_ndtri.default",)),
    ("log_ndtr", special.log_ndtr, _log_ndtr_rule, "real", False, ("special_log_ndtr.default",)),
):
    unary(
        _name,
        _function,
        _rule,
        f"torch.special.{_name}",
        flops=20,
        domain=_domain,
        kinds="f",
        half=_half,
        aten=_aten,
        shapes=((3, 4),),
    )
