"""Take ``checkpoint`` regions apart: their nodes in their place, so that analyses see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from daggc.ir.builder import Builder
from daggc.ir.graph import Graph, Node, Program, Value
from daggc.ops.control_vjp import inline
from daggc.passes.manager import Pass, register_pass
from daggc.passes.rewrite import rebuild


def inline_checkpoints(graph: Graph) -> Graph:
    """The graph without ``checkpoint`` nodes; what they recompute is kept for the backward instead."""

    def visit(b: Builder, node: Node, inputs: Sequence[Value]) -> Sequence[Value] | None:
        return inline(b, node.attrs["body"], inputs) if node.op == "checkpoint" else None

    return rebuild(graph, visit)


@register_pass
@dataclass(frozen=True)
class Uncheckpoint(Pass):
    """Put the nodes of ``checkpoint`` regions in their place."""

    name: ClassVar[str] = "uncheckpoint"

    def apply(self, program: Program) -> Program:
        return program.map_graphs(inline_checkpoints, str(self))
