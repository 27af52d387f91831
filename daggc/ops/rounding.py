"""Divisions that round, their remainders, rounding to decimals, and extrema that pass over nan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import Operand, mul, neg
from daggc.ops.elementwise import binary, floating, import_binary, keep, piecewise_constant, where_zero
from daggc.ops.opdef import (
    NOT_DIFFERENTIABLE,
    VJP,
    OpDef,
    elementwise_cost,
    register,
    require,
    same_axes,
    sample,
    upcast,
)


def _trunc_divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if x.dtype.kind == "f":
        return np.trunc(x / y)
    quotient = np.floor_divide(x, y)  # rounds down; one more where that was away from zero
    return quotient + ((quotient < 0) & (quotient * y != x))


def _fmod_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,) = cts
    assert ct is not None
    return ct, mul(b, neg(b, ct), b.emit("trunc_divide", *node.inputs))


def _import_div_mode(b: Builder, x: Operand, y: Operand, *, rounding_mode: str | None = None) -> Value:
    if rounding_mode is None:
        return import_binary("div", floating, commutes=False)(b, x, y)
    if rounding_mode == "floor":
        return import_binary("floor_divide", keep, commutes=False)(b, x, y)
    return import_binary("trunc_divide", keep, commutes=False, with_scalar=False)(b, x, y)


def _nan_passed_over_vjp(wins: str) -> VJP:
    """Ties go to the first operand, as in torch."""

    def vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
        (ct,), (x, y) = cts, node.inputs
        assert ct is not None
        first = b.emit("logical_or", b.emit(wins, x, y), b.emit("isnan", y))
        return where_zero(b, first, ct), where_zero(b, b.emit("logical_not", first), ct)

    return vjp


binary(
    "trunc_divide",
    _trunc_divide,
    piecewise_constant,
    NOT_DIFFERENTIABLE,
    'torch.div({0}, {1}, rounding_mode="trunc")',
    domain="positive",
    with_scalar=False,
    kinds="if",
    importers=dict.fromkeys(("div.Tensor_mode", "div.Scalar_mode"), _import_div_mode),
    shapes=((3, 4),),
)
binary(
    "fmod",
    np.fmod,
    _fmod_vjp,
    NOT_DIFFERENTIABLE,
    "torch.fmod({0}, {1})",
    domain="positive",
    with_scalar=False,
    kinds="if",
    shapes=((3, 4),),
)
for _name, _function, _wins in (("fmax", np.fmax, "ge"), ("fmin", np.fmin, "le")):
    binary(
        _name,
        _function,
        _nan_passed_over_vjp(_wins),
        NOT_DIFFERENTIABLE,
        f"torch.{_name}({{0}}, {{1}})",
        with_scalar=False,
        kinds="bif",
        aten=(f"{_name}.default",),
        shapes=((3, 4),),
    )


# --- rounding to decimals -----------------------------------------------------------------------------


def _infer_round(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    require(len(inputs) == 1 and inputs[0].is_float, "one float tensor is required")
    require(type(attrs["decimals"]) is int, f"decimals is an integer, got {attrs['decimals']!r}")
    return (inputs[0],)


def _evaluate_round(node: Node, x: np.ndarray) -> np.ndarray:
    decimals = node.attrs["decimals"]
    power = x.dtype.type(10.0 ** abs(decimals))
    return np.round(x * power) / power if decimals >= 0 else np.round(x / power) * power


def _import_round(b: Builder, x: Value, *, decimals: int = 0, **_: Any) -> Value:
    if decimals == 0:
        return b.emit("round", x)
    return b.emit("round_decimals", x, decimals=decimals)


register(
    OpDef(
        name="round_decimals",
        infer=_infer_round,
        evaluate=upcast(_evaluate_round),
        vjp=piecewise_constant,
        cost=elementwise_cost(3),
        axes=same_axes,
        lower=lambda node, args: f"torch.round({args[0]}, decimals={node.attrs['decimals']})",
        aten={"round.decimals": _import_round},
        samples=(sample((3, 4), decimals=1), sample((3, 4), decimals=-1)),
    )
)
