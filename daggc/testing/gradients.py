"""Derivatives by finite differences, along one direction: one number a graph, not a Jacobian."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from daggc.interp import interpret_graph
from daggc.ir.graph import Graph, Port, Program
from daggc.testing.arrays import domain_of, within

Arrays = Mapping[str, np.ndarray]
_SEEN = 1e-4  # a smaller kink, in proportion to the slope, is rounding or curvature


@dataclass(frozen=True)
class Slope:
    """A directional derivative, and how two step sizes and two sides disagree, which tells a kink from a slope."""

    value: float
    error: float

    @property
    def reliable(self) -> bool:
        """Whether both step sizes saw one smooth function."""
        return bool(np.isfinite(self.value)) and self.error <= 1e-3 * (1 + abs(self.value))

    def agrees(self, derivative: float, tolerance: float = 1e-5) -> bool:
        """Whether a derivative equals this one, within the tolerance and the error of the differences."""
        return abs(derivative - self.value) <= tolerance * (1 + abs(self.value)) + self.error


def finite_difference(
    graph: Graph,
    inputs: Arrays,
    direction: Arrays,
    cotangents: Arrays,
    program: Program | None = None,
    step: float = 1e-4,
) -> Slope:
    """Differentiate ``sum(cotangents * outputs)`` of a graph along a direction.

    Central differences of two step sizes, extrapolated (Richardson), with an error of O(step ** 4). They agree at a
    kink that is the same on both sides, as that of ``abs`` at 0; second differences do not: there they fall with the
    step, not with its square.

    Args:
        inputs: arrays by ``ref`` of the graph's input ports.
        direction: by ``ref``; inputs that are absent stay fixed.
        cotangents: by ``ref`` of the graph's output ports; those that are absent count as zero.
    """

    def at(offset: float) -> float:
        moved = [
            inputs[port.ref] + offset * direction[port.ref] if port.ref in direction else inputs[port.ref]
            for port in graph.inputs
        ]
        outputs = interpret_graph(graph, moved, program)
        return sum(
            inner(cotangents[port.ref], array)
            for port, array in zip(graph.outputs, outputs, strict=True)
            if port.ref in cotangents
        )

    far, near, here = (at(step), at(-step)), (at(step / 2), at(-step / 2)), at(0.0)
    wide = (far[0] - far[1]) / (2 * step)
    narrow = (near[0] - near[1]) / step
    kink = abs(sum(far) - 2 * here - 4 * (sum(near) - 2 * here)) / step
    return Slope((4 * narrow - wide) / 3, abs(narrow - wide) + (kink if kink > _SEEN * (1 + abs(narrow)) else 0.0))


def inner(x: np.ndarray, y: np.ndarray) -> float:
    """The real inner product of two arrays, in f64; complex numbers count as pairs of reals."""
    if np.iscomplexobj(x) or np.iscomplexobj(y):
        return float(np.vdot(x, y).real)
    return float(np.vdot(x.astype(np.float64), y.astype(np.float64)))


def random_direction(ports: Sequence[Port], seed: int = 0) -> dict[str, np.ndarray]:
    """Normal numbers for each port, by ``ref``: a direction, or cotangents. Matrices keep their domain's structure."""
    direction: dict[str, np.ndarray] = {}
    for index, port in enumerate(ports):
        rng = np.random.default_rng([seed, index, 1])
        numbers = rng.normal(size=port.value.type.shape)
        if port.value.type.is_complex:
            numbers = numbers + 1j * rng.normal(size=port.value.type.shape)
        numbers = within(domain_of(port.value), np.asarray(numbers))
        direction[port.ref] = numbers.astype(port.value.type.numpy_dtype)
    return direction
