"""What a scheduler is given: stages, what they read, where they are, how long their tasks take, what they hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypedDict

from daggc.errors import PlanError
from daggc.plan.schedule.tasks import PHASES, Feeds, chain, check_pipeline, readers_of, shares

Seconds = Mapping[str, Sequence[float] | float]
Transfer = float | Mapping[tuple[int, int], float]


class Options(TypedDict, total=False):
    """What may be said of a pipeline beside its stages, microbatches and devices.

    Attributes:
        seconds: for each phase, the time of a task of each stage, or of any stage. By default F 1, B 1, W 1, and
            B 2 where it includes W. Schedules that are published as fixed orders (GPipe, 1F1B, ZB-H1, ...) keep
            that order whatever the times.
        transfer: seconds from a task's end until another device has its result; or by (stage, stage) in the
            direction of travel, 0 where none is given.
        feeds: for each stage, the stages before it whose results it reads. By default the one before it.
        memory: activations that a device may hold, or each device, in the unit of ``activations``.
        activations: of a microbatch at each stage. By default the stages of a device hold equal parts of 1.
        weight_memory: the part of them that is held from a backward task to its weight-gradient task.
    """

    seconds: Seconds | None
    transfer: Transfer
    feeds: Sequence[Sequence[int]] | None
    memory: float | Sequence[float] | None
    activations: Sequence[float] | None
    weight_memory: float


@dataclass(frozen=True)
class Problem:
    """A pipeline to be scheduled. Attributes as in :class:`Options`, checked and made plain.

    Attributes:
        seconds: by phase (F, B, W), then stage. Those of W are not used unless ``split``.
        split: weight gradients are tasks of their own.
        memory: by device; infinite where there is no limit.
    """

    stages: int
    microbatches: int
    device_of: tuple[int, ...]
    split: bool
    seconds: tuple[tuple[float, ...], ...]
    transfer: Transfer
    feeds: Feeds
    memory: tuple[float, ...]
    activations: tuple[float, ...]
    weight_memory: float

    @cached_property
    def readers(self) -> Feeds:
        return readers_of(self.feeds)

    @cached_property
    def stages_of(self) -> Feeds:
        """For each device, its stages."""
        found: list[list[int]] = [[] for _ in range(self.devices)]
        for stage, device in enumerate(self.device_of):
            found[device].append(stage)
        return tuple(map(tuple, found))

    @property
    def devices(self) -> int:
        return max(self.device_of) + 1

    @property
    def is_chain(self) -> bool:
        return self.feeds == chain(self.stages)

    def between(self, source: int, target: int) -> float:
        """Seconds that a result of one stage takes to another."""
        if self.device_of[source] == self.device_of[target]:
            return 0.0
        if isinstance(self.transfer, int | float):
            return self.transfer
        return self.transfer.get((source, target), 0.0)

    @cached_property
    def credits(self) -> tuple[int, ...]:
        """For each stage, 1 + the most changes of device from it to a last stage: p - r at rank r of p."""
        counts = [1] * self.stages
        for stage in reversed(range(self.stages)):
            for reader in self.readers[stage]:
                hop = self.device_of[stage] != self.device_of[reader]
                counts[stage] = max(counts[stage], counts[reader] + hop)
        return tuple(counts)

    @cached_property
    def work(self) -> tuple[float, ...]:
        """Seconds that each device works."""
        phases = self.seconds if self.split else self.seconds[:2]
        return tuple(
            self.microbatches * sum(seconds[stage] for seconds in phases for stage in own) for own in self.stages_of
        )

    def in_units(self) -> Problem:
        """The same pipeline with every task of the same length, and transfers that take no time."""
        return replace(self, seconds=_units(self.stages, self.split), transfer=0.0)


def problem_of(
    stages: int,
    microbatches: int,
    device_of: Sequence[int] | None,
    split: bool,
    *,
    seconds: Seconds | None = None,
    transfer: Transfer = 0.0,
    feeds: Sequence[Sequence[int]] | None = None,
    memory: float | Sequence[float] | None = None,
    activations: Sequence[float] | None = None,
    weight_memory: float = 0.45,
) -> Problem:
    """Check and complete a problem. Args as in :class:`Options`.

    Raises:
        PlanError: there are no stages or microbatches, a stage has no device, reads a later stage, lacks a time
            or size, or a device may not hold even one microbatch.
    """
    devices = check_pipeline(stages, microbatches, device_of)
    reads = chain(stages) if feeds is None else tuple(tuple(dict.fromkeys(sources)) for sources in feeds)
    if len(reads) != stages or any(not 0 <= source < stage for stage, own in enumerate(reads) for source in own):
        raise PlanError(f"feeds names, for each of {stages} stages, stages before it, got {reads}")
    sizes = shares(devices) if activations is None else tuple(activations)
    if len(sizes) != stages or min(sizes) < 0:
        raise PlanError(f"activations gives a size >= 0 for each of {stages} stages, got {sizes}")
    if not 0 <= weight_memory <= 1:
        raise PlanError(f"weight_memory is a part of the activations, 0 to 1, got {weight_memory}")
    count = max(devices) + 1
    limits = (math.inf if memory is None else memory,) * count if not isinstance(memory, Sequence) else tuple(memory)
    if len(limits) != count:
        raise PlanError(f"memory gives a limit for each of {count} devices, got {len(limits)}")
    for device, limit in enumerate(limits):
        least = sum(size for size, own in zip(sizes, devices, strict=True) if own == device)
        if least > limit + 1e-9:
            raise PlanError(f"device {device} holds {least:g} of activations for one microbatch; it may hold {limit:g}")
    times = _units(stages, split) if seconds is None else _times(seconds, stages, split)
    negative = not isinstance(transfer, int | float) and any(time < 0 for time in transfer.values())
    if negative or (isinstance(transfer, int | float) and transfer < 0):
        raise PlanError(f"a transfer takes 0 s or more, got {transfer}")
    return Problem(stages, microbatches, devices, split, times, transfer, reads, limits, sizes, weight_memory)


def _units(stages: int, split: bool) -> tuple[tuple[float, ...], ...]:
    return (1,) * stages, (1 if split else 2,) * stages, (1,) * stages


def _times(seconds: Seconds, stages: int, split: bool) -> tuple[tuple[float, ...], ...]:
    found: list[tuple[float, ...]] = []
    for phase in PHASES if split else PHASES[:2]:
        if phase not in seconds:
            raise PlanError(f"seconds gives the time of each phase; {phase} is missing from {sorted(seconds)}")
        own = seconds[phase]
        times = (own,) * stages if isinstance(own, int | float) else tuple(own)
        if len(times) != stages or not all(0 <= time < math.inf for time in times):
            raise PlanError(f"seconds gives a time >= 0 for {phase} of each of {stages} stages, got {times}")
        found.append(times)
    return (*found, (0.0,) * stages) if not split else tuple(found)
