"""Schedules: which task of which microbatch each device runs, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from daggc.errors import PlanError

FORWARD, BACKWARD, WEIGHT_GRAD = "forward", "backward", "weight_grad"
PHASES = (FORWARD, BACKWARD, WEIGHT_GRAD)
FORWARD_BACKWARD = "forward_backward"  # of a call that runs both, of one microbatch; in no schedule
_LETTERS = {FORWARD: "F", BACKWARD: "B", WEIGHT_GRAD: "W"}

Feeds = tuple[tuple[int, ...], ...]
"""For each stage, the stages whose results its forward reads."""


def readers_of(feeds: Feeds) -> Feeds:
    """For each stage, the stages that read it."""
    readers: list[list[int]] = [[] for _ in feeds]
    for stage, sources in enumerate(feeds):
        for source in sources:
            readers[source].append(stage)
    return tuple(map(tuple, readers))


def chain(stages: int) -> Feeds:
    """Each stage reads the one before it."""
    return tuple((stage - 1,) if stage else () for stage in range(stages))


@dataclass(frozen=True, order=True, slots=True)
class Task:
    """A phase of a stage for one microbatch. Printed ``F1.0``: forward of stage 1, microbatch 0."""

    stage: int
    phase: str
    microbatch: int

    def __str__(self) -> str:
        return f"{_LETTERS[self.phase]}{self.stage}.{self.microbatch}"

    def needs(self, stages: int) -> tuple[Task, ...]:
        """The tasks that must end before this one, in a pipeline where each stage feeds the next."""
        stage, microbatch = self.stage, self.microbatch
        if self.phase == FORWARD:
            return (Task(stage - 1, FORWARD, microbatch),) if stage else ()
        if self.phase == WEIGHT_GRAD:
            return (Task(stage, BACKWARD, microbatch),)
        after = (Task(stage + 1, BACKWARD, microbatch),) if stage + 1 < stages else ()
        return (Task(stage, FORWARD, microbatch), *after)

    def needs_in(self, feeds: Feeds, readers: Feeds) -> tuple[Task, ...]:
        """The tasks that must end before this one, where stages read each other as ``feeds`` says.

        Args:
            readers: what :func:`readers_of` gives for ``feeds``.
        """
        stage, microbatch = self.stage, self.microbatch
        if self.phase == FORWARD:
            return tuple([Task(source, FORWARD, microbatch) for source in feeds[stage]])
        if self.phase == WEIGHT_GRAD:
            return (Task(stage, BACKWARD, microbatch),)
        after = [Task(reader, BACKWARD, microbatch) for reader in readers[stage]]
        return (Task(stage, FORWARD, microbatch), *after)


@dataclass(frozen=True)
class Schedule:
    """Orders of tasks.

    Attributes:
        name: one of :data:`daggc.plan.schedule.SCHEDULES`.
        stages: how many.
        microbatches: how many.
        device_of: the device, by number, of each stage.
        orders: for each device, its tasks in order.
        emitted: all tasks in one order that respects both the pipeline and the orders of devices.
        feeds: for each stage, the stages it reads; none where each stage reads the one before it.
    """

    name: str
    stages: int
    microbatches: int
    device_of: tuple[int, ...]
    orders: tuple[tuple[Task, ...], ...]
    emitted: tuple[Task, ...]
    feeds: Feeds | None = None

    def __str__(self) -> str:
        head = f"{self.name}: {self.stages} stages, {self.microbatches} microbatches"
        rows = (f"  device {index}: {' '.join(map(str, order))}" for index, order in enumerate(self.orders))
        return "\n".join((head, *rows))

    @property
    def split_backward(self) -> bool:
        """Whether weight gradients are tasks of their own."""
        return len(self.emitted) > 2 * self.stages * self.microbatches

    def needs(self) -> dict[Task, tuple[Task, ...]]:
        """For each task, in the order ``emitted``, those that must end before it, whatever their devices."""
        feeds = self.feeds or chain(self.stages)
        readers = readers_of(feeds)
        return {task: task.needs_in(feeds, readers) for task in self.emitted}

    def in_flight(self) -> tuple[int, ...]:
        """For each stage, the most microbatches whose forward has run and whose last task has not."""
        end = WEIGHT_GRAD if self.split_backward else BACKWARD
        peaks = [0] * self.stages
        now = [0] * self.stages
        for task in self.emitted:
            now[task.stage] += (task.phase == FORWARD) - (task.phase == end)
            peaks[task.stage] = max(peaks[task.stage], now[task.stage])
        return tuple(peaks)

    def peak_activations(
        self, activations: Sequence[float] | None = None, weight_memory: float = 0.45
    ) -> tuple[float, ...]:
        """For each device, the most activations that it holds for the backward tasks to come.

        Args:
            activations: of a microbatch at each stage. By default the parts of 1 that the stages of a device
                hold, so that the result counts in activations of a microbatch on a device (M_B).
            weight_memory: the part of it that a weight-gradient task of its own still holds (M_W / M_B).
        """
        sizes = activations or shares(self.device_of)
        kept = weight_memory if self.split_backward else 0.0
        freed = {FORWARD: 1.0, BACKWARD: kept - 1, WEIGHT_GRAD: -kept}
        peaks: list[float] = []
        for order in self.orders:
            now = peak = 0.0
            for task in order:
                now += freed[task.phase] * sizes[task.stage]
                peak = max(peak, now)
            peaks.append(peak)
        return tuple(peaks)


def shares(device_of: Sequence[int]) -> tuple[float, ...]:
    """For each stage, 1 / the number of stages on its device."""
    return tuple(1 / device_of.count(device) for device in device_of)


def check_pipeline(stages: int, microbatches: int, device_of: Sequence[int] | None) -> tuple[int, ...]:
    """The device of each stage; one each by default. Raises PlanError for what is no pipeline."""
    if stages < 1 or microbatches < 1:
        raise PlanError(f"a pipeline has stages and microbatches, got {stages} and {microbatches}")
    devices = tuple(range(stages) if device_of is None else device_of)
    if len(devices) != stages or set(devices) != set(range(len(set(devices)))):
        raise PlanError(f"each of {stages} stages has a device 0, 1, ..., got {devices}")
    return devices


def split_batch(batch: int, microbatches: int) -> tuple[int, ...]:
    """Sizes of microbatches that differ by one at most, larger ones first: 10 in 3 is 4, 3, 3.

    Raises PlanError if there are fewer samples than microbatches.
    """
    if not 1 <= microbatches <= batch:
        raise PlanError(f"a batch of {batch} samples has 1 to {batch} microbatches, got {microbatches}")
    size, larger = divmod(batch, microbatches)
    return (size + 1,) * larger + (size,) * (microbatches - larger)
