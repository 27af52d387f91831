"""List scheduling: which device each unit of a graph goes to, so that one batch is done early.

Units take the time of their forward and their VJP; an edge between devices takes the transfer of the value and of
its cotangent, both latencies, and the overhead of the further tasks that come of it. Three algorithms, all greedy:

* **HEFT** (Topcuoglu et al. 2002): units by falling upward rank (the longest way to the end, with mean times), each
  where it ends first; it may go into a gap that is left on a device.
* **PEFT** (Arabnejad and Barbosa 2014): where the end plus the optimistic cost of what follows is least. The table
  ``optimistic[u, d]`` is the time that the rest takes after unit u on device d if no device were ever busy.
* **m-ETF** (Jeon et al. 2020, "Baechi"): of all pairs of a ready unit and a device with room for it, that which can
  begin first.

A device without room for a unit (and for the rest of its colocation group, which follows it) is not taken. A unit
whose group has a place goes there.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from daggc.plan.device import Cluster
from daggc.plan.partition.coarsen import Units


@dataclass(frozen=True)
class Assignment:
    """Where units go.

    Attributes:
        device: [U] index of each unit's device.
        rank: [U] the units' places in the order in which they begin, which is topological.
    """

    device: np.ndarray
    rank: np.ndarray


@dataclass(frozen=True)
class Edges:
    """What an edge between two devices costs: ``fixed[a, b] + bytes * slope[a, b]`` seconds."""

    fixed: np.ndarray
    slope: np.ndarray

    @staticmethod
    def of(cluster: Cluster, passes: int) -> Edges:
        """``passes``: 2 if a cotangent comes back."""
        devices = cluster.devices
        links = [[cluster.between(a.name, b.name) for b in devices] for a in devices]
        overhead = np.array([device.overhead for device in devices])
        apart = ~np.eye(len(devices), dtype=bool)
        fixed = passes * (np.array([[link.latency for link in row] for row in links]) + overhead[None, :])
        return Edges(fixed * apart, np.array([[1 / link.bandwidth for link in row] for row in links]) * apart)

    def seconds(self, nbytes: tuple[float, float]) -> np.ndarray:
        """[D, D] seconds of a value, and its cotangent, from one device to another."""
        return self.fixed + sum(nbytes) * self.slope

    def mean(self, nbytes: tuple[float, float]) -> float:
        count = len(self.fixed)
        pairs = max(count * (count - 1), 1)
        return float(self.fixed.sum() + sum(nbytes) * self.slope.sum()) / pairs


class _Placing:
    """Units placed one by one: where they are, when devices are busy, and what memory is left."""

    def __init__(self, units: Units, cluster: Cluster, passes: int, in_flight: int) -> None:
        self.units, self.edges = units, Edges.of(cluster, passes)
        self.seconds = units.seconds
        count, devices = self.seconds.shape
        self.device = np.full(count, -1)
        self.start, self.end = np.zeros(count), np.zeros(count)
        self.gaps: list[list[tuple[float, float]]] = [[(0.0, np.inf)] for _ in range(devices)]
        self.room = np.array([device.memory for device in cluster.devices])
        self.working = np.zeros(devices)
        self.held = units.resident + in_flight * units.residuals
        self.home: dict[int, int] = {}  # colocation group -> device
        self.members: dict[int, list[int]] = {}
        for unit, group in enumerate(units.group):
            if group >= 0:
                self.members.setdefault(int(group), []).append(unit)

    def devices_for(self, unit: int) -> np.ndarray:
        """[D] whether the unit may go to each device."""
        group = int(self.units.group[unit])
        if group in self.home:
            return np.arange(len(self.room)) == self.home[group]
        members = self.members.get(group, [unit])
        held, working = self.held[members].sum(), self.units.working[members].max()
        fits = held + np.maximum(self.working, working) <= self.room
        return fits & self.units.allowed[members].all(axis=0)

    def arrival(self, unit: int) -> np.ndarray:
        """[D] when all that the unit reads is on each device."""
        times = np.zeros(len(self.room))
        for source, nbytes in self.units.sources[unit].items():
            np.maximum(times, self.end[source] + self.edges.seconds(nbytes)[self.device[source]], out=times)
        return times

    def beginning(self, unit: int, device: int, ready: float) -> float:
        """When a device has a gap for the unit."""
        seconds = self.seconds[unit, device]
        return next(max(a, ready) for a, b in self.gaps[device] if max(a, ready) + seconds <= b)

    def options(self, unit: int) -> list[tuple[int, float]]:
        """Devices that the unit may go to, and when it would begin there."""
        times = self.arrival(unit)
        allowed = np.flatnonzero(self.devices_for(unit)).tolist()
        return [(device, self.beginning(unit, device, times[device])) for device in allowed]

    def put(self, unit: int, device: int, start: float) -> None:
        end = start + self.seconds[unit, device]
        self.device[unit], self.start[unit], self.end[unit] = device, start, end
        gap = next(index for index, (a, b) in enumerate(self.gaps[device]) if a <= start and end <= b)
        a, b = self.gaps[device].pop(gap)
        for piece in ((a, start), (end, b)):
            if piece[0] < piece[1]:
                insort(self.gaps[device], piece)
        group = int(self.units.group[unit])
        if group not in self.home:
            members = self.members.get(group, [unit])
            self.room[device] -= self.held[members].sum()
            self.working[device] = max(self.working[device], self.units.working[members].max())
            if group >= 0:
                self.home[group] = device

    def near(self, unit: int, device: int) -> bool:
        """Whether the unit would be where something is that it reads; ties go there."""
        return any(self.device[source] == device for source in self.units.sources[unit])

    def assignment(self) -> Assignment:
        # units are numbered topologically, which decides between those that begin together
        order = np.lexsort((np.arange(len(self.start)), self.start))
        return Assignment(self.device, np.argsort(order))


def _ready_by(units: Units, priority: np.ndarray) -> Iterable[int]:
    """Units in a topological order, of the ready ones that of the highest priority first."""
    waiting = [len(own) for own in units.sources]
    priority = np.round(priority / max(float(priority.max(initial=0)), 1e-30), 9)  # ties are not left to rounding
    ready = [(-priority[unit], unit) for unit, count in enumerate(waiting) if not count]
    heapq.heapify(ready)
    while ready:
        _, unit = heapq.heappop(ready)
        yield unit
        for user in units.users[unit]:
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, (-priority[user], user))


def upward_rank(units: Units, edges: Edges) -> np.ndarray:
    """[U] the longest way from the beginning of each unit to the end, with mean times."""
    mean = units.seconds.mean(axis=1)
    rank = mean.copy()
    for unit in reversed(range(units.count)):
        after = [rank[user] + edges.mean(nbytes) for user, nbytes in units.users[unit].items()]
        rank[unit] += max(after, default=0.0)
    return rank


def optimistic_costs(units: Units, edges: Edges) -> np.ndarray:
    """[U, D] the least time from the end of each unit on each device to the end of everything."""
    seconds = units.seconds
    table = np.zeros(seconds.shape)
    for unit in reversed(range(units.count)):
        for user, nbytes in units.users[unit].items():
            rest = (edges.seconds(nbytes) + (table[user] + seconds[user])[None, :]).min(axis=1)
            np.maximum(table[unit], rest, out=table[unit])
    return table


def heft(units: Units, cluster: Cluster, passes: int, in_flight: int) -> Assignment | None:
    """See the module; None if some unit fits nowhere."""
    placing = _Placing(units, cluster, passes, in_flight)
    rank = upward_rank(units, placing.edges)
    return _each_in_turn(placing, rank, lambda unit, device: 0.0)


def peft(units: Units, cluster: Cluster, passes: int, in_flight: int) -> Assignment | None:
    """See the module; None if some unit fits nowhere."""
    placing = _Placing(units, cluster, passes, in_flight)
    table = optimistic_costs(units, placing.edges)
    return _each_in_turn(placing, table.mean(axis=1), lambda unit, device: table[unit, device])


def _each_in_turn(placing: _Placing, priority: np.ndarray, further: Callable[[int, int], float]) -> Assignment | None:
    """Put units, by priority, where their end, and what is to come ``further``, is first."""
    for unit in _ready_by(placing.units, priority):
        options = placing.options(unit)
        if not options:
            return None
        device, start = min(
            options,
            key=lambda o: (
                o[1] + placing.seconds[unit, o[0]] + further(unit, o[0]), not placing.near(unit, o[0]), o[0]
            ),
        )  # fmt: skip
        placing.put(unit, device, start)
    return placing.assignment()


def m_etf(units: Units, cluster: Cluster, passes: int, in_flight: int) -> Assignment | None:
    """See the module; None if some unit fits nowhere."""
    placing = _Placing(units, cluster, passes, in_flight)
    rank = upward_rank(units, placing.edges)
    waiting = [len(own) for own in units.sources]
    ready = [unit for unit, count in enumerate(waiting) if not count]
    arrivals = {unit: placing.arrival(unit) for unit in ready}
    free = np.zeros(len(placing.room))  # no insertion: units begin one after another
    while ready:
        best: tuple[tuple[float, float, bool, int, int], int] | None = None
        for unit in ready:
            allowed = placing.devices_for(unit)
            if not allowed.any():
                return None
            begin = np.where(allowed, np.maximum(arrivals[unit], free), np.inf)
            least = float(begin.min())
            if best is not None and least > best[0][0]:
                continue
            for device in np.flatnonzero(begin == least).tolist():
                key = least, -float(rank[unit]), not placing.near(unit, device), device, unit
                if best is None or key < best[0]:
                    best = key, unit
        assert best is not None
        (start, _, _, device, _), unit = best
        placing.put(unit, device, start)
        free[device] = placing.end[unit]
        ready.remove(unit)
        del arrivals[unit]
        for user in units.users[unit]:
            waiting[user] -= 1
            if not waiting[user]:
                ready.append(user)
                arrivals[user] = placing.arrival(user)
    return placing.assignment()


ALGORITHMS: dict[str, Callable[[Units, Cluster, int, int], Assignment | None]] = {
    "HEFT": heft,
    "PEFT": peft,
    "m-ETF": m_etf,
}
