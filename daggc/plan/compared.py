"""What was predicted of a step beside what its tasks took."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Protocol

from daggc.plan.explain import nbytes, seconds, table
from daggc.plan.simulate import Simulation


class Record(Protocol):
    """When a task ran, in seconds."""

    @property
    def name(self) -> str: ...
    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...


@dataclass(frozen=True)
class Row:
    """Tasks of one stage and phase on one device: ``F0`` are the forwards of stage 0.

    Attributes:
        predicted: seconds of one; ``measured``: their median.
        count: tasks that were measured.
    """

    name: str
    device: str
    predicted: float
    measured: float
    count: int


@dataclass(frozen=True)
class Comparison:
    """Predictions of a step, and what came.

    Attributes:
        step: predicted seconds of a step; ``measured_step``: the median from the end of one step to that of the
            next, None with fewer than two steps.
        moved: bytes of tensors that workers send in a step, to each other and to the client, which gets the loss;
            ``measured_moved``: counted where they become bytes. The two are equal if every step did the same.
        memory: by device, predicted bytes at most; ``measured_memory``: what its process held more than before the
            state was put there, at most, where that could be told.
    """

    rows: tuple[Row, ...]
    step: float
    measured_step: float | None
    moved: int
    memory: Mapping[str, float]
    measured_memory: Mapping[str, float]
    measured_moved: float | None = None

    def __str__(self) -> str:
        lines = [
            (row.name, row.device, seconds(row.predicted), seconds(row.measured), _ratio(row.measured, row.predicted),
             str(row.count))
            for row in self.rows
        ]  # fmt: skip
        if self.measured_step is not None:
            ratio = _ratio(self.measured_step, self.step)
            lines.append(("a step", "", seconds(self.step), seconds(self.measured_step), ratio, ""))
        for device, peak in self.memory.items():
            found = self.measured_memory.get(device)
            measured, ratio = (nbytes(found), _ratio(found, peak)) if found is not None else ("", "")
            lines.append(("memory at most", device, nbytes(peak), measured, ratio, ""))
        sent = self.measured_moved
        measured, ratio = ("", "") if sent is None else (nbytes(sent), _ratio(sent, self.moved))
        lines.append(("a step sends", "", nbytes(self.moved), measured, ratio, ""))
        heads = ("task", "device", "predicted", "measured", "ratio", "runs")
        return "\n".join([*table(heads, lines), ""])


def _ratio(measured: float, predicted: float) -> str:
    return f"{measured / predicted:.2f}" if predicted > 0 else "-"


def compare(
    predicted: Simulation,
    records: Mapping[str, Sequence[Record]],
    moved: int,
    measured_memory: Mapping[str, float] | None = None,
    measured_moved: float | None = None,
) -> Comparison:
    """Compare a simulation with the records of steps.

    Args:
        records: by device, as ``TrainStep.records()`` gives them.
        moved: bytes of tensors that a step sends, as planned; ``measured_moved``: as counted.
    """
    expected: dict[tuple[str, str], list[float]] = {}
    for task in predicted.tasks:
        if not task.job.transfer:
            expected.setdefault((_kind(task.job.name), task.job.place), []).append(task.end - task.start)
    found: dict[tuple[str, str], list[float]] = {}
    ends: dict[str, list[float]] = {}
    for device, own in records.items():
        for record in own:
            found.setdefault((_kind(record.name), device), []).append(record.end - record.start)
            ends.setdefault(f"{record.name} {device}", []).append(record.end)
    rows = [
        Row(*key, median(times), median(found[key]), len(found[key])) for key, times in expected.items() if key in found
    ]
    return Comparison(
        tuple(rows), predicted.makespan, _between(ends), moved, predicted.peaks, dict(measured_memory or {}),
        measured_moved,
    )  # fmt: skip


def _kind(name: str) -> str:
    """``F0`` for ``F0.3``: the microbatch is left out."""
    return re.sub(r"\.\d+$", "", name)


def _between(ends: Mapping[str, Sequence[float]]) -> float | None:
    """The median time from one step's last task to the next one's; each task runs once a step."""
    steps = min((len(own) for own in ends.values()), default=0)
    if steps < 2:
        return None
    last = [max(sorted(own)[-steps:][index] for own in ends.values()) for index in range(steps)]
    return median(b - a for a, b in pairwise(last))
