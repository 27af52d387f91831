"""What is known of a value about the batch axis, and the arithmetic of factors of axes.

A batch axis may be merged with others by a reshape: rows of ``[batch * time, channels]`` are numbered
``sample * time + step``. A :class:`Factor` is such a digit of an axis' index.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from daggc.errors import located
from daggc.ir.graph import Node


@dataclass(frozen=True, order=True, slots=True)
class Factor:
    """The digit ``index // stride % size`` of an axis' index."""

    axis: int
    size: int
    stride: int = 1

    def covers(self, other: Factor) -> bool:
        """Whether ``other`` is a digit of this digit."""
        return (
            self.axis == other.axis
            and other.stride % self.stride == 0
            and (self.stride * self.size) % (other.stride * other.size) == 0
        )

    def moved(self, axis: int) -> Factor:
        return replace(self, axis=axis)


def refit(factor: Factor, source: Sequence[int], target: Sequence[int]) -> list[Factor]:
    """The digits of ``target``'s axes that a digit of ``source`` becomes in a reshape, outermost first.

    A reshape keeps the flat order of elements, so a digit keeps its stride in it. Parts that fall across axes so
    that they are no digit are left out.
    """
    low = factor.stride * math.prod(source[factor.axis + 1 :])
    high = low * factor.size
    parts: list[Factor] = []
    for axis, size in enumerate(target):
        inner = math.prod(target[axis + 1 :])
        first, last = max(low, inner), min(high, inner * size)
        if first < last and last % first == 0 and first % low == 0 == high % last and first % inner == 0:
            parts.append(Factor(axis, last // first, first // inner))
    return parts


def merged(factors: Iterable[Factor]) -> tuple[Factor, ...]:
    """Neighbouring digits of an axis joined."""
    result: list[Factor] = []
    for factor in sorted(factors, key=lambda f: (f.axis, f.stride)):
        last = result[-1] if result else None
        if last is not None and last.axis == factor.axis and last.stride * last.size == factor.stride:
            result[-1] = Factor(last.axis, last.size * factor.size, last.stride)
        else:
            result.append(factor)
    return tuple(result)


def whole_axes(shape: Sequence[int], axes: Iterable[int] | None = None) -> tuple[Factor, ...]:
    """One factor for each axis."""
    return tuple(Factor(axis, shape[axis]) for axis in (range(len(shape)) if axes is None else axes))


def uniform_axes(array: np.ndarray) -> tuple[Factor, ...]:
    """The axes along which an array does not change."""
    same = [axis for axis in range(array.ndim) if array.size and (array == array.take([0], axis)).all()]
    return whole_axes(array.shape, same)


@dataclass(frozen=True)
class Mixing:
    """Why a batch cannot be cut: the first node that needs samples of other microbatches."""

    op: str
    message: str
    path: str = ""
    source: str = ""
    index: int = -1

    @staticmethod
    def at(node: Node, message: str, index: int = -1) -> Mixing:
        return Mixing(node.op, message, node.path, node.source, index)

    def __str__(self) -> str:
        return located(f"{self.op}: {self.message}" if self.op else self.message, self.path, self.source)


@dataclass(frozen=True)
class State:
    """What a value computed from a microbatch is to the value computed from the whole batch.

    ``kind``:
        invariant: the same. It does not change along the factors ``uniform``.
        random: numbers drawn independently, but for copies along ``uniform``.
        batched: the microbatch's part of it, along the factor ``batch``.
        sum: microbatches' values add up to it.
        mean: they do once multiplied by the microbatch's fraction of the batch.
        mixed: neither, because of ``mixing``.

    Attributes:
        known: it depends on inputs, buffers and constants alone, so it can be had before the forward.
        position: a factor along which the value is the index itself, ``arange(batch)``.
    """

    kind: str
    known: bool = False
    uniform: tuple[Factor, ...] = ()
    batch: Factor | None = None
    position: Factor | None = None
    mixing: Mixing | None = None

    @property
    def additive(self) -> bool:
        return self.kind in ("sum", "mean")

    def uniform_along(self, factor: Factor) -> bool:
        return any(known.covers(factor) for known in self.uniform)


def mixed(mixing: Mixing) -> State:
    return State("mixed", mixing=mixing)


def batched(factor: Factor, known: bool) -> State:
    return State("batched", known, batch=factor)


@dataclass(frozen=True, order=True)
class Edit:
    """A change to one node, so that its results are right for a part of a batch.

    ``kind``: ``total`` and ``total_of_means`` (read the value of the whole batch in place of an operand),
    ``scale_input``, ``scale_output`` and ``unscale_output`` (multiply or divide by the fraction),
    ``scale_constant`` (the constant that ``add_scalar`` adds).
    """

    node: int
    kind: str
    operand: int = 0
