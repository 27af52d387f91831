"""Rematerialization: the backward computes some forward values again rather than keep them in memory meanwhile.

Which ones is a minimum cut (as in PyTorch's AOTAutograd): in the graph of forward values, each with its bytes as
capacity, between what is at hand when the backward runs and what it reads. The values on the cut are kept;
those beyond it are computed again, just before the first node that reads them.

    x ──► linear ──► gelu ──► linear          kept: x and the first linear's result;
               │       │         │            gelu's result is computed again
               ▼       ▼         ▼
            backward of each reads its input

Nodes come in groups (the blocks of a model): a group computes again only its own values, from what enters it, so
that what is computed again for one group is gone before the next.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from daggc.errors import IRError
from daggc.ir.graph import Graph, Node, Program, Value
from daggc.ops import REGISTRY
from daggc.passes.dce import live_nodes
from daggc.passes.manager import Pass, register_pass
from daggc.passes.split import RECOMPUTED, join, split

_NEVER = ("python.call", "torch.call", "call", "check")  # what they do is not known, or done once
_HEAVY = ("gemm", "conv", "attention", "opaque")
_MOST = 2**30  # of the sum of all capacities: the flow is computed in 32 bits


def rematerialize(
    joint: Graph, outputs: Collection[str], group_of: Callable[[Node], int], again: Callable[[Node], bool]
) -> Graph:
    """Compute forward values again in the backward where that keeps fewer bytes.

    Args:
        joint: what ``differentiate`` made; common subexpressions must not be merged after this.
        outputs: refs of the outputs of the graph that was differentiated: what they need is the forward.
        group_of: the group of a node of the joint graph, in ascending order along the forward.
        again: whether a forward node may be computed again.
    """
    roots = {port.value.name for port in joint.outputs if port.ref in outputs}
    roots |= {value.name for node in joint.nodes if node.holds("python.call") for value in node.outputs}
    first = {node.outputs[0].name for node in live_nodes(joint, roots)}
    forward = [node for node in joint.nodes if node.outputs[0].name in first]
    backward = [node for node in joint.nodes if node.outputs[0].name not in first]
    groups: dict[int, list[Node]] = {}
    home = {value.name: group_of(node) for node in forward for value in node.outputs}
    for node in forward:
        groups.setdefault(group_of(node), []).append(node)
    kept = {port.value.name for port in joint.outputs if port.kind == "grad"}  # a gradient may be a forward value
    reads: dict[int, set[str]] = {}
    for node in backward:
        for value in node.inputs:
            if home.get(value.name) == group_of(node):
                reads.setdefault(group_of(node), set()).add(value.name)
            else:
                kept.add(value.name)
    beyond: set[str] = set()
    for group in sorted(groups, reverse=True):  # what a group needs to begin with, the ones before it keep
        found = _cut(groups[group], reads.get(group, set()), kept, set(home), again)
        beyond |= found
        kept |= {value.name for node in groups[group] if found & _names(node.outputs) for value in node.inputs} - found
    return _rewrite(joint, forward, set(first), beyond, group_of)


def _names(values: Sequence[Value]) -> set[str]:
    return {value.name for value in values}


def _cut(
    nodes: Sequence[Node], reads: set[str], kept: set[str], forward: set[str], again: Callable[[Node], bool]
) -> set[str]:
    """Names of the values of a group that are computed again."""
    flow = _Flow()
    for node in nodes:
        fixed = node.holds(*_NEVER) or not again(node)
        for value in node.inputs:
            flow.add_value(value, 0 if value.name in kept or value.name not in forward else value.type.nbytes)
        for value in node.outputs:
            view = node.op in RECOMPUTED and value.name not in kept
            flow.add_value(value, None if view else 0 if value.name in kept else value.type.nbytes)
            if fixed:
                flow.begins.add(value.name)
            flow.edges += [(source.name, value.name) for source in node.inputs]
    own = {value.name for node in nodes for value in node.outputs}
    flow.begins |= set(flow.capacity) - own | {v.name for node in nodes if not node.inputs for v in node.outputs}
    flow.ends = reads & own
    if not flow.ends:
        return set()
    constants = {v.name for node in nodes if not node.inputs and node.op in RECOMPUTED for v in node.outputs}
    for name in constants:
        flow.capacity[name] = 0  # made from nothing, wherever it is read
    return flow.beyond() & own - constants


class _Flow:
    """A flow network in which values have capacities."""

    def __init__(self) -> None:
        self.capacity: dict[str, int | None] = {}  # None: unlimited
        self.edges: list[tuple[str, str]] = []
        self.begins: set[str] = set()
        self.ends: set[str] = set()

    def add_value(self, value: Value, capacity: int | None) -> None:
        self.capacity.setdefault(value.name, capacity)

    def beyond(self) -> set[str]:
        """The values on the far side of the minimum cut that is nearest to the ends."""
        number = {name: index for index, name in enumerate(self.capacity)}
        count = len(number)
        begin, end = 2 * count, 2 * count + 1
        limited = [capacity for capacity in self.capacity.values() if capacity is not None]
        unit = max(1, -(-sum(limited) // _MOST))
        without = 2 * _MOST - 1
        arcs: list[tuple[int, int, int]] = []  # a value has an entry 2k and an exit 2k + 1
        for name, capacity in self.capacity.items():
            size = without if capacity is None else -(-capacity // unit)
            if size:
                arcs.append((2 * number[name], 2 * number[name] + 1, size))
        arcs += [(2 * number[a] + 1, 2 * number[b], without) for a, b in dict.fromkeys(self.edges)]
        arcs += [(begin, 2 * number[name], without) for name in sorted(self.begins)]
        arcs += [(2 * number[name] + 1, end, without) for name in sorted(self.ends)]
        tails, heads, sizes = (np.array(column, np.int32) for column in zip(*arcs, strict=True))
        graph = csr_matrix((sizes, (tails, heads)), shape=(2 * count + 2,) * 2)
        flow = maximum_flow(graph, begin, end).flow
        left = graph - flow
        left.data = np.maximum(left.data, 0)
        left.eliminate_zeros()
        reaching = breadth_first_order(left.T.tocsr(), end, return_predecessors=False)
        near = set(reaching.tolist())
        return {name for name, index in number.items() if 2 * index in near}


def _rewrite(
    joint: Graph, forward: Sequence[Node], first: set[str], beyond: set[str], group_of: Callable[[Node], int]
) -> Graph:
    """The joint graph with copies of the nodes of ``beyond``, before the backward nodes that read them."""
    makers = {value.name: node for node in forward for value in node.outputs}
    position = {node.outputs[0].name: index for index, node in enumerate(forward)}
    b = REGISTRY.builder(joint.name)
    b.reserve(value.name for value in joint.values())
    values = {port.value.name: b.adopt(port) for port in joint.inputs}
    copies: dict[str, Value] = {}

    def bring(names: Sequence[str]) -> None:
        """Make the copies that these values need, in order of the forward."""
        needed: dict[str, Node] = {}
        pending = [name for name in names if name in beyond and name not in copies]
        while pending:
            node = makers[pending.pop()]
            if node.outputs[0].name not in needed:
                needed[node.outputs[0].name] = node
                pending += [v.name for v in node.inputs if v.name in beyond and v.name not in copies]
        for node in sorted(needed.values(), key=lambda node: position[node.outputs[0].name]):
            inputs = [copies.get(value.name, values.get(value.name, value)) for value in node.inputs]
            outputs = tuple(Value(f"{value.name}_again", value.type) for value in node.outputs)
            made = b.append(replace(node, outputs=outputs), inputs)
            copies.update(zip((value.name for value in node.outputs), made, strict=True))

    for node in joint.nodes:
        inputs = [values[value.name] for value in node.inputs]
        if node.outputs[0].name not in first:
            own = [v.name for v in node.inputs if v.name in makers and group_of(makers[v.name]) == group_of(node)]
            bring(own)
            inputs = [copies[v.name] if v.name in own and v.name in copies else values[v.name] for v in node.inputs]
        values.update(zip((value.name for value in node.outputs), b.append(node, inputs), strict=True))
    for port in joint.outputs:
        b.output(values[port.value.name], port.kind, port.target)
    return b.build()


def kept_bytes(joint: Graph, primal: Graph) -> int:
    """Bytes of the residuals that the two halves of a joint graph are joined by."""
    return sum(port.value.type.nbytes for port in split(joint, primal)[0].outputs_of("residual"))


LEVELS: Mapping[str, Callable[[Node], bool]] = {
    "cheap": lambda node: REGISTRY[node.op].cost(node).op_class not in _HEAVY,
    "full": lambda node: True,
}


@register_pass
@dataclass(frozen=True)
class Remat(Pass):
    """Compute values of @forward again in @backward.

    ``level``: ``cheap`` (no matrix products and the like) or ``full``.
    """

    name: ClassVar[str] = "remat"
    level: str = "cheap"

    def requires(self, program: Program) -> None:
        if self.level not in LEVELS:
            raise IRError(f"level is one of {', '.join(LEVELS)}, got {self.level!r}")

    def apply(self, program: Program) -> Program:
        if "backward" not in program.graphs:
            return program  # nothing is kept
        forward = program.forward
        primal = replace(forward, outputs=tuple(port for port in forward.outputs if port.kind != "residual"))
        joint = join(forward, program.backward)
        refs = {port.ref for port in primal.outputs}
        after = rematerialize(joint, refs, lambda node: 0, LEVELS[self.level])
        return replace(program, graphs={}).with_graphs(*split(after, primal), provenance=str(self))

    def ensures(self, before: Program, after: Program) -> None:
        """Residuals change, and @backward may read more of @forward's inputs; nothing else of the ports may change."""
        for name, graph in before.graphs.items():
            if _lasting(graph) != _lasting(after.graphs[name]):
                raise IRError(f"pass {self.name} changed the inputs or outputs of @{name}")


def _lasting(graph: Graph) -> list[tuple[str, object]]:
    ports = graph.outputs if graph.name == "backward" else (*graph.inputs, *graph.outputs)
    ports = (*ports, *graph.inputs_of("cotangent"))
    return sorted((port.ref, str(port.value.type)) for port in ports if port.kind != "residual")
