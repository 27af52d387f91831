"""From units on devices to stages: as few tasks as can be had without losing what runs in parallel.

A task runs as a whole: it begins when all its inputs are there, and others get its results when it ends. So two
towers must not be one task with what comes before or after them:

    device 0:  stem  A1  A2  join        stages:  0 {stem}  1 {A1, A2}  3 {join}
    device 1:        B1  B2                                 2 {B1, B2}

On each device the units, in the order in which the list schedule begins them, are cut into runs: after a unit that
another device reads, and before one that reads another device. No run then waits longer than its first unit, or
gives anything later than its last. (The quotient is acyclic: units begin in an order that edges never go against,
and a path between devices leaves a run at its end and enters it at its beginning.)

That is often too fine. So runs that are neighbours on their device are fused where the predicted time does not
grow, and single runs are moved to other devices where it falls; predicted by the longest path through the forward
and the backward of all runs, which devices take in one order, and back in the reverse of it. Every task's overhead
counts there, so that fusing usually pays.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from daggc.plan.device import Cluster
from daggc.plan.partition.coarsen import Units
from daggc.plan.partition.flows import Flow
from daggc.plan.partition.listing import Assignment, Edges

EVALUATIONS = 600  # predictions that one search makes at most
SLACK = 1.005  # what fewer tasks may cost


@dataclass(frozen=True)
class Placement:
    """Stages of nodes in planning order.

    Attributes:
        stage: [n] stage of each node; along no edge it falls.
        devices: index of the device of each stage.
    """

    stage: np.ndarray
    devices: tuple[int, ...]


@dataclass(frozen=True)
class _Runs:
    """Runs of units. ``of``: [U] the run of each unit; ``device``: of each run."""

    of: tuple[int, ...]
    device: tuple[int, ...]

    def fused(self, first: int, second: int) -> _Runs:
        """Without ``second``, whose units are in ``first``."""
        number = [run - (run > second) for run in range(len(self.device))]
        number[second] = number[first]
        device = tuple(own for run, own in enumerate(self.device) if run != second)
        return _Runs(tuple(number[run] for run in self.of), device)

    def moved(self, run: int, device: int) -> _Runs:
        return _Runs(self.of, (*self.device[:run], device, *self.device[run + 1 :]))


@dataclass(frozen=True)
class _Prediction:
    """``seconds`` of a step, and runs in the order in which devices take them."""

    seconds: float
    order: tuple[int, ...]


class Staging:
    """The search for stages, of one graph of units on one cluster."""

    def __init__(
        self, units: Units, flows: Sequence[Flow], cluster: Cluster, passes: int, microbatches: int, in_flight: int
    ) -> None:
        """``in_flight``: microbatches whose residuals a device holds."""
        self.units, self.cluster, self.passes, self.microbatches = units, cluster, passes, microbatches
        self.edges = Edges.of(cluster, 1)
        self.fixed = self.edges.fixed - np.array([device.overhead for device in cluster.devices])[None, :]
        self.overhead = [device.overhead for device in cluster.devices]
        self.held = units.resident + in_flight * units.residuals
        self.flows = _unit_flows(units, flows)
        self.precedence = [(source, unit) for unit, own in enumerate(units.sources) for source in own]
        self.left = EVALUATIONS

    def stages(self, assignment: Assignment) -> Placement:
        """The best stages that the search comes to from a list schedule."""
        self.left = EVALUATIONS
        self.rank = assignment.rank.tolist()
        runs = self.first(assignment)
        found = self.predict(runs)
        assert found is not None, "runs between transfers have no cycle"
        runs, found = self.fuse(runs, found)
        while (better := self.move(runs, found)) is not None:
            runs, found = self.fuse(*better)
        number = np.argsort(np.array(found.order))
        unit_stage = number[np.array(runs.of, np.intp)]
        stage = self.units.layout.stages(unit_stage[self.units.of])
        return Placement(stage, tuple(runs.device[run] for run in found.order))

    def first(self, assignment: Assignment) -> _Runs:
        """Runs between units that send to other devices or get from them."""
        units, device = self.units, assignment.device.tolist()
        apart = [(s, t) for s, t in self.precedence if device[s] != device[t]]
        sends, gets = {s for s, _ in apart}, {t for _, t in apart}
        of = [-1] * units.count
        current: dict[int, int] = {}  # the run that a device is in
        devices: list[int] = []
        for unit in np.argsort(assignment.rank).tolist():
            own = device[unit]
            if own not in current or unit in gets:
                current[own] = len(devices)
                devices.append(own)
            of[unit] = current[own]
            if unit in sends:
                del current[own]
        return _Runs(tuple(of), tuple(devices))

    def fuse(self, runs: _Runs, found: _Prediction) -> tuple[_Runs, _Prediction]:
        """Fuse neighbours on a device while the step is not slower than the best seen by more than the slack."""
        most = found.seconds * SLACK
        changed = True
        while changed:
            changed = False
            for first, second in self.neighbours(runs, found):
                fused = runs.fused(first, second)
                now = self.predict(fused)
                if now is not None and now.seconds <= most:
                    runs, found, changed = fused, now, True
                    most = min(most, now.seconds * SLACK)
                    break
        return runs, found

    def neighbours(self, runs: _Runs, found: _Prediction) -> Iterator[tuple[int, int]]:
        """Pairs of runs that follow each other on a device, lightest first."""
        own: dict[int, list[int]] = {}
        for run in found.order:
            own.setdefault(runs.device[run], []).append(run)
        weight = np.bincount(runs.of, self.units.seconds.mean(axis=1), len(runs.device))
        pairs = [pair for line in own.values() for pair in pairwise(line)]
        yield from sorted(pairs, key=lambda pair: (min(weight[pair[0]], weight[pair[1]]), pair))

    def move(self, runs: _Runs, found: _Prediction) -> tuple[_Runs, _Prediction] | None:
        """Move the first run to another device that makes the step faster so; None if there is none."""
        of = np.array(runs.of, np.intp)
        tied = self.units.group >= 0
        for run in range(len(runs.device)):
            members = of == run
            groups = set(self.units.group[members & tied].tolist())
            if any(set(of[self.units.group == group].tolist()) != {run} for group in groups):
                continue  # a parameter is used in other runs as well, and has to stay with them
            for device in range(len(self.cluster.devices)):
                moved = runs.moved(run, device)
                if device == runs.device[run] or not self.fits(moved, members, device):
                    continue
                best = self.best_of(moved, run, found)
                if best is not None and best[1].seconds < found.seconds * (1 - 1e-6):
                    return best
        return None

    def best_of(self, moved: _Runs, run: int, before: _Prediction) -> tuple[_Runs, _Prediction] | None:
        """A run on its new device, alone or as one with what is there before or after it."""
        here = [other for other in before.order if moved.device[other] == moved.device[run]]
        at = here.index(run)
        options = [moved]
        options += [
            moved.fused(min(run, other), max(run, other)) for other in (*here[at - 1 : at], *here[at + 1 : at + 2])
        ]
        found: tuple[_Runs, _Prediction] | None = None
        for option in options:
            now = self.predict(option)
            if now is not None and (found is None or now.seconds < found[1].seconds):
                found = option, now
        return found

    def fits(self, runs: _Runs, members: np.ndarray, device: int) -> bool:
        """Whether a device has room for all that is there, and the members may be there."""
        if not self.units.allowed[members, device].all():
            return False
        here = np.array(runs.device)[np.array(runs.of, np.intp)] == device
        return self.held[here].sum() + self.units.working[here].max() <= self.cluster.devices[device].memory

    def predict(self, runs: _Runs) -> _Prediction | None:
        """How long a step takes; None if runs wait for each other, or too much has been tried."""
        if self.left <= 0:
            return None
        self.left -= 1
        edges = self.run_edges(runs)
        order = self.sorted(runs, edges)
        if order is None:
            return None
        of, device = np.array(runs.of, np.intp), runs.device
        count = len(device)
        own = np.array(device)[of]
        every = np.arange(len(of))
        forward = np.bincount(of, self.units.forward[every, own], count).tolist()
        backward = np.bincount(of, self.units.backward[every, own], count).tolist()
        sources: list[list[tuple[int, float, float]]] = [[] for _ in range(count)]
        users: list[list[tuple[int, float, float]]] = [[] for _ in range(count)]
        loads = [0.0] * len(self.overhead)
        for (source, user), (sent, back) in edges.items():
            a, b = device[source], device[user]
            slope = float(self.edges.slope[a, b])
            there, again = float(self.fixed[a, b]) + sent * slope, float(self.fixed[b, a]) + back * slope
            sources[user].append((source, there if a != b else 0.0, sent))
            users[source].append((user, again if a != b else 0.0, back))
            for end in (a, b):
                loads[end] += (sent + back) * slope
        ends, last = self.pass_over(order, device, forward, sources, [0.0] * len(loads))
        if self.passes == 2:
            returned = [[item for item in own if item[2] > 0] for own in users]
            _, last = self.pass_over(order[::-1], device, backward, returned, last, ends)
        total = max(last)
        if self.microbatches > 1:
            for run in range(count):
                loads[device[run]] += forward[run] + backward[run] + self.passes * self.overhead[device[run]]
            total += (self.microbatches - 1) * max(loads)
        return _Prediction(total, tuple(order))

    def pass_over(
        self,
        order: Sequence[int],
        device: Sequence[int],
        seconds: Sequence[float],
        sources: Sequence[Sequence[tuple[int, float, float]]],
        free: Sequence[float],
        after: Sequence[float] | None = None,
    ) -> tuple[list[float], list[float]]:
        """When each run, and each device, is done."""
        ends = [0.0] * len(device)
        last = list(free)
        for run in order:
            own = device[run]
            begin = max(last[own], after[run] if after else 0.0)
            for source, transfer, _ in sources[run]:
                begin = max(begin, ends[source] + transfer)
            ends[run] = last[own] = begin + seconds[run] + self.overhead[own]
        return ends, last

    def run_edges(self, runs: _Runs) -> dict[tuple[int, int], tuple[float, float]]:
        """Bytes that go from run to run, and back."""
        of = runs.of
        edges: dict[tuple[int, int], tuple[float, float]] = {}
        for source, unit in self.precedence:
            if of[source] != of[unit]:
                edges.setdefault((of[source], of[unit]), (0.0, 0.0))
        for maker, readers, sent, back in self.flows:
            source = of[maker]
            for user in {of[reader] for reader in readers}:
                if user != source:
                    a, b = edges.get((source, user), (0.0, 0.0))
                    edges[source, user] = a + sent, b + back
        return edges

    def sorted(self, runs: _Runs, edges: dict[tuple[int, int], tuple[float, float]]) -> list[int] | None:
        """Runs in a topological order, of the ready ones the first that the list schedule begins; None: a cycle."""
        count = len(runs.device)
        first = [len(runs.of)] * count
        for unit, run in enumerate(runs.of):
            first[run] = min(first[run], self.rank[unit])
        waiting = [0] * count
        users: list[list[int]] = [[] for _ in range(count)]
        for source, user in edges:
            waiting[user] += 1
            users[source].append(user)
        ready = [(first[run], run) for run in range(count) if not waiting[run]]
        heapq.heapify(ready)
        order: list[int] = []
        while ready:
            _, run = heapq.heappop(ready)
            order.append(run)
            for user in users[run]:
                waiting[user] -= 1
                if not waiting[user]:
                    heapq.heappush(ready, (first[user], user))
        return order if len(order) == count else None


def _unit_flows(units: Units, flows: Sequence[Flow]) -> list[tuple[int, tuple[int, ...], float, float]]:
    """Maker, readers, bytes and bytes that come back of values that go from unit to unit; alike ones added up."""
    found: dict[tuple[int, tuple[int, ...]], tuple[float, float]] = {}
    for flow in flows:
        if flow.maker < 0:
            continue
        maker = int(units.of[flow.maker])
        readers = {int(units.of[r]) for r in flow.readers if not units.layout.floating[r]} - {maker}
        if readers:
            key = maker, tuple(sorted(readers))
            sent, back = found.get(key, (0.0, 0.0))
            found[key] = sent + flow.nbytes, back + flow.nbytes * flow.active
    return [(maker, readers, sent, back) for (maker, readers), (sent, back) in found.items()]
