"""The messages of a step: values that one task makes and one task waits for go together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from daggc.ir.graph import Graph


@dataclass(frozen=True, slots=True)
class Message:
    """Values on their way from a device to another.

    Attributes:
        tag: distinct in the graph.
        values: what they are called where they are made, and where they are read.
        maker: index of the call that makes them; -1 for inputs of the graph.
        reader: index of the node that reads them first; -1 if none does.
        transfers: indices of the nodes, in order.
        nbytes: of all of them.
    """

    tag: str
    source: str
    target: str
    values: tuple[tuple[str, str], ...] = ()
    maker: int = -1
    reader: int = -1
    transfers: tuple[int, ...] = ()
    nbytes: int = 0


def messages_of(graph: Graph, given: Collection[str] = ()) -> list[Message]:
    """The messages of a placed graph, in the order of their first transfers.

    Args:
        given: names of inputs that no device sends: every device that reads one has it.
    """
    makers = {value.name: index for index, node in enumerate(graph.nodes) for value in node.outputs}
    readers = {value.name: index for index, node in reversed([*enumerate(graph.nodes)]) for value in node.inputs}
    ways: dict[tuple[int, str, str, int], list[int]] = {}
    for index, node in enumerate(graph.nodes):
        if node.op == "transfer" and (value := node.inputs[0]).name not in given:
            ends = str(value.type.device), str(node.attrs["device"])
            way = makers.get(value.name, -1), *ends, readers.get(node.output.name, -1)
            ways.setdefault(way, []).append(index)
    return [
        Message(
            graph.nodes[transfers[0]].output.name,
            source,
            target,
            tuple((graph.nodes[index].inputs[0].name, graph.nodes[index].output.name) for index in transfers),
            maker,
            reader,
            tuple(transfers),
            sum(graph.nodes[index].output.type.nbytes for index in transfers),
        )
        for (maker, source, target, reader), transfers in ways.items()
    ]
