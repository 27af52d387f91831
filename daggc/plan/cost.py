"""The roofline: how long a node takes on a device, from its FLOPs, its bytes and the device's rates.

    t = max(launch + FLOPs / rate(op class), bytes / bandwidth)

An opaque Python function tells nothing of its work; each counts as one equal chunk of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from daggc.ir.graph import Graph, Node, Program
from daggc.ops import REGISTRY
from daggc.ops.opdef import Cost
from daggc.plan.device import Device

OPAQUE_SECONDS = 1e-2  # a chunk, on any device: far above what the ops around it take


def node_cost(node: Node, program: Program | None = None) -> Cost:
    """FLOPs and bytes of a node; with ``program``, a call has those of its body."""
    if node.op == "call" and program is not None:
        flops, nbytes = graph_totals(program[str(node.attrs["callee"])], program)
        return Cost(flops, nbytes, "opaque")
    return REGISTRY[node.op].cost(node)


def node_seconds(node: Node, device: Device) -> float:
    """Time of one node on a device."""
    return float(Costs.of((node,)).seconds(device)[0])


def graph_totals(graph: Graph, program: Program | None = None) -> tuple[float, float]:
    """FLOPs and bytes of a graph; calls count what their bodies do."""
    costs = [node_cost(node, program) for node in graph.nodes]
    return sum(cost.flops for cost in costs), sum(cost.bytes for cost in costs)


def graph_flops(graph: Graph, program: Program | None = None) -> float:
    """FLOPs of a graph; calls count what their bodies do, when the program that has them is given."""
    return graph_totals(graph, program)[0]


def graph_seconds(graph: Graph, device: Device) -> float:
    """Time of a graph's nodes one after another on a device, with the overhead of one task."""
    return device.overhead + float(Costs.of(graph.nodes).seconds(device).sum())


@dataclass(frozen=True)
class Costs:
    """Costs of many nodes as arrays, one entry a node.

    Attributes:
        flops: FLOPs.
        bytes: bytes read and written.
        classes: index into ``names``, the op classes that occur.
        opaque: whether the node is a Python function.
    """

    flops: np.ndarray
    bytes: np.ndarray
    classes: np.ndarray
    names: tuple[str, ...]
    opaque: np.ndarray

    @staticmethod
    def of(nodes: Iterable[Node]) -> Costs:
        nodes = list(nodes)
        costs: Sequence[Cost] = [REGISTRY[node.op].cost(node) for node in nodes]
        names = tuple(sorted({cost.op_class for cost in costs}))
        number = {name: index for index, name in enumerate(names)}
        return Costs(
            np.array([cost.flops for cost in costs], float),
            np.array([cost.bytes for cost in costs], float),
            np.array([number[cost.op_class] for cost in costs], np.intp),
            names,
            np.array([node.holds("python.call") for node in nodes], bool),
        )

    def seconds(self, device: Device) -> np.ndarray:
        """Time of each node on a device."""
        rates = np.array([device.rate(name) for name in self.names] or [1.0])
        views = np.array([name == "view" for name in self.names] or [False])
        launch = np.where(views[self.classes], 0.2, 1.0) * device.launch
        times = np.maximum(launch + self.flops / rates[self.classes], self.bytes / device.bandwidth)
        return np.where(self.opaque, OPAQUE_SECONDS, times)
