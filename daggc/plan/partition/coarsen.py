"""Coarsening: forward nodes fused into units, of which a list scheduler has a few hundred.

Three things happen, in rounds, until nothing changes or few enough units are left:

    a -> b            a chain: b reads nothing but a (and what a has read), nothing but b reads a: fused, unless
                      the result were too large to share the work out evenly;
    a -> (b), c, d    a light unit with one source joins it: the others wait a moment longer for a;
    a, b -> (c) -> d  a light unit with one user joins it: d has to wait for a and b anyway.

A light unit is never fused into a heavy one that would then wait for the light one's other sources: that is how
parallel branches survive. "Source" and "user" are those of the transitive reduction, so that a residual connection
around a block does not hide that the block is a chain. All of this keeps the graph of units acyclic.

Views, masks and the like are not units. Each task that reads them makes them again, so they go with whoever reads
them first (:class:`Layout` tells), and what is read through them is read from where it really is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from daggc.ir.graph import Graph, Node
from daggc.plan.device import Cluster
from daggc.plan.outline import cheap_values
from daggc.plan.partition.work import Work

UNITS = 400  # more than this many units are fused further
PIECES = (1, 8)  # a device's share of the work is at least this many units: grains that are tried
LIGHT = 1 / 16  # of the largest unit: what is lighter is not worth a task
_ROUNDS = 40


@dataclass(frozen=True)
class Layout:
    """Which nodes are units of their own, and what they wait for.

    Attributes:
        floating: [n] whether each node is made again by whoever reads it.
        sources: for each node, the nodes it waits for, seen through floating ones.
        users: for each node, the nodes that read its outputs directly.
        host: for each node, the one whose unit it is counted with: itself, or its first user that does not float.
    """

    floating: np.ndarray
    sources: tuple[tuple[int, ...], ...]
    users: tuple[tuple[int, ...], ...]
    host: np.ndarray

    def stages(self, stage: np.ndarray) -> np.ndarray:
        """[n] stages of all nodes, from those of nodes that do not float.

        These go with those that read them. If they are of several stages, with what they are made from: there the
        cotangents of all readers are added.
        """
        found = stage.copy()
        for index in reversed(range(len(found))):
            if self.floating[index]:
                readers = {int(found[user]) for user in self.users[index]}
                sources = max((int(found[source]) for source in self.sources[index]), default=-1)
                found[index] = sources if len(readers) > 1 and sources >= 0 else min(readers)
        return found


def layout_of(primal: Graph, order: Sequence[Node], bound: np.ndarray) -> Layout:
    """Tell nodes that float from others.

    Args:
        order: ``primal``'s nodes in planning order.
        bound: [n] whether a node must stay on certain devices: then it does not float.
    """
    cheap = cheap_values(primal)
    makers = {value.name: index for index, node in enumerate(order) for value in node.outputs}
    direct = [tuple(dict.fromkeys(makers[v.name] for v in node.inputs if v.name in makers)) for node in order]
    users: list[list[int]] = [[] for _ in order]
    for index, own in enumerate(direct):
        for source in own:
            users[source].append(index)
    floating = np.array(
        [
            bool(users[index]) and not bound[index] and all(value.name in cheap for value in node.outputs)
            for index, node in enumerate(order)
        ],
        bool,
    )
    sources: list[tuple[int, ...]] = []
    through: list[tuple[int, ...]] = []
    for index, own in enumerate(direct):
        found = tuple(dict.fromkeys(root for source in own for root in through[source]))
        sources.append(found)
        through.append(found if floating[index] else (index,))
    host = np.arange(len(order))
    for index in reversed(range(len(order))):
        if floating[index]:
            host[index] = min(host[user] for user in users[index])
    return Layout(floating, tuple(sources), tuple(map(tuple, users)), host)


@dataclass(frozen=True)
class Units:
    """The graph of units, numbered in a topological order.

    Attributes:
        of: [n] the unit of each node.
        layout: of the nodes.
        forward: [U, D] seconds on each device; ``backward``: of the VJPs.
        resident, residuals, working: [U] bytes, see :class:`~daggc.plan.partition.work.Work`.
        allowed: [U, D] whether the user lets it be there.
        group: [U] number of its colocation group, -1 if it has none.
        sources: for each unit, the units it reads and the bytes of what it reads of each: forward, and back.
        users: for each unit, the same of those that read it.
    """

    of: np.ndarray
    layout: Layout
    forward: np.ndarray
    backward: np.ndarray
    resident: np.ndarray
    residuals: np.ndarray
    working: np.ndarray
    allowed: np.ndarray
    group: np.ndarray
    sources: tuple[dict[int, tuple[float, float]], ...]
    users: tuple[dict[int, tuple[float, float]], ...]

    @property
    def count(self) -> int:
        return len(self.resident)

    @property
    def seconds(self) -> np.ndarray:
        """[U, D] of forward and backward."""
        return self.forward + self.backward


def node_parallelism(primal: Graph, work: Work, cluster: Cluster, allowed: np.ndarray) -> float:
    """Work divided by that of the longest chain of nodes, on average devices: about what parallel devices can gain."""
    layout = layout_of(primal, work.nodes, np.any(~allowed, axis=1, keepdims=True)[:, 0])
    seconds = np.mean([work.seconds(device) for device in cluster.devices], axis=0)
    own = np.bincount(layout.host, seconds, len(work.nodes)).tolist()
    longest = [0.0] * len(own)
    for index, sources in enumerate(layout.sources):
        longest[index] = own[index] + max((longest[source] for source in sources), default=0.0)
    return sum(own) / max(max(longest, default=0.0), 1e-30)


def coarsen(primal: Graph, work: Work, cluster: Cluster, allowed: np.ndarray, pieces: int) -> Units:
    """Fuse the nodes of a work into units.

    Args:
        allowed: [n, D] whether each node may be on each device.
        pieces: how many units a device's share of the work is at least.
    """
    layout = layout_of(primal, work.nodes, np.any(~allowed, axis=1, keepdims=True)[:, 0])
    phases = [work.phases(device) for device in cluster.devices]
    hosted = [np.stack([np.bincount(layout.host, own[k], len(work.nodes)) for own in phases], axis=1) for k in (0, 1)]
    seconds = (hosted[0] + hosted[1]).mean(axis=1)
    held = np.bincount(layout.host, work.resident + work.residuals, len(work.nodes))
    room = min(device.memory for device in cluster.devices) / max(2, pieces)
    # the cap is below one device's share, and the largest node's if that is more
    cap = max(float(seconds.sum()) / (pieces * max(2, len(cluster.devices))), 1e-30)
    kinds = {own.tobytes(): number for number, own in enumerate(np.unique(allowed, axis=0))}
    colours = [kinds[own.tobytes()] for own in allowed]
    start = [index for index in range(len(work.nodes)) if not layout.floating[index]]
    fusion = _Fusion(start, layout.sources, seconds, held, colours, cap, room)
    light = LIGHT * cap
    for _ in range(_ROUNDS):
        before = fusion.count
        fusion.round(light)
        if fusion.count == before:
            if before <= UNITS or light > cap:
                break
            light *= 2
    return _units(work, layout, fusion.labels(), hosted, allowed)


class _Fusion:
    """A graph of clusters of nodes that shrinks. Clusters are named by any member, nodes by position."""

    def __init__(
        self,
        start: Sequence[int],
        sources: Sequence[tuple[int, ...]],
        seconds: np.ndarray,
        held: np.ndarray,
        colours: Sequence[int],
        cap: float,
        room: float,
    ) -> None:
        self.order = list(start)  # topological
        self.sources = {index: set(sources[index]) for index in start}
        self.seconds = {index: float(seconds[index]) for index in start}
        self.held = {index: float(held[index]) for index in start}
        self.colours, self.cap, self.room = colours, cap, room
        self.parent = {index: index for index in start}

    @property
    def count(self) -> int:
        return len(self.order)

    def find(self, index: int) -> int:
        root = index
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[index] != root:
            self.parent[index], index = root, self.parent[index]
        return root

    def labels(self) -> dict[int, int]:
        """The number of each node's unit, in topological order."""
        number = {cluster: index for index, cluster in enumerate(self.order)}
        return {index: number[self.find(index)] for index in self.parent}

    def reduced(self) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """Sources and users of each cluster in the transitive reduction."""
        bit = {cluster: 1 << index for index, cluster in enumerate(self.order)}
        before: dict[int, int] = {}  # all that come before a cluster, as a set of bits
        sources: dict[int, list[int]] = {}
        users: dict[int, list[int]] = {cluster: [] for cluster in self.order}
        for cluster in self.order:
            indirect = 0
            for source in self.sources[cluster]:
                indirect |= before[source]
            own = sorted(source for source in self.sources[cluster] if not bit[source] & indirect)
            sources[cluster] = own
            for source in own:
                indirect |= bit[source]
                users[source].append(cluster)
            before[cluster] = indirect
        return sources, users

    def round(self, light: float) -> None:
        """Fuse chains, then what is light."""
        sources, users = self.reduced()
        for cluster in self.order:
            own = sources[cluster]
            if len(own) == 1 and len(users[own[0]]) == 1:
                self.fuse(own[0], cluster, self.cap)
        self.contract()
        sources, users = self.reduced()
        absorbed: dict[int, float] = {}  # light seconds that each cluster took up in this round
        for cluster in self.order:
            seconds = self.seconds[self.find(cluster)]
            if seconds > light or self.find(cluster) != cluster or cluster in absorbed:
                continue
            near = sources[cluster] if len(sources[cluster]) == 1 else users[cluster]
            if len(near) == 1:
                target = self.find(near[0])
                taken = absorbed.get(target, 0.0) + seconds
                if taken <= 2 * light and self.fuse(target, cluster, max(self.cap, 2 * light)):
                    absorbed[self.find(target)] = taken
        self.contract()

    def fuse(self, first: int, second: int, cap: float) -> bool:
        a, b = self.find(first), self.find(second)
        if a == b or self.colours[a] != self.colours[b]:
            return False
        if self.seconds[a] + self.seconds[b] > cap or self.held[a] + self.held[b] > self.room:
            return False
        self.parent[b] = a
        self.seconds[a] += self.seconds[b]
        self.held[a] += self.held[b]
        self.sources[a] = self.sources[a] | self.sources[b]
        return True

    def contract(self) -> None:
        """Name clusters by their roots, and sort them topologically."""
        roots = [cluster for cluster in self.order if self.find(cluster) == cluster]
        self.sources = {a: {self.find(source) for source in self.sources[a]} - {a} for a in roots}
        waiting = {a: len(self.sources[a]) for a in roots}
        users: dict[int, list[int]] = {a: [] for a in roots}
        for a in roots:
            for source in self.sources[a]:
                users[source].append(a)
        order = [a for a in roots if not waiting[a]]
        for a in order:
            for user in users[a]:
                waiting[user] -= 1
                if not waiting[user]:
                    order.append(user)
        assert len(order) == len(roots), "fusing keeps the graph acyclic"
        self.order = order


def _units(
    work: Work, layout: Layout, labels: dict[int, int], hosted: Sequence[np.ndarray], allowed: np.ndarray
) -> Units:
    of = np.array([labels[int(host)] for host in layout.host], np.intp)
    count = int(of.max(initial=-1)) + 1
    working = np.zeros(count)
    np.maximum.at(working, of, work.working)
    may = np.ones((count, allowed.shape[1]), bool)
    np.logical_and.at(may, of[~layout.floating], allowed[~layout.floating])
    edges: list[dict[int, tuple[float, float]]] = [{} for _ in range(count)]
    for index, sources in enumerate(layout.sources):
        if not layout.floating[index]:
            for source in sources:
                if of[source] != of[index]:
                    edges[of[index]].setdefault(int(of[source]), (0.0, 0.0))
    for flow in work.flows:
        if flow.maker < 0:
            continue
        source = int(of[flow.maker])
        for reader in dict.fromkeys(int(of[r]) for r in flow.readers if not layout.floating[r]):
            if reader != source:
                sent, back = edges[reader].get(source, (0.0, 0.0))
                edges[reader][source] = sent + flow.nbytes, back + flow.nbytes * flow.active
    users: list[dict[int, tuple[float, float]]] = [{} for _ in range(count)]
    for unit, own in enumerate(edges):
        for source, nbytes in own.items():
            users[source][unit] = nbytes
    return Units(
        of=of,
        layout=layout,
        forward=_summed(of, hosted[0], count),
        backward=_summed(of, hosted[1], count),
        resident=np.bincount(of, work.resident, count),
        residuals=np.bincount(of, work.residuals, count),
        working=working,
        allowed=may,
        group=_groups(work, of, count),
        sources=tuple(edges),
        users=tuple(users),
    )


def _summed(of: np.ndarray, table: np.ndarray, count: int) -> np.ndarray:
    return np.stack([np.bincount(of, column, count) for column in table.T], axis=1)


def _groups(work: Work, of: np.ndarray, count: int) -> np.ndarray:
    """[U] a number for all units that some parameter ties together, directly or through others; -1 for none."""
    parent = list(range(count))

    def find(unit: int) -> int:
        while parent[unit] != unit:
            unit = parent[unit]
        return unit

    tied: set[int] = set()
    for span in work.spans:
        units = [int(of[use]) for use in span.uses]
        tied.update(units)
        for unit in units[1:]:
            low, high = sorted((find(units[0]), find(unit)))
            parent[high] = low
    return np.array([find(unit) if unit in tied else -1 for unit in range(count)], np.intp)
