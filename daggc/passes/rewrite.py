"""The one way passes change a graph: rebuild it once, front to back, through a builder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from daggc.ir.builder import Builder
from daggc.ir.graph import Graph, Node, Value
from daggc.ops.opdef import REGISTRY

Visit = Callable[[Builder, Node, Sequence[Value]], Sequence[Value] | None]


def rebuild(graph: Graph, visit: Visit) -> Graph:
    """Rebuild ``graph``, giving each node to ``visit(builder, node, inputs)``.

    ``visit`` returns the values that stand for the node's outputs (emitting what they need), or None to keep
    the node. Names survive where nodes do.
    """
    b = REGISTRY.builder(graph.name)
    b.reserve(value.name for value in graph.values())
    values: dict[str, Value] = {port.value.name: b.adopt(port) for port in graph.inputs}
    for node in graph.nodes:
        inputs = [values[value.name] for value in node.inputs]
        with b.at(node.path, node.source, node.origin):
            outputs = visit(b, node, inputs)
        if outputs is None:
            outputs = b.append(node, inputs)
        for old, new in zip(node.outputs, outputs, strict=True):
            values[old.name] = new
    for port in graph.outputs:
        b.output(values[port.value.name], port.kind, port.target)
    return b.build()
