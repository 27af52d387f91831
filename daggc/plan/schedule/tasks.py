"""Schedules: which task of which microbatch each device runs, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from daggc.errors import PlanError

FORWARD, BACKWARD, WEIGHT_GRAD = "forward", "backward", "weight_grad"
_LETTERS = {FORWARD: "F", BACKWARD: "B", WEIGHT_GRAD: "W"}


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


@dataclass(frozen=True)
class Schedule:
    """Orders of tasks.

    Attributes:
        name: ``gpipe`` or ``1f1b``.
        stages: how many.
        microbatches: how many.
        device_of: the device, by number, of each stage.
        orders: for each device, its tasks in order.
        emitted: all tasks in one order that respects both the pipeline and the orders of devices.
    """

    name: str
    stages: int
    microbatches: int
    device_of: tuple[int, ...]
    orders: tuple[tuple[Task, ...], ...]
    emitted: tuple[Task, ...]

    def __str__(self) -> str:
        head = f"{self.name}: {self.stages} stages, {self.microbatches} microbatches"
        rows = (f"  device {index}: {' '.join(map(str, order))}" for index, order in enumerate(self.orders))
        return "\n".join((head, *rows))

    def in_flight(self) -> tuple[int, ...]:
        """For each stage, the most microbatches whose forward has run and whose last task has not."""
        last = {task.phase for task in self.emitted}
        end = WEIGHT_GRAD if WEIGHT_GRAD in last else BACKWARD
        peaks = [0] * self.stages
        now = [0] * self.stages
        for task in self.emitted:
            now[task.stage] += (task.phase == FORWARD) - (task.phase == end)
            peaks[task.stage] = max(peaks[task.stage], now[task.stage])
        return tuple(peaks)


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
