"""What a task's body allocates: its results, and the workspace it needs while it runs."""

from __future__ import annotations

from dataclasses import dataclass

from daggc.ir.graph import Graph, Node
from daggc.ops import REGISTRY
from daggc.plan.liveness import SPREAD, shares_memory


@dataclass(frozen=True)
class Allocation:
    """Bytes that running a body allocates.

    Attributes:
        outputs: for each output, the bytes that it holds. A view of an input holds none; of results that share
            memory, the first holds all of it.
        shares: for each output, the number of the output whose memory it is in; -1 for an input's.
        workspace: the most that it holds at a time beside its inputs and outputs, its kernels' included.
        allocated: all that it allocates, one after the other.
    """

    outputs: tuple[float, ...]
    shares: tuple[int, ...]
    workspace: float
    allocated: float


def allocation_of(body: Graph) -> Allocation:
    """Follow a body as generated code runs it: node by node, each value freed after its last reader.

    Views share the memory of what they are views of; optimizer state may be updated in place (``donate``).
    """
    root: dict[str, str] = {port.value.name: "" for port in body.inputs}
    spread: set[str] = set()
    size: dict[str, int] = {"": 0}
    last: dict[str, int] = {}
    for index, node in enumerate(body.nodes):
        source = node.inputs[0].name if node.op != "call" and shares_memory(node, spread) else None
        for place, value in enumerate(node.outputs):
            name = root[source] if source is not None else ("" if place and _in_place(node) else value.name)
            root[value.name] = name
            if source is not None and (node.op in SPREAD or source in spread):
                spread.add(value.name)
            if name == value.name:
                size[name] = value.type.nbytes
            last[name] = index
        for value in node.inputs:
            last[root[value.name]] = index
    given = [root[port.value.name] for port in body.outputs]
    held = {"": True, **dict.fromkeys(given, True)}
    now, peak, allocated = 0, 0.0, 0.0
    dying: dict[int, list[str]] = {}
    for name, index in last.items():
        if name not in held:
            dying.setdefault(index, []).append(name)
    total = 0
    for index, node in enumerate(body.nodes):
        for value in node.outputs:
            if root[value.name] == value.name:
                now += size[value.name]
                allocated += size[value.name]
                total += size[value.name] if value.name in held else 0
        kernel = 0.0 if node.op == "call" else REGISTRY[node.op].cost(node).workspace
        peak, allocated = max(peak, now + kernel), allocated + kernel
        now -= sum(size[name] for name in dying.get(index, ()))
    shares = tuple(given.index(name) if name else -1 for name in given)
    outputs = tuple(
        float(size[name]) if own == place else 0.0 for place, (name, own) in enumerate(zip(given, shares, strict=True))
    )
    return Allocation(outputs, shares, float(max(peak - total, 0)), allocated)


def _in_place(node: Node) -> bool:
    """Whether all results but the first are written into inputs: optimizer state."""
    return bool(node.attrs.get("donate", False))
