"""Common subexpression elimination: of equal nodes the first stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from daggc.ir.builder import Builder
from daggc.ir.graph import Graph, Node, Program, Value
from daggc.passes.manager import Pass, register_pass
from daggc.passes.rewrite import rebuild

_EFFECTS = ("python.call", "call", "transfer")


def merge_equal(graph: Graph, differentiated: bool = True) -> Graph:
    """Nodes of one op, the same inputs and the same attributes are computed once.

    Random ops take their key as an input, so two that are equal draw the same numbers.

    Args:
        differentiated: the derivatives are in the graph. If they are still to be made of it, casts stay apart:
            eager adds up their cotangents in the precision of what was cast.
    """
    seen: dict[tuple, Sequence[Value]] = {}

    def visit(b: Builder, node: Node, inputs: Sequence[Value]) -> Sequence[Value] | None:
        if node.holds(*_EFFECTS) or (not differentiated and _rounds(node)):
            return None
        # attributes compare as text: 1, 1.0 and True are equal in Python and different here
        key = (node.op, tuple(value.name for value in inputs), str(node.attrs))
        if key not in seen:
            seen[key] = b.append(node, inputs)
        return seen[key]

    return rebuild(graph, visit)


def _rounds(node: Node) -> bool:
    return node.op == "cast" and node.output.type.differentiable and node.inputs[0].type.differentiable


@register_pass
@dataclass(frozen=True)
class CSE(Pass):
    """Compute equal expressions once."""

    name: ClassVar[str] = "cse"

    def apply(self, program: Program) -> Program:
        return program.map_graphs(partial(merge_equal, differentiated="backward" in program.graphs), str(self))
