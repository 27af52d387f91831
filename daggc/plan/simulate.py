"""Event-driven simulation of a placed graph, or of a schedule: when each task would run.

A device runs one task at a time; a link carries one transfer at a time each way, and what it carries arrives a
latency later. Devices keep the order of the graph (``strict``), or take the first task in that order which is
ready, as Dask's priorities do.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from daggc.errors import PlanError
from daggc.ir.graph import Graph, Node, Program
from daggc.plan.cost import graph_seconds
from daggc.plan.device import Cluster
from daggc.plan.schedule.tasks import BACKWARD, FORWARD, WEIGHT_GRAD, Schedule, Task


@dataclass(frozen=True)
class Job:
    """One thing to run.

    Attributes:
        place: the device, or ``a->b`` for a transfer.
        seconds: how long it keeps its place busy.
        delay: seconds from its end until others can use its result.
        needs: indices of jobs whose results it waits for.
    """

    name: str
    place: str
    seconds: float
    needs: tuple[int, ...] = ()
    delay: float = 0.0
    transfer: bool = False
    stage: int | None = None
    phase: str = ""
    microbatch: int | None = None


@dataclass(frozen=True)
class Timed:
    """A job and its seconds since the start."""

    job: Job
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """What would run when.

    Attributes:
        tasks: every job, in order of the graph.
        makespan: seconds from the start to the end of the last job.
    """

    tasks: tuple[Timed, ...]
    makespan: float
    places: tuple[str, ...] = field(default=())

    def on(self, place: str) -> list[Timed]:
        """The jobs of a device or link, in order of time."""
        return sorted((task for task in self.tasks if task.job.place == place), key=lambda task: task.start)

    def busy(self, place: str) -> float:
        """Seconds that a device or link works."""
        return sum(task.end - task.start for task in self.tasks if task.job.place == place)

    def utilisation(self, place: str) -> float:
        """Of a device or link, the part of the makespan that it works."""
        return self.busy(place) / self.makespan if self.makespan else 1.0

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(task.job.place for task in self.tasks if not task.job.transfer))

    @property
    def bubble(self) -> float:
        """The part of the devices' time in which they do nothing."""
        devices = self.devices
        return 1 - sum(map(self.utilisation, devices)) / len(devices) if devices else 0.0

    def bubble_of_stage(self, stage: int) -> float:
        """1 - work / span of one stage's tasks: the bubble rate of the pipelining literature."""
        own = [task for task in self.tasks if task.job.stage == stage and task.job.phase in _PHASES]
        span = max(task.end for task in own) - min(task.start for task in own)
        return 1 - sum(task.end - task.start for task in own) / span if span else 0.0

    def in_flight(self) -> dict[int, int]:
        """For each stage, the most microbatches whose forward has begun and whose last task has not ended."""
        changes: dict[int, list[tuple[float, int]]] = {}
        spans: dict[tuple[int, int], list[Timed]] = {}
        for task in self.tasks:
            if task.job.stage is not None and task.job.microbatch is not None and task.job.phase in _PHASES:
                spans.setdefault((task.job.stage, task.job.microbatch), []).append(task)
        for (stage, _), tasks in spans.items():
            changes.setdefault(stage, []).append((min(task.start for task in tasks), 1))
            changes[stage].append((max(task.end for task in tasks), -1))
        peaks: dict[int, int] = {}
        for stage, steps in sorted(changes.items()):
            now = peak = 0
            for _, change in sorted(steps):
                now += change
                peak = max(peak, now)
            peaks[stage] = peak
        return peaks

    def __str__(self) -> str:
        lines = [f"makespan {_time(self.makespan)}, bubble {self.bubble:.1%}"]
        for place in sorted({task.job.place for task in self.tasks}):
            count = sum(task.job.place == place for task in self.tasks)
            what = "tasks" if place in self.devices else "transfers"
            lines.append(f"  {place}: {count} {what}, busy {_time(self.busy(place))} ({self.utilisation(place):.0%})")
        peaks = ", ".join(f"{stage}: {count}" for stage, count in self.in_flight().items())
        return "\n".join((*lines, f"  microbatches in flight by stage: {peaks}")) if peaks else "\n".join(lines)


_PHASES = (FORWARD, BACKWARD, WEIGHT_GRAD)


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3f} s"
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def run_jobs(jobs: Sequence[Job], strict: bool = True) -> Simulation:
    """Run jobs whose order is topological; places keep it if ``strict``.

    Raises PlanError if a job needs one that comes later, or the orders of places contradict what jobs need.
    """
    users: list[list[int]] = [[] for _ in jobs]
    missing = [0] * len(jobs)
    for index, job in enumerate(jobs):
        for source in set(job.needs):
            if source >= index:
                raise PlanError(f"{job.name} needs {jobs[source].name}, which comes later")
            users[source].append(index)
            missing[index] += 1
    places = tuple(dict.fromkeys(job.place for job in jobs))
    queues: dict[str, list[int]] = {place: [] for place in places}  # what is to run, in order, reversed
    for index in reversed(range(len(jobs))):
        queues[jobs[index].place].append(index)
    ready: dict[str, list[tuple[float, int]]] = {place: [] for place in places}
    arrived = [0.0] * len(jobs)
    starts, ends = [0.0] * len(jobs), [-1.0] * len(jobs)
    busy: set[str] = set()
    events: list[tuple[float, int, int]] = []  # (time, 0: a place is free, 1: a result is there; job)

    def make_ready(index: int) -> None:
        # A link serves in order of arrival; a device in the order of the graph.
        heapq.heappush(ready[jobs[index].place], (arrived[index] if jobs[index].transfer else 0.0, index))

    def begin(place: str, now: float) -> None:
        waiting = ready[place]
        if place in busy or not waiting:
            return
        index = waiting[0][1]
        in_order = strict and not jobs[index].transfer
        if in_order and queues[place][-1] != index:
            return
        heapq.heappop(waiting)
        if in_order:
            queues[place].pop()
        starts[index], ends[index] = now, now + jobs[index].seconds
        busy.add(place)
        heapq.heappush(events, (ends[index], 0, index))
        heapq.heappush(events, (ends[index] + jobs[index].delay, 1, index))

    for index in range(len(jobs)):
        if not missing[index]:
            make_ready(index)
    for place in places:
        begin(place, 0.0)
    while events:
        now = events[0][0]
        touched: dict[str, None] = {}
        while events and events[0][0] == now:
            _, kind, index = heapq.heappop(events)
            touched[jobs[index].place] = None
            if kind == 0:
                busy.discard(jobs[index].place)
                continue
            for user in users[index]:
                missing[user] -= 1
                if not missing[user]:
                    arrived[user] = now
                    make_ready(user)
                    touched[jobs[user].place] = None
        for place in touched:
            begin(place, now)
    stuck = [job.name for job, end in zip(jobs, ends, strict=True) if end < 0]
    if stuck:
        raise PlanError(f"the order of tasks on devices contradicts what they need; stuck: {', '.join(stuck[:5])}")
    timed = tuple(Timed(*item) for item in zip(jobs, starts, ends, strict=True))
    return Simulation(timed, max(ends, default=0.0), places)


def simulate(
    step: Graph,
    program: Program,
    cluster: Cluster,
    seconds: Callable[[Node], float] | None = None,
    strict: bool = True,
) -> Simulation:
    """Simulate a placed graph of calls and transfers.

    Args:
        program: has the bodies of the calls.
        seconds: time of a call; by default the roofline of its body on its device.
        strict: devices keep the order of the graph.
    """
    predict = seconds or _roofline(program, cluster)
    makers: dict[str, int] = {}
    names: dict[str, int] = {}
    jobs: list[Job] = []
    for index, node in enumerate(step.nodes):
        needs = [makers[value.name] for value in node.inputs if value.name in makers]
        attrs = node.attrs
        if node.op == "transfer":
            source, target = str(node.inputs[0].type.device), str(attrs["device"])
            link = cluster.between(source, target)
            occupied = node.output.type.nbytes / link.bandwidth
            job = Job(node.output.name, f"{source}->{target}", occupied, tuple(needs), link.latency, True)
        else:
            needs += [names[name] for name in attrs.get("after", ()) if name in names]
            name = str(attrs.get("task") or attrs["callee"])
            names[name] = index
            job = Job(
                name, str(attrs["device"]), predict(node), tuple(needs), 0.0, False,
                attrs.get("stage"), str(attrs.get("phase", "")), attrs.get("microbatch"),
            )  # fmt: skip
        jobs.append(job)
        makers.update((value.name, index) for value in node.outputs)
    return run_jobs(jobs, strict)


def _roofline(program: Program, cluster: Cluster) -> Callable[[Node], float]:
    known: dict[tuple[str, str], float] = {}

    def seconds(node: Node) -> float:
        key = str(node.attrs["callee"]), str(node.attrs["device"])
        if key not in known:
            known[key] = graph_seconds(program[key[0]], cluster.device(key[1]))
        return known[key]

    return seconds


def simulate_schedule(
    schedule: Schedule, seconds: Mapping[str, Sequence[float] | float], transfer: float = 0.0, strict: bool = True
) -> Simulation:
    """Simulate a schedule without a graph.

    Args:
        seconds: for each phase, the time of a task of each stage, or of any stage.
        transfer: seconds that a result takes to a neighbouring stage on another device.
    """

    def time_of(task: Task) -> float:
        times = seconds[task.phase]
        return float(times if isinstance(times, int | float) else times[task.stage])

    jobs: list[Job] = []
    index_of: dict[Task, int] = {}
    for task in schedule.emitted:
        needs: list[int] = []
        for source in task.needs(schedule.stages):
            index = index_of[source]
            source_device, device = schedule.device_of[source.stage], schedule.device_of[task.stage]
            if source_device != device and transfer:
                jobs.append(Job(f"{source}>{device}", f"{source_device}->{device}", 0.0, (index,), transfer, True))
                index = len(jobs) - 1
            needs.append(index)
        index_of[task] = len(jobs)
        device = f"device {schedule.device_of[task.stage]}"
        jobs.append(
            Job(str(task), device, time_of(task), tuple(needs), 0.0, False, task.stage, task.phase, task.microbatch)
        )
    return run_jobs(jobs, strict)
