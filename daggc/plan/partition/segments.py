"""Candidate cut points, and the loads of all segments between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from daggc.plan.device import Cluster, Device
from daggc.plan.outline import unit_of
from daggc.plan.partition.work import Span, Work

POINTS = 256  # candidate cut points, about: more do not make cuts better, and time grows with their square


@dataclass(frozen=True)
class Points:
    """Candidate cut points of a work.

    Attributes:
        at: [K+1] positions in planning order, from 0 to n.
        between: [K+1] whether a point lies between two modules, where a reader would cut.
    """

    at: np.ndarray
    between: np.ndarray

    def sums(self, per_node: np.ndarray) -> np.ndarray:
        """[K+1, K+1]: the sum over the nodes from one point to another."""
        total = np.concatenate([[0.0], np.cumsum(per_node)])[self.at]
        return total[None, :] - total[:, None]

    def maxima(self, per_node: np.ndarray) -> np.ndarray:
        """[K+1, K+1]: the maximum over the nodes from one point to another, 0 where there are none."""
        blocks = np.maximum.reduceat(per_node, self.at[:-1])
        count = len(self.at)
        table = np.zeros((count, count))
        for first in range(count - 1):
            table[first, first + 1 :] = np.maximum.accumulate(blocks[first:])
        return table


def candidate_points(work: Work, seconds: np.ndarray, spans: Iterable[Span], forced: Iterable[int] = ()) -> Points:
    """Positions where cutting is allowed and cheap, spread evenly over the work.

    Args:
        seconds: time of each node, to spread by.
        spans: what no cut may tear apart.
        forced: positions to keep if they are allowed.
    """
    n = len(work.nodes)
    depth = np.zeros(n + 2)
    for span in spans:
        depth[span.uses[0] + 1] += 1
        depth[span.uses[-1] + 1] -= 1
    allowed = np.cumsum(depth)[: n + 1] == 0
    units = [unit_of(node.path) for node in work.nodes]
    between = np.array([True, *(a != b for a, b in pairwise(units)), True][: n + 1])
    inner = np.arange(1, n)[allowed[1:n]]
    if len(inner) > POINTS:
        done = np.concatenate([[0.0], np.cumsum(seconds)])[inner]
        bins = np.minimum((done / max(seconds.sum(), 1e-30) * (POINTS // 2)).astype(int), POINTS // 2 - 1)
        crossing = (work.sent + work.returned)[inner]
        ranked = np.lexsort((inner, ~between[inner], crossing, bins))
        # the two cheapest of each bin
        ordered = bins[ranked]
        rank = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
        inner = np.union1d(inner[ranked[rank < 2]], [p for p in forced if 0 < p < n and allowed[p]]).astype(int)
    at = np.concatenate([[0], inner, [n]]).astype(int) if n else np.array([0])
    return Points(at, between[at])


@dataclass(frozen=True)
class Segments:
    """Loads, memory and work of all segments between candidate points, on the devices of a cluster."""

    work: Work
    cluster: Cluster
    points: Points
    allowed: np.ndarray  # [n, D] whether each node may be on each device
    microbatches: int

    def seconds(self, device: Device) -> np.ndarray:
        """[K+1, K+1] seconds of computation, with the overhead of a segment's tasks."""
        return self.points.sums(self.work.seconds(device)) + device.overhead * self.work.passes

    def arrival(self, source: Device | None, target: Device | None) -> np.ndarray:
        """[K+1] seconds that moving what crosses each point, and cotangents back, keeps two devices busy.

        Latency is not counted: devices compute while they wait for a first byte.
        """
        if source is None or target is None:
            return np.zeros(len(self.points.at))
        crossing = (self.work.sent + self.work.returned)[self.points.at]
        return crossing / self.cluster.between(source.name, target.name).bandwidth

    def loads(self, device: Device, before: Device | None, after: Device | None) -> np.ndarray:
        """[K+1, K+1] seconds of a segment and of what comes in and goes out; infinite where it is empty."""
        loads = self.seconds(device)
        loads = loads + self.arrival(before, device)[:, None] + self.arrival(device, after)[None, :]
        return np.where(np.tri(len(self.points.at), dtype=bool), np.inf, loads)

    def memory(self, following: int) -> np.ndarray:
        """[K+1, K+1] bytes of a segment that ``following`` segments come after (1F1B holds that many more)."""
        inside = self.points.sums(self.work.resident)
        in_flight = min(self.microbatches, following + 1) if self.work.passes == 2 else 1
        inside = inside + in_flight * self.points.sums(self.work.residuals)
        return inside + self.points.maxima(self.work.working)

    def foreign(self, device: int) -> np.ndarray:
        """[K+1, K+1] how many nodes of a segment may not be on this device."""
        return self.points.sums((~self.allowed[:, device]).astype(float))

    def shares(self) -> np.ndarray:
        """[K+1, K+1] share of the model's FLOPs; of its time where there are functions of unknown FLOPs."""
        per_node = self.work.flops
        if self.work.opaque or not per_node.sum():
            per_node = self.work.seconds(self.cluster.devices[0])
        return self.points.sums(per_node / max(per_node.sum(), 1e-300))


def gaps_of(span: Span, seconds: np.ndarray) -> list[tuple[float, int, int]]:
    """Time between successive uses, and these two; the most time first."""
    done = np.concatenate([[0.0], np.cumsum(seconds)])
    gaps = [(float(done[after] - done[before + 1]), before, after) for before, after in pairwise(span.uses)]
    return sorted(gaps, key=lambda gap: (-gap[0], gap[1]))


def positions_of(points: Points, chosen: Sequence[int]) -> tuple[int, ...]:
    """Positions in planning order of numbers of points."""
    return tuple(int(points.at[index]) for index in chosen)
