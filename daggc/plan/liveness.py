"""How many bytes a task's body needs while it runs: values are freed after their last use, views share memory."""

from __future__ import annotations

from daggc.ir.graph import Graph, Node
from daggc.ops import REGISTRY

SPREAD = ("permute", "broadcast", "slice", "diagonal")  # views whose elements no longer lie one after the other


def peak_bytes(graph: Graph) -> int:
    """The most bytes of values made by ``graph`` that are alive at once, outputs included and inputs not.

    A view is the memory of what it views; ``reshape`` of one whose elements are spread is a copy. What kernels
    need for themselves is not counted.
    """
    memory: dict[str, str] = {port.value.name: "" for port in graph.inputs}  # value -> who made its memory; "": given
    spread: set[str] = set()
    sizes: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        for value in node.inputs:
            last[memory[value.name]] = index
        for value in node.outputs:
            if shares_memory(node, spread):
                memory[value.name] = memory[node.inputs[0].name]
                if node.op in SPREAD or node.inputs[0].name in spread:
                    spread.add(value.name)
            else:
                memory[value.name] = value.name
                sizes[value.name] = value.type.nbytes
            last[memory[value.name]] = index
    for port in graph.outputs:
        last[memory[port.value.name]] = len(graph.nodes)
    freed: dict[int, int] = {}
    for name, index in last.items():
        freed[index] = freed.get(index, 0) + sizes.get(name, 0)
    now = peak = 0
    for index, node in enumerate(graph.nodes):
        now += sum(sizes.get(value.name, 0) for value in node.outputs)
        peak = max(peak, now)
        now -= freed.get(index, 0)
    return peak


def shares_memory(node: Node, spread: set[str]) -> bool:
    """Whether a node's results are views of its first input. ``spread``: values whose elements are not in order."""
    if not node.inputs or REGISTRY[node.op].cost(node).op_class != "view":
        return False
    return node.op != "reshape" or node.inputs[0].name not in spread
