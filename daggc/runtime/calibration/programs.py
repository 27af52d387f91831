"""The graphs of a user's program that are worth running to time their nodes, in pieces that fit a worker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from daggc.errors import DifferentiationError
from daggc.ir.graph import Graph, Node, Port, Program, Value
from daggc.passes.vjp import differentiate, simplify
from daggc.plan.cost import node_key

_ELSEWHERE = ("call", "transfer", "check")  # not ops of a body, or not to be given random numbers


def pieces(program: Program, largest: float, opaque: bool = False) -> list[Graph]:
    """Graphs that together have every distinct node of a program, those of one structure once.

    Args:
        program: one with ``@forward`` alone is differentiated first; of a placed one the bodies count.
        largest: bytes that the values of one piece may have together; a single node may have more.
        opaque: also nodes that run Python functions of the user's. They get random inputs.
    """
    seen: set[str] = set()
    kept: dict[str, Graph] = {}
    for graph in _graphs(program):
        for piece in _cut(graph, largest, opaque):
            new = {node_key(node) for node in piece.nodes} - seen
            if new:
                seen |= new
                kept.setdefault(piece.structure(), piece)
    return list(kept.values())


def _graphs(program: Program) -> Iterator[Graph]:
    if set(program.graphs) == {"forward"}:
        try:
            yield simplify(differentiate(program.forward))
        except DifferentiationError:
            yield program.forward
        return
    yield from program.graphs.values()


def _cut(graph: Graph, largest: float, opaque: bool) -> Iterator[Graph]:
    held: list[Node] = []
    total = 0.0
    for node in graph.nodes:
        size = float(sum(value.type.nbytes for value in node.outputs))
        skipped = node.op in _ELSEWHERE or (node.holds("python.call") and not opaque)
        if held and (skipped or total + size > largest):
            yield piece_of(graph, held)
            held, total = [], 0.0
        if not skipped:
            held.append(node)
            total += size
    if held:
        yield piece_of(graph, held)


def piece_of(graph: Graph, nodes: Iterable[Node]) -> Graph:
    """Some consecutive nodes as a graph of their own, without outputs: its values are dropped after their last use."""
    nodes = tuple(nodes)
    made = {value.name for node in nodes for value in node.outputs}
    kinds = {port.value.name: port.kind for port in graph.inputs}
    read: dict[str, Value] = {v.name: v for node in nodes for v in node.inputs if v.name not in made}
    inputs = tuple(Port(value, kinds.get(name, "value"), name) for name, value in read.items())
    return Graph(graph.name, inputs, nodes, ())
