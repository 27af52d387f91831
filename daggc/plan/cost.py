"""How long a node takes on a device: what was measured of that node, else a curve of its op, else the roofline.

    t = max(launch + FLOPs / rate(op class), bytes / bandwidth)

Curves and measured times are there once a device was calibrated (:mod:`daggc.runtime.calibrate`). An opaque Python
function tells nothing of its work; each counts as one equal chunk of it, unless it was measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from daggc.ir.graph import Graph, Node, Program
from daggc.ops import REGISTRY
from daggc.ops.opdef import Cost, node_bytes
from daggc.plan.device import Device
from daggc.plan.layout import copying

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
    return device.overhead + body_seconds(graph, device)


def body_seconds(graph: Graph, device: Device) -> float:
    """Time of a task's inputs and nodes on a device: from its first argument to its last op."""
    return device.argument * len(graph.inputs) + float(Costs.of(graph.nodes).seconds(device).sum())


def node_key(node: Node) -> str:
    """What a node does, for measured times: op, input types, attributes; nothing of names, paths or devices."""
    types = ", ".join(str(value.type.with_(device=None)) for value in node.inputs)
    text = f"{node.op}({types}) {{{node.attrs}}}"
    return text if len(text) <= _LONGEST_KEY else f"{node.op}:{hashlib.sha256(text.encode()).hexdigest()[:24]}"


_LONGEST_KEY = 200
COPY = "copy"  # the curve of reshapes that move their elements


class Kind(NamedTuple):
    """What a node's curve is chosen by. ``op``: with its kernel, as ``matmul outer``, where it has several."""

    op: str
    dtype: str
    op_class: str


@dataclass(frozen=True)
class Costs:
    """Costs of many nodes as arrays, one entry a node.

    Attributes:
        flops: FLOPs.
        bytes: bytes read and written.
        kinds: index into ``names``, the kinds that occur.
        opaque: whether the node is a Python function.
        nodes: what they are the costs of.
    """

    flops: np.ndarray
    bytes: np.ndarray
    kinds: np.ndarray
    names: tuple[Kind, ...]
    opaque: np.ndarray
    nodes: tuple[Node, ...]

    @staticmethod
    def of(nodes: Iterable[Node]) -> Costs:
        """Costs of nodes in the order in which they run: a reshape copies if what makes its input lies so."""
        nodes = tuple(nodes)
        costs: list[Cost] = [REGISTRY[node.op].cost(node) for node in nodes]
        copies = copying(nodes, [cost.op_class for cost in costs])
        costs = [
            Cost(0, node_bytes(node), COPY) if copied else cost
            for node, cost, copied in zip(nodes, costs, copies, strict=True)
        ]
        kinds = [_kind(node, cost) for node, cost in zip(nodes, costs, strict=True)]
        names = tuple(sorted(set(kinds)))
        number = {kind: index for index, kind in enumerate(names)}
        return Costs(
            np.array([cost.flops for cost in costs], float),
            np.array([cost.bytes for cost in costs], float),
            np.array([number[kind] for kind in kinds], np.intp),
            names,
            np.array([node.holds("python.call") for node in nodes], bool),
            nodes,
        )

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Under which measured times of the nodes are found."""
        return tuple(
            f"{COPY} {node_key(node)}" if self.names[kind].op == COPY else node_key(node)
            for node, kind in zip(self.nodes, self.kinds, strict=True)
        )

    def seconds(self, device: Device) -> np.ndarray:
        """Time of each node on a device."""
        maps = device.flops, device.curves, device.profile, device.slowdown
        key = (*map(id, maps), device.launch, device.bandwidth)
        if key not in self._known:  # a cluster has many devices of few kinds
            self._known[key] = maps, self._seconds(device)
        return self._known[key][1].copy()

    @cached_property
    def _known(self) -> dict[tuple[float, ...], tuple[object, np.ndarray]]:
        """Times by what they follow from; with the mappings, so that these live as long as their ids are used."""
        return {}

    def _seconds(self, device: Device) -> np.ndarray:
        rates = np.array([device.rate(kind.op_class) for kind in self.names] or [1.0])
        views = np.array([kind.op_class == "view" for kind in self.names] or [False])
        launch = np.where(views[self.kinds], 0.2, 1.0) * device.launch
        times = np.maximum(launch + self.flops / rates[self.kinds], self.bytes / device.bandwidth)
        if device.curves:
            for index, kind in enumerate(self.names):
                curve = device.curve(*kind)
                if curve is not None:
                    here = self.kinds == index
                    times[here] = curve.seconds(self.flops[here], self.bytes[here])
        times = np.where(self.opaque, OPAQUE_SECONDS, times)
        if device.profile:
            measured = np.array([device.profile.get(key, np.nan) for key in self.keys])
            times = np.where(np.isnan(measured), times, measured)
        return times * self.slowdowns(device) if device.slowdown else times

    def slowdowns(self, device: Device) -> np.ndarray:
        """For each node, how many times as long it takes while the device's neighbours compute too."""
        factors = np.array([device.slowdown.get(kind.op_class, 1.0) for kind in self.names] or [1.0])
        return factors[self.kinds]


def _kind(node: Node, cost: Cost) -> Kind:
    dtype = node.outputs[0].type.dtype if node.outputs else ""
    if cost.op_class == COPY:
        return Kind(COPY, dtype, COPY)
    return Kind(f"{node.op} {cost.kernel}" if cost.kernel else node.op, dtype, cost.op_class)
