"""The order in which forward nodes are laid out before they are cut into segments.

Program order, but for two things. A node that uses a shared parameter and depends on nothing but graph inputs
(the decoder's embedding of a T5, whose table the encoder has used) moves next to the parameter's first use, so
that no cut has to be forbidden between them. And nodes that the user pinned to one device are kept together
where they are independent (two towers), so that their device gets one segment and not many.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from daggc.ir.graph import Graph, Node
from daggc.ops import REGISTRY
from daggc.passes.split import RECOMPUTED

_NEAR = 64  # ancestors that a hoisted node may take along
_LIGHT = ("elementwise", "view")


def planning_order(graph: Graph, pins: Sequence[int | None]) -> list[Node]:
    """The nodes of a graph in a topological order that cuts well.

    Args:
        pins: for each node, the device it is pinned to or None.
    """
    makers = {value.name: index for index, node in enumerate(graph.nodes) for value in node.outputs}
    sources = [sorted({makers[v.name] for v in node.inputs if v.name in makers}) for node in graph.nodes]
    keys: list[tuple[int, int]] = [(index, index) for index in range(len(graph.nodes))]
    for first, moved in _hoisted(graph, sources):
        for index in moved:
            keys[index] = min(keys[index], (first, index))
    return [graph.nodes[index] for index in _sorted(sources, keys, pins)]


def parameter_users(graph: Graph) -> dict[str, list[int]]:
    """For each parameter's port ref, the indices of the nodes that make views of it or read one, in order."""
    refs = {port.value.name: port.ref for port in graph.inputs if port.kind == "param"}
    users: dict[str, list[int]] = {ref: [] for ref in refs.values()}
    for index, node in enumerate(graph.nodes):
        read = dict.fromkeys(refs[value.name] for value in node.inputs if value.name in refs)
        for ref in read:
            users[ref].append(index)
            if node.op in RECOMPUTED:  # a view stands for the parameter where it is read
                refs.update((value.name, ref) for value in node.outputs)
    return users


def _hoisted(graph: Graph, sources: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
    """Pairs of a parameter's first use and the nodes that move next to it."""
    params = {port.value.name for port in graph.inputs if port.kind == "param"}
    heavy = [
        any(value.name in params for value in node.inputs) or REGISTRY[node.op].cost(node).op_class not in _LIGHT
        for node in graph.nodes
    ]
    pairs: list[tuple[int, list[int]]] = []
    for users in parameter_users(graph).values():
        for user in users[1:]:
            if graph.nodes[user].op in RECOMPUTED:
                continue
            ancestors = _light_ancestors(user, sources, heavy)
            if ancestors is not None:
                pairs.append((users[0], [*ancestors, user]))
    return pairs


def _light_ancestors(user: int, sources: Sequence[Sequence[int]], heavy: Sequence[bool]) -> list[int] | None:
    """All ancestors of a node, or None if one of them is heavy or there are many."""
    found: dict[int, None] = {}
    pending = list(sources[user])
    while pending:
        index = pending.pop()
        if index in found:
            continue
        if heavy[index] or len(found) >= _NEAR:
            return None
        found[index] = None
        pending += sources[index]
    return list(found)


def _sorted(sources: Sequence[Sequence[int]], keys: Sequence[tuple[int, int]], pins: Sequence[int | None]) -> list[int]:
    """A topological order: of what is ready the lowest key, first among nodes that need no change of device."""
    users: list[list[int]] = [[] for _ in sources]
    waiting = [len(own) for own in sources]
    for index, own in enumerate(sources):
        for source in own:
            users[source].append(index)
    ready: dict[int | None, list[tuple[tuple[int, int], int]]] = {}
    for index, count in enumerate(waiting):
        if count == 0:
            heapq.heappush(ready.setdefault(pins[index], []), (keys[index], index))
    order: list[int] = []
    current: int | None = None
    while len(order) < len(sources):
        group = _next_group(ready, current)
        current = current if group is None else group
        _, index = heapq.heappop(ready[group])
        order.append(index)
        for user in users[index]:
            waiting[user] -= 1
            if waiting[user] == 0:
                heapq.heappush(ready.setdefault(pins[user], []), (keys[user], user))
    return order


def _next_group(ready: Mapping[int | None, list], current: int | None) -> int | None:
    """The group to take the next node from: free nodes or those of the current device, then any."""
    heads = {group: heap[0] for group, heap in ready.items() if heap}
    near = [group for group in heads if group is None or group == current]
    return min(near or heads, key=lambda group: heads[group])
