"""Orthogonal polynomials of a tensor of degrees, by their three-term recurrences. torch does not differentiate them.

Degrees are truncated to integers; a polynomial of negative degree is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.graph import Node
from daggc.ir.types import TensorType
from daggc.ops.elementwise import floating, import_binary, not_half, of_kinds, same_types
from daggc.ops.opdef import NOT_DIFFERENTIABLE, Arg, OpDef, Sample, elementwise_cost, register, require, same_axes, t

First = Callable[[np.ndarray], np.ndarray]
# (x, k, P_k, P_k-1) -> P_k+1
Step = Callable[[np.ndarray, int, np.ndarray, np.ndarray], np.ndarray]
Polynomial = Callable[[np.ndarray, np.ndarray], np.ndarray]

_HIGH = 64  # degree from which Chebyshev polynomials within [-1, 1] are taken from the angle
_HERMITE_LIMIT = {4: 128, 8: 512}  # degree from which torch gives nan, by bytes of the dtype


def _recurrence(first: First, step: Step) -> Polynomial:
    """P_0 = 1, P_1 = first(x). It is followed up to the highest degree, or until all numbers have become nan."""

    def polynomial(x: np.ndarray, degree: np.ndarray) -> np.ndarray:
        before, now = np.ones_like(x), first(x)
        result = np.where(degree == 0, before, np.where(degree == 1, now, 0))
        k = 1
        while (more := (degree > k) & ~np.isnan(now)).any():
            before, now = now, step(x, k, now, before)
            k += 1
            result = np.where(more, now, result)
        return result

    return polynomial


def _chebyshev(first: First, ends: tuple[int, int], from_angle: Callable[..., np.ndarray]) -> Polynomial:
    """``ends``: by how much the magnitudes at 1 and at -1 grow with the degree."""
    recurrence = _recurrence(first, lambda x, k, now, before: (x + x) * now - before)

    def polynomial(x: np.ndarray, degree: np.ndarray) -> np.ndarray:
        high = (np.abs(x) <= 1) & (degree > _HIGH)
        result = recurrence(x, np.where(high, 0, degree))
        inside = from_angle(np.arccos(np.clip(x, -1, 1)), degree)
        sign = 1 - 2 * (degree % 2)
        at_ends = np.where(x == 1, ends[0] * degree + 1, sign * (ends[1] * degree + 1))
        return np.where(high, np.where(np.abs(x) == 1, at_ends, inside), result)

    return polynomial


def _shifted(polynomial: Polynomial) -> Polynomial:
    """From the interval [0, 1] in place of [-1, 1]."""
    return lambda x, degree: polynomial(x + x - 1, degree)


def _limited(polynomial: Polynomial) -> Polynomial:
    def limited(x: np.ndarray, degree: np.ndarray) -> np.ndarray:
        limit = _HERMITE_LIMIT[x.dtype.itemsize]
        return np.where(degree > limit, np.nan, polynomial(x, np.minimum(degree, limit)))

    return limited


def _legendre(x: np.ndarray, k: int, now: np.ndarray, before: np.ndarray) -> np.ndarray:
    return ((k + k + 1) * x * now - k * before) / (k + 1)


def _laguerre(x: np.ndarray, k: int, now: np.ndarray, before: np.ndarray) -> np.ndarray:
    return ((k + k + (1 - x)) * now - k * before) / (k + 1)


_CHEBYSHEV: dict[str, Polynomial] = {
    "t": _chebyshev(lambda x: x, (0, 0), lambda angle, n: np.cos(n * angle)),
    "u": _chebyshev(lambda x: x + x, (1, 1), lambda angle, n: np.sin((n + 1) * angle) / np.sin(angle)),
    "v": _chebyshev(lambda x: x + x - 1, (0, 2), lambda angle, n: np.cos((n + 0.5) * angle) / np.cos(angle / 2)),
    "w": _chebyshev(lambda x: x + x + 1, (2, 0), lambda angle, n: np.sin((n + 0.5) * angle) / np.sin(angle / 2)),
}
_POLYNOMIALS: dict[str, Polynomial] = {
    **{f"chebyshev_polynomial_{kind}": polynomial for kind, polynomial in _CHEBYSHEV.items()},
    **{f"shifted_chebyshev_polynomial_{kind}": _shifted(polynomial) for kind, polynomial in _CHEBYSHEV.items()},
    "hermite_polynomial_h": _limited(
        _recurrence(lambda x: x + x, lambda x, k, now, before: (x + x) * now - (k + k) * before)
    ),
    "hermite_polynomial_he": _limited(_recurrence(lambda x: x, lambda x, k, now, before: x * now - k * before)),
    "laguerre_polynomial_l": _recurrence(lambda x: 1 - x, _laguerre),
    "legendre_polynomial_p": _recurrence(lambda x: x, _legendre),
}


def _register(name: str, polynomial: Polynomial) -> None:
    types = not_half(of_kinds("f", same_types))

    def infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        require(len(inputs) == 2, f"two inputs are required, numbers and degrees, got {len(inputs)}")
        return types(inputs, attrs)

    def evaluate(node: Node, x: np.ndarray, degree: np.ndarray) -> np.ndarray:
        degree = np.trunc(degree)
        return np.where(degree < 0, 0, polynomial(x, degree)).astype(x.dtype)

    importer = import_binary(name, floating, commutes=False, with_scalar=False)
    register(
        OpDef(
            name=name,
            infer=infer,
            evaluate=evaluate,
            vjp=NOT_DIFFERENTIABLE,
            cost=elementwise_cost(30),
            axes=same_axes,
            lower=lambda node, args: f"torch.special.{name}({args[0]}, {args[1]})",
            aten=dict.fromkeys((f"special_{name}.{form}" for form in ("default", "x_scalar", "n_scalar")), importer),
            samples=(Sample((Arg(t(3, 4), "unit"), Arg(t(3, 4), "count"))),),
        )
    )


for _name, _polynomial in _POLYNOMIALS.items():
    _register(_name, _polynomial)
