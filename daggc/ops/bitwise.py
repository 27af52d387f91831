"""Shifts of bits, greatest common divisors and least common multiples of integers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from daggc.ops.elementwise import binary
from daggc.ops.opdef import NOT_DIFFERENTIABLE


def _left_shift(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Zero for shifts by more bits than there are, and by negative numbers."""
    bits = x.dtype.itemsize * 8
    fits = (by >= 0) & (by < bits)
    return np.where(fits, np.left_shift(x, np.where(fits, by, 0)), 0).astype(x.dtype)


def _right_shift(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Only copies of the sign are left after shifts by more bits than there are, and by negative numbers."""
    bits = x.dtype.itemsize * 8
    largest = bits - 1 if x.dtype.kind == "i" else bits
    fits = (by >= 0) & (by < bits)
    shifted = np.right_shift(x, np.where(fits, by, 0))
    return np.where(fits, shifted, np.right_shift(x, largest) if x.dtype.kind == "i" else 0).astype(x.dtype)


def _overloads(name: str, operator: str) -> Sequence[str]:
    return (
        *(f"{name}.{overload}" for overload in ("Tensor", "Tensor_Scalar", "Scalar_Tensor")),
        *(f"{operator}.{overload}" for overload in ("Tensor", "Scalar")),
    )


for _name, _function, _aten in (
    ("bitwise_left_shift", _left_shift, _overloads("bitwise_left_shift", "__lshift__")),
    ("bitwise_right_shift", _right_shift, _overloads("bitwise_right_shift", "__rshift__")),
    ("gcd", np.gcd, ("gcd.default",)),
    ("lcm", np.lcm, ("lcm.default",)),
):
    binary(
        _name,
        _function,
        NOT_DIFFERENTIABLE,
        NOT_DIFFERENTIABLE,
        f"torch.{_name}({{0}}, {{1}})",
        domain="small",
        with_scalar=False,
        kinds="i",
        aten=_aten,
        shapes=((3, 4),),
    )
