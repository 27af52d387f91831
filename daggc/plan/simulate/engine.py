"""The event loop.

A place runs one job at a time: a device in the order of the jobs (``strict``) or the first in that order which is
ready, as Dask's priorities do; a link in order of arrival, and what it carried is there a ``delay`` later.

What places share (the cores of a host, its loopback) is shared in proportion: when the jobs that run want more of
a resource than there is, all of them slow down by the same factor, and a job that uses several resources goes at
the pace of the scarcest:

    rate = min over its resources of min(1, capacity / what all that run there want)

Events are the end of a job and the arrival of its result, in a heap. A change of rate moves the end of a job: a
new event is pushed, and the old one is known by its time, which is no longer the job's end.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from daggc.errors import PlanError
from daggc.plan.simulate.jobs import IDEAL, Job, Runtime, Timed
from daggc.plan.simulate.result import Simulation


def run_jobs(
    jobs: Sequence[Job], strict: bool = True, capacity: Mapping[str, float] | None = None, runtime: Runtime = IDEAL
) -> Simulation:
    """Run jobs whose order is topological; places keep it if ``strict``.

    Args:
        capacity: how much there is of each resource that jobs use.

    Raises:
        PlanError: a job needs one that comes later, or uses a resource that is not there; or the orders of places
            contradict what jobs need.
    """
    loop = _Loop(jobs, strict, capacity or {}, runtime)
    loop.run()
    stuck = [job.name for job, ended in zip(jobs, loop.ended, strict=True) if not ended]
    if stuck:
        raise PlanError(f"the order of tasks on devices contradicts what they need; stuck: {', '.join(stuck[:5])}")
    timed = tuple(map(Timed, jobs, loop.starts, loop.ends))
    return Simulation(timed, max(loop.ends, default=0.0), tuple(loop.places))


class _Loop:
    """State of a simulation. Places are numbers; lists have an entry for each job or each place."""

    def __init__(self, jobs: Sequence[Job], strict: bool, capacity: Mapping[str, float], runtime: Runtime) -> None:
        self.jobs, self.runtime = jobs, runtime
        self.users, self.missing = _needs(jobs)
        self.places: dict[str, int] = {}
        self.place_of = [self.places.setdefault(job.place, len(self.places)) for job in jobs]
        self.in_order: list[list[int] | None] = [None] * len(self.places)  # what is still to run, reversed
        if strict:
            for index in range(len(jobs) - 1, -1, -1):
                if not jobs[index].transfer:
                    own = self.in_order[self.place_of[index]]
                    if own is None:
                        own = self.in_order[self.place_of[index]] = []
                    own.append(index)
        self.ready: list[list[tuple[float, int]]] = [[] for _ in self.places]
        self.busy = [False] * len(self.places)
        self.starts, self.ends = [0.0] * len(jobs), [0.0] * len(jobs)
        self.ended = [False] * len(jobs)
        self.events: list[tuple[float, int, int]] = []  # (time, 0: a job's end, 1: its result's arrival; job)
        self.scheduler = 0.0  # when it will have worked off what has ended
        self.shared = _Shared(jobs, capacity)

    def run(self) -> None:
        submit = self.runtime.begin + self.runtime.submit * sum(not job.transfer for job in self.jobs)
        for index, count in enumerate(self.missing):
            if not count:
                self.make_ready(index, submit)
        self.begin(range(len(self.places)), submit)
        events, jobs, place_of, ends, ended = self.events, self.jobs, self.place_of, self.ends, self.ended
        while events:
            now = events[0][0]
            touched: dict[int, None] = {}
            while events and events[0][0] == now:
                _, kind, index = heapq.heappop(events)
                if kind == 1:
                    self.arrive(index, now, touched)
                    continue
                if ended[index] or ends[index] != now:
                    continue  # its rate has changed since
                ended[index] = True
                self.busy[place_of[index]] = False
                touched[place_of[index]] = None
                job = jobs[index]
                if job.uses:
                    self.shared.leave(index)
                there = now + job.delay if job.transfer else self.told(now) + job.delay
                if there == now:
                    self.arrive(index, now, touched)
                else:
                    heapq.heappush(events, (there, 1, index))
            self.begin(touched, now)

    def told(self, now: float) -> float:
        """When the scheduler has told others of a task that ends now."""
        if not self.runtime.dispatch:
            return now + self.runtime.message
        self.scheduler = max(self.scheduler, now) + self.runtime.dispatch
        return self.scheduler + self.runtime.message

    def make_ready(self, index: int, now: float) -> None:
        # A link serves in order of arrival; a device in the order of the graph.
        heapq.heappush(self.ready[self.place_of[index]], (now if self.jobs[index].transfer else 0.0, index))

    def arrive(self, index: int, now: float, touched: dict[int, None]) -> None:
        missing = self.missing
        for user in self.users[index]:
            missing[user] -= 1
            if not missing[user]:
                self.make_ready(user, now)
                touched[self.place_of[user]] = None

    def begin(self, places: range | dict[int, None], now: float) -> None:
        """Let places that have nothing to do begin what they may, and set the rates anew."""
        begun: list[int] = []
        for place in places:
            waiting = self.ready[place]
            if self.busy[place] or not waiting:
                continue
            index = waiting[0][1]
            order = self.in_order[place]
            if order is not None:
                if order[-1] != index:
                    continue
                order.pop()
            heapq.heappop(waiting)
            self.busy[place] = True
            self.starts[index] = now
            job = self.jobs[index]
            if job.uses:
                begun.append(index)
            else:
                self.ends[index] = now + job.seconds
                heapq.heappush(self.events, (self.ends[index], 0, index))
        for index, end in self.shared.settle(begun, now):
            self.ends[index] = end
            heapq.heappush(self.events, (end, 0, index))


def _needs(jobs: Sequence[Job]) -> tuple[list[list[int]], list[int]]:
    """For each job those that wait for it, and for how many it waits."""
    users: list[list[int]] = [[] for _ in jobs]
    missing = [0] * len(jobs)
    for index, job in enumerate(jobs):
        needs = job.needs if len(job.needs) < 2 else dict.fromkeys(job.needs)
        for source in needs:
            if source >= index:
                raise PlanError(f"{job.name} needs {jobs[source].name}, which comes later")
            users[source].append(index)
        missing[index] = len(needs)
    return users, missing


class _Shared:
    """Resources that several places share, and how fast the jobs that use them go."""

    def __init__(self, jobs: Sequence[Job], capacity: Mapping[str, float]) -> None:
        self.jobs, self.capacity = jobs, capacity
        for job in jobs:
            for name, amount in job.uses:
                if name not in capacity:
                    raise PlanError(f"{job.name} uses {name!r}; there are {', '.join(capacity) or 'no resources'}")
                if amount < 0 or capacity[name] <= 0:
                    raise PlanError(f"{job.name} uses {amount:g} of {capacity[name]:g} {name!r}")
        self.running: dict[str, dict[int, float]] = {name: {} for name in capacity}
        self.left: dict[int, float] = {}  # seconds at full pace
        self.rate: dict[int, float] = {}
        self.since: dict[int, float] = {}
        self.changed: dict[str, None] = {}

    def leave(self, index: int) -> None:
        for name, _ in self.jobs[index].uses:
            self.running[name].pop(index, None)
            self.changed[name] = None
        del self.left[index], self.rate[index], self.since[index]

    def settle(self, begun: Sequence[int], now: float) -> list[tuple[int, float]]:
        """Take in jobs that begin; returns the jobs whose rate is new, with their ends."""
        for index in begun:
            self.left[index], self.rate[index], self.since[index] = self.jobs[index].seconds, 0.0, now
            for name, amount in self.jobs[index].uses:
                running = self.running[name]
                running[index] = running.get(index, 0.0) + amount
                self.changed[name] = None
        if not self.changed:
            return []
        affected = dict.fromkeys(index for name in self.changed for index in self.running[name])
        self.changed.clear()
        wanted = {
            name: sum(self.running[name].values())
            for name in dict.fromkeys(name for index in affected for name, _ in self.jobs[index].uses)
        }
        ends: list[tuple[int, float]] = []
        for index in affected:
            rate = min(
                self.capacity[name] / max(wanted[name], self.capacity[name]) for name, _ in self.jobs[index].uses
            )
            if rate == self.rate[index]:
                continue
            self.left[index] = max(self.left[index] - (now - self.since[index]) * self.rate[index], 0.0)
            self.rate[index], self.since[index] = rate, now
            ends.append((index, now + self.left[index] / rate))
        return ends
