"""Choosing how a step is cut and ordered: simulate what is possible, take the fastest that fits memory.

Every choice has an estimate, the time of its schedule alone (:func:`estimate`), which costs little. Steps are made and
simulated in order of their estimates, until those that are left are estimated to take longer than the best found, or
enough have been simulated. A choice that does not fit is followed by what needs less memory of the same: fewer
microbatches in flight, and more that the backward computes again. They stand in line like all others, so that the
fastest way of fitting is found, whichever it is.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from daggc.errors import PlanError
from daggc.plan.device import Cluster
from daggc.plan.explain import nbytes, seconds
from daggc.plan.schedule import SEVERAL_STAGES, SPLIT_BACKWARD, Schedule, stage_devices
from daggc.plan.simulate import Simulation, simulate_schedule

AUTO = "auto"
REMAT = ("none", "cheap", "full")  # ever more is computed again; see daggc.passes.remat
SIMULATED = 12  # steps that fit are simulated; no further ones are
_PIPELINES = ("1f1b", "gpipe", "zb-h1", "zb-h2", "zb-2p", "interleaved", "zb-v")
_MOST = 4  # microbatches a stage, times the devices: more only add overhead
_CHUNKS = 2  # stages of a device, in schedules that are made for several
_HELD = {"1f1b": 1, "zb-h1": 1, "zb-1p": 1, "zb-v": 1, "zb-h2": 2, "zb-2p": 2, "interleaved": 2}
"""Microbatches in flight at most, by device, of the schedules that can do with fewer (GPipe with fewer is 1F1B)."""
_RECUTS = 8  # of one choice, for memory
_SPARE = 0.95  # of what would just fit, what is tried
_LEAST = 0.05  # of a device's memory, the least that a cut is given
_FEWER = 0.75  # of the microbatches in flight, the next limit that is tried


@dataclass(frozen=True)
class Choice:
    """How a step is made.

    Attributes:
        stages: of the pipeline; None where the partitioner decides, or ``chunks`` does.
        replicas: of every stage.
        remat: what the backward computes again; ``auto`` is as little as fits memory.
        chunks: stages on each device.
        in_flight: the most microbatches whose activations a device holds; None leaves it to the schedule.
        room: of each device's memory, by index, the part that a cut may fill by its own account; () for all of it.
    """

    microbatches: int = 1
    schedule: str = "1f1b"
    stages: int | None = None
    replicas: int = 1
    split_backward: bool = False
    remat: str = AUTO
    chunks: int = 1
    in_flight: int | None = None
    room: tuple[float, ...] = ()

    def turns(self, devices: int) -> tuple[int, ...] | None:
        """The device of each stage, by number, where the schedule has a say in it."""
        stages = self.stages or (self.chunks * devices if self.chunks > 1 else 0)
        several = stages > devices > 1 and self.schedule in SEVERAL_STAGES
        return stage_devices(self.schedule, stages, devices) if several else None

    def __str__(self) -> str:
        many = f"{self.microbatches} microbatches" if self.microbatches > 1 else "the batch whole"
        parts = [
            "" if self.stages is None else f"{self.stages} {'stage' if self.stages == 1 else 'stages'}",
            f"{self.chunks} stages a device" if self.chunks > 1 else "",
            f"{self.replicas} replicas" if self.replicas > 1 else "",
            f"at most {self.in_flight} in flight" if self.in_flight else "",
            f"recomputing: {self.remat}" if self.remat not in (AUTO, "none") else "",
            "cut for memory" if self.room else "",
        ]
        return ", ".join([many, self.schedule, *filter(None, parts)])


@dataclass(frozen=True)
class Tried:
    """A choice, what a step of it is predicted to take, and why it was not taken.

    Attributes:
        seconds: None if it is not possible.
        simulated: whether they are of the simulated step; else they are estimated.
    """

    choice: Choice
    seconds: float | None
    reason: str = ""
    simulated: bool = True

    def __str__(self) -> str:
        if self.seconds is None:
            return f"{self.choice}: not possible; {self.reason}"
        return f"{self.choice}: {'' if self.simulated else 'about '}{seconds(self.seconds)}; {self.reason}"


def possible(
    devices: int,
    batch: int,
    *,
    microbatches: int | str,
    schedule: str,
    replicas: int | str,
    stages: int | None = None,
    split_backward: bool = False,
    remat: str = AUTO,
) -> list[Choice]:
    """Every choice that what the user fixed leaves open; ``auto`` fixes nothing.

    Args:
        batch: samples, of which every microbatch has at least one; 1 if the batch may not be cut.
    """
    copies = [*_powers(min(devices, batch)), devices] if isinstance(replicas, str) else [replicas]
    most = min(batch, _MOST * devices)
    found: dict[Choice, None] = {}
    for copy in copies:
        own = devices // max(copy, 1)
        counts = [copy * each for each in _powers(most // copy)] if isinstance(microbatches, str) else [microbatches]
        for depth in _depths(own, stages, any_cut=isinstance(microbatches, str)):
            for count in counts:
                for name in _schedules(schedule, count // max(copy, 1), 1 if own == 1 else depth):
                    split = split_backward or name in SPLIT_BACKWARD
                    several = depth is None and own > 1 and name in SEVERAL_STAGES
                    for chunks in (_CHUNKS, 1) if several and schedule != AUTO else (_CHUNKS if several else 1,):
                        found[Choice(count, name, depth, copy, split, remat, chunks)] = None
    return list(found)


def _powers(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]


def _depths(devices: int, stages: int | None, any_cut: bool) -> Iterator[int | None]:
    yield stages
    if stages is None and any_cut and devices > 1:
        yield 1  # all on one device: where transfers cost more than a second device gives


def _schedules(schedule: str, microbatches: int, stages: int | None) -> Sequence[str]:
    if schedule != AUTO:
        return [schedule]
    return _PIPELINES if microbatches > 1 and stages != 1 else ["1f1b"]


def estimate(schedule: Schedule, times: Mapping[str, Any], devices: Sequence[Sequence[str]], cluster: Cluster) -> float:
    """Seconds that the tasks of a schedule take at least, before there is a step: no updates, no sums of gradients.

    Args:
        times: what :func:`daggc.plan.step_order.stage_times` gives.
        devices: of each stage, or of its replicas.
    """
    hop = min(device.hop for device in cluster.devices)
    ideal = simulate_schedule(schedule, times["seconds"], times["transfer"], message=hop).makespan
    used: dict[str, float] = {}  # seconds of cores, by host
    for task in schedule.emitted:
        own = devices[task.stage]
        device = cluster.device(own[task.microbatch % len(own)])
        work = device.threads * times["seconds"][task.phase][task.stage] + device.handling
        used[device.host] = used.get(device.host, 0.0) + work
    shared = [work / cluster.cores[host] for host, work in used.items() if host in cluster.cores]
    return max(ideal, *shared) if shared else ideal


def take_best(
    choices: Sequence[Choice],
    estimate: Callable[[Choice], float],
    simulate: Callable[[Choice], Simulation],
    cluster: Cluster,
) -> tuple[Choice, tuple[Tried, ...]]:
    """Simulate the choices that may be the best and take the fastest that fits.

    Args:
        estimate: seconds of a choice whose ``remat`` is decided. Raises PlanError where it is not possible.
        simulate: a step of it, likewise.

    Returns:
        The choice, its ``remat`` decided, and all that were tried, fastest first.

    Raises:
        PlanError: none fits; says by how many bytes the first of them does not.
    """
    line: list[tuple[float, int, Choice, Choice]] = []  # estimate, number, what is tried, what it is a variant of
    failed: dict[Choice, PlanError] = {}
    fits: dict[Choice, Tried] = {}  # by the choice that it is a variant of
    unseen: dict[Choice, Tried] = {}
    recuts: dict[Choice, int] = {}
    numbers = iter(range(1 << 30))

    def stand(choice: Choice, origin: Choice, least: float = 0.0) -> None:
        """Put a choice in the line, or what needs less memory if it is not possible."""
        try:
            heapq.heappush(line, (max(estimate(choice), least), next(numbers), choice, origin))
        except PlanError as error:
            failed.setdefault(origin, error)
            for other in _smaller(choice, origin, cluster):
                stand(other, origin, least)

    for choice in choices:
        stand(replace(choice, remat=REMAT[0]) if choice.remat == AUTO else choice, choice)
    best, count = float("inf"), 0
    while line:
        expected, _, choice, origin = heapq.heappop(line)
        if expected >= best or count >= SIMULATED:
            unseen.setdefault(origin, Tried(choice, expected, "not simulated: no faster by its schedule alone", False))
            continue
        done: Simulation | None = None
        try:
            done = simulate(choice)
            require_room(done, cluster)
        except PlanError as error:
            failed.setdefault(origin, error)
            key = replace(choice, room=())
            if done is not None and len(cluster.devices) > 1 and recuts.get(key, 0) < _RECUTS:
                recuts[key] = recuts.get(key, 0) + 1
                for other in _elsewhere(choice, done, cluster):
                    stand(other, origin, expected)
            for other in _smaller(choice, origin, cluster):
                stand(other, origin, expected)
        else:
            count += 1
            if origin not in fits or done.makespan < (fits[origin].seconds or 0.0):
                fits[origin] = Tried(choice, done.makespan)
            best = min(best, done.makespan)
    if not fits:
        raise next(iter(failed.values()), None) or PlanError("there is nothing to choose from")
    chosen = min(fits.values(), key=lambda one: one.seconds or 0.0)
    tried = [*fits.values(), *(one for origin, one in unseen.items() if origin not in fits)]
    known = {*fits, *unseen}
    tried += [Tried(origin, None, str(error)) for origin, error in failed.items() if origin not in known]
    tried.sort(key=lambda one: (one is not chosen, one.seconds is None, not one.simulated, one.seconds or 0.0))
    return chosen.choice, tuple(replace(one, reason=one.reason or _against(one, chosen)) for one in tried)


def _smaller(choice: Choice, origin: Choice, cluster: Cluster) -> Iterator[Choice]:
    """What needs less memory than a choice, one step further: fewer microbatches in flight, more recomputation.

    Every pair of a limit and a level is reached in one way: first the level, then the limit.
    """
    if choice.room:
        return
    levels = REMAT[REMAT.index(choice.remat) + 1 :] if origin.remat == AUTO else ()
    if choice.in_flight is None and levels:
        yield replace(choice, remat=levels[0])
    depth = len(cluster.devices) // choice.replicas if choice.stages is None else choice.stages
    held = choice.in_flight or min(choice.microbatches // choice.replicas, _HELD.get(choice.schedule, 0) * depth)
    if held > 1:
        yield replace(choice, in_flight=int(held * _FEWER))


def _elsewhere(choice: Choice, done: Simulation, cluster: Cluster) -> Iterator[Choice]:
    """The same with less on the devices that were too full, by as much as they were: a cut does not count all."""
    memory = [device.memory for device in cluster.devices]
    before = choice.room or (1.0,) * len(memory)
    full = [have / max(done.peaks.get(name, 0.0), have) for name, have in zip(cluster.names, memory, strict=True)]
    room = tuple(round(own * (_SPARE * part if part < 1 else 1), 4) for own, part in zip(before, full, strict=True))
    if min(room) > _LEAST:
        yield replace(choice, room=room)


def _against(one: Tried, best: Tried) -> str:
    if one is best or not one.seconds or not best.seconds:
        return "chosen"
    return f"{one.seconds / best.seconds - 1:.0%} longer"


def require_room(done: Simulation, cluster: Cluster) -> None:
    """Raises PlanError if a step does not fit the memory of a device, with the bytes that are short."""
    over = {device: peak - cluster.device(device).memory for device, peak in done.peaks.items()}
    device = max(over, key=lambda name: over[name], default="")
    if device and over[device] > 0:
        have, need = cluster.device(device).memory, done.peaks[device]
        raise PlanError(
            f"a step needs {nbytes(need)} on {device}, which has {nbytes(have)}: {over[device]:,.0f} bytes are short; "
            "more devices, more microbatches or a smaller batch would help"
        )
