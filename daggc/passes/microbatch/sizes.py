"""What changes with the batch size: one forward captured at two sizes, compared node by node.

A number in a graph does not tell whether it is a constant of the model or was computed from the size of the
batch (``loss / x.shape[0]``); a second capture does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from daggc.ir.attrs import Attr
from daggc.ir.graph import Graph, Node
from daggc.passes.microbatch.state import Mixing

_SHAPES = {  # attributes that say how large a result is; its state tells whether that is right
    "full": ("shape",),
    "reshape": ("shape",),
    "broadcast": ("shape",),
    "iota": ("size",),
}
_RANDOM = ("bernoulli", "uniform", "normal", "randint")


@dataclass(frozen=True)
class Sizes:
    """The differences of two captures.

    Attributes:
        batch: samples in the first capture.
        other: samples in the second; equal if there is none.
        changing: value name -> axes whose size changes.
        growing: value name -> those among them whose size is in proportion to the batch.
        attrs: index of a node -> its attributes that differ, with both values.
    """

    batch: int
    other: int
    changing: Mapping[str, frozenset[int]] = field(default_factory=dict)
    growing: Mapping[str, frozenset[int]] = field(default_factory=dict)
    attrs: Mapping[int, Mapping[str, tuple[Attr, Attr]]] = field(default_factory=dict)

    def proportional(self, pair: tuple[Attr, Attr]) -> int:
        """1 if a number grows with the batch, -1 if it shrinks as the batch grows, 0 for neither."""
        first, second = pair
        if isinstance(first, bool) or not isinstance(first, int | float) or not isinstance(second, int | float):
            return 0
        if _close(first * self.other, second * self.batch):
            return 1
        return -1 if _close(first * self.batch, second * self.other) else 0


def _close(first: float, second: float) -> bool:
    return abs(first - second) <= 1e-12 * max(abs(first), abs(second))


def difference(first: Graph, second: Graph) -> Mixing | None:
    """Why two graphs are not the same but for sizes; None if they are."""
    if [port.ref for port in first.inputs] != [port.ref for port in second.inputs]:
        return Mixing("", "the inputs of the model change with the batch size")
    ours = {port.value.name: f"input {index}" for index, port in enumerate(first.inputs)}
    theirs = {port.value.name: f"input {index}" for index, port in enumerate(second.inputs)}
    for index, (node, other) in enumerate(zip(first.nodes, second.nodes, strict=False)):
        same = (
            node.op == other.op
            and [ours[value.name] for value in node.inputs] == [theirs[value.name] for value in other.inputs]
            and len(node.outputs) == len(other.outputs)
            and set(node.attrs) == set(other.attrs)
        )
        if not same:
            return Mixing.at(node, f"the graph changes with the batch size: here it has {other.op} elsewhere", index)
        for position, (value, twin) in enumerate(zip(node.outputs, other.outputs, strict=True)):
            ours[value.name] = theirs[twin.name] = f"node {index}.{position}"
            if value.type.dtype != twin.type.dtype or value.type.rank != twin.type.rank:
                return Mixing.at(node, f"a result is a {value.type} at one batch size, {twin.type} at another", index)
    if len(first.nodes) != len(second.nodes):
        return Mixing("", f"the graph has {len(first.nodes)} nodes at one batch size, {len(second.nodes)} at another")
    results = [
        [(port.ref, names[port.value.name]) for port in graph.outputs]
        for graph, names in ((first, ours), (second, theirs))
    ]
    return None if results[0] == results[1] else Mixing("", "the results of the model change with the batch size")


def compare(forward: Graph, other: Graph | None, batch: int, other_batch: int) -> Sizes:
    """What changes between two captures that :func:`difference` found to be one graph."""
    if other is None:
        return Sizes(batch, batch)
    changing: dict[str, frozenset[int]] = {}
    growing: dict[str, frozenset[int]] = {}
    for value, twin in zip(forward.values(), other.values(), strict=True):
        pairs = list(enumerate(zip(value.type.shape, twin.type.shape, strict=True)))
        changing[value.name] = frozenset(axis for axis, (n, m) in pairs if n != m)
        growing[value.name] = frozenset(axis for axis, (n, m) in pairs if n != m and n * other_batch == m * batch)
    attrs = {
        index: changed
        for index, (node, twin) in enumerate(zip(forward.nodes, other.nodes, strict=True))
        if (changed := _changed(node, twin))
    }
    return Sizes(batch, other_batch, changing, growing, attrs)


def _changed(node: Node, twin: Node) -> dict[str, tuple[Attr, Attr]]:
    expected: Sequence[str] = ("shape",) if node.op in _RANDOM else _SHAPES.get(node.op, ())
    if node.op == "slice" and _whole_slice(node) and _whole_slice(twin):
        expected = ("end",)
    if node.op == "constant" and same_constant(node.attrs["value"].numpy(), twin.attrs["value"].numpy()):
        expected = ("value",)
    return {
        name: (value, twin.attrs[name])
        for name, value in node.attrs.items()
        if name not in expected and str(value) != str(twin.attrs[name])
    }


def same_constant(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays are one but for the length of axes along which both are copies, or count from 0."""
    if first.ndim != second.ndim:
        return False
    if counting_axis(first) is not None and counting_axis(first) == counting_axis(second):
        return True
    axes = [axis for axis in range(first.ndim) if first.shape[axis] != second.shape[axis]]
    if any(not (array == array.take([0], axis)).all() for axis in axes for array in (first, second)):
        return False
    shared = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(first.ndim))
    return np.array_equal(first[shared], second[shared])


def counting_axis(array: np.ndarray) -> int | None:
    """The axis along which an array of integers is the index itself, if it changes along no other."""
    if array.dtype.kind != "i":
        return None
    for axis, size in enumerate(array.shape):
        index = np.arange(size).reshape(tuple(size if own == axis else 1 for own in range(array.ndim)))
        if size > 1 and (array == index).all():
            return axis
    return None


def _whole_slice(node: Node) -> bool:
    return node.output.type == node.inputs[0].type and node.attrs["step"] == 1
