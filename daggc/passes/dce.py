"""Dead code elimination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from daggc.ir.graph import Graph, Node, Program
from daggc.passes.manager import Pass, register_pass

_EFFECTS = ("python.call",)  # a user's function may print or record; it runs even if nothing reads its result


def live_nodes(graph: Graph, roots: set[str]) -> list[Node]:
    """The nodes that the named values need, in order; nodes with effects are not roots here."""
    needed = set(roots)
    live: list[Node] = []
    for node in reversed(graph.nodes):
        if any(value.name in needed for value in node.outputs):
            live.append(node)
            needed.update(value.name for value in node.inputs)
    return live[::-1]


def eliminate(graph: Graph) -> Graph:
    """Drop nodes that no output and no effect needs."""
    roots = {port.value.name for port in graph.outputs}
    roots |= {value.name for node in graph.nodes if node.holds(*_EFFECTS) for value in node.outputs}
    return Graph(graph.name, graph.inputs, tuple(live_nodes(graph, roots)), graph.outputs)


@register_pass
@dataclass(frozen=True)
class DCE(Pass):
    """Drop nodes that no output needs; opaque Python functions stay."""

    name: ClassVar[str] = "dce"

    def apply(self, program: Program) -> Program:
        return program.map_graphs(eliminate, str(self))
