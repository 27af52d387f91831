"""Values that go from node to node, as a cut sees them: what crosses it, in bytes, and cotangents on the way back.

Views count as what they are views of, and values that are cheap to make again do not count: whoever reads them
makes them (see :func:`daggc.plan.outline.cheap_values`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from daggc.ir.graph import Graph, Node, Value
from daggc.ops import REGISTRY
from daggc.ops.opdef import NOT_DIFFERENTIABLE
from daggc.passes.split import RECOMPUTED
from daggc.plan.outline import cheap_values

_FREE = ("param", "key", "scalar", "cotangent")  # inputs that do not cross: they live where they are used, or are tiny


@dataclass(frozen=True)
class Flow:
    """A value that other nodes than its maker read.

    Attributes:
        maker: position of its node in planning order; -1 for an input of the graph.
        readers: positions of the nodes that read it or a view of it, ascending.
        nbytes: its size.
        active: whether a cotangent of the same size comes back from each reader.
    """

    maker: int
    readers: tuple[int, ...]
    nbytes: int
    active: bool

    @property
    def start(self) -> int:
        """Where it is first held: a graph's input where it is first read."""
        return self.maker if self.maker >= 0 else self.readers[0]

    def moved(self, place: np.ndarray) -> Flow:
        """The same when node ``p`` is at position ``place[p]``."""
        maker = int(place[self.maker]) if self.maker >= 0 else -1
        return replace(self, maker=maker, readers=tuple(sorted(int(place[reader]) for reader in self.readers)))


def flows_of(joint: Graph, primal: Graph, order: Sequence[Node]) -> tuple[Flow, ...]:
    """The values of ``primal`` between its nodes, which are laid out in ``order``."""
    cheap, active = cheap_values(primal), _active(joint, order)
    free = {port.value.name for port in primal.inputs if port.kind in _FREE}
    roots: dict[str, Value | None] = {}
    makers: dict[str, int] = {}
    readers: dict[str, dict[int, None]] = {}
    values: dict[str, Value] = {}
    for index, node in enumerate(order):
        for value in node.inputs:
            root = roots.get(value.name, value)
            if root is not None and root.name not in free:
                readers.setdefault(root.name, {})[index] = None
                values.setdefault(root.name, root)
        for value in node.outputs:
            if node.op in RECOMPUTED and node.inputs:
                roots[value.name] = roots.get(node.inputs[0].name, node.inputs[0])
            elif value.name in cheap:
                roots[value.name] = None
            else:
                makers[value.name] = index
    return tuple(
        Flow(makers.get(name, -1), tuple(own), values[name].type.nbytes, name in active)
        for name, own in readers.items()
    )


def _active(joint: Graph, order: Sequence[Node]) -> set[str]:
    """Names of forward values that have cotangents: they depend smoothly on what gradients are asked for."""
    targets = {port.target for port in joint.outputs_of("grad")}
    active = {port.value.name for port in joint.inputs if port.ref in targets}
    for node in order:
        if REGISTRY[node.op].vjp is not NOT_DIFFERENTIABLE and any(value.name in active for value in node.inputs):
            active.update(value.name for value in node.outputs if value.type.differentiable)
    return active


def crossing(flows: Sequence[Flow], count: int) -> tuple[np.ndarray, np.ndarray]:
    """[count + 1] bytes of values, and of cotangents, that cross each position of the planning order."""
    sent, returned = np.zeros(count + 2), np.zeros(count + 2)
    for flow in flows:
        for steps, counts in ((sent, True), (returned, flow.active)):
            if counts:
                steps[flow.start + 1] += flow.nbytes
                steps[flow.readers[-1] + 1] -= flow.nbytes
    return np.cumsum(sent)[:-1], np.cumsum(returned)[:-1]
