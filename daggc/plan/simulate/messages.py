"""The messages of a step: values that go the same way, from one task to one task, go together."""

from __future__ import annotations

from dataclasses import dataclass

from daggc.ir.graph import Graph


@dataclass(frozen=True)
class Message:
    """Values on their way from a device to another.

    Attributes:
        transfers: indices of the nodes, in order.
        nbytes: of all of them.
    """

    source: str
    target: str
    transfers: tuple[int, ...]
    nbytes: int


def messages_of(step: Graph) -> list[Message]:
    """The messages, in the order of their first transfers."""
    makers = {value.name: index for index, node in enumerate(step.nodes) for value in node.outputs}
    readers = {value.name: index for index, node in reversed([*enumerate(step.nodes)]) for value in node.inputs}
    ways: dict[tuple[int | str | None, int | None, str], list[int]] = {}
    for index, node in enumerate(step.nodes):
        if node.op == "transfer":
            value = node.inputs[0]
            way = makers.get(value.name, value.type.device), readers.get(node.output.name), str(node.attrs["device"])
            ways.setdefault(way, []).append(index)
    return [
        Message(
            str(step.nodes[transfers[0]].inputs[0].type.device),
            target,
            tuple(transfers),
            sum(step.nodes[index].output.type.nbytes for index in transfers),
        )
        for (_, _, target), transfers in ways.items()
    ]
