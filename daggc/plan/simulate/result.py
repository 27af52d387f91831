"""What a simulation gives: the timeline, how busy devices and links are, and memory over time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from daggc.plan.schedule.tasks import FORWARD_BACKWARD, PHASES
from daggc.plan.simulate.jobs import Timed
from daggc.plan.simulate.memory import Memory

_PHASES = (*PHASES, FORWARD_BACKWARD)


@dataclass(frozen=True)
class Simulation:
    """What would run when.

    Attributes:
        tasks: every job, in order of the graph.
        makespan: seconds from the start to the end of the last job.
        places: devices and links, in order of their first job.
        memory: bytes over time by device, where it was simulated.
    """

    tasks: tuple[Timed, ...]
    makespan: float
    places: tuple[str, ...] = field(default=())
    memory: Mapping[str, Memory] = field(default_factory=dict)

    @cached_property
    def _on(self) -> dict[str, list[Timed]]:
        found: dict[str, list[Timed]] = {}
        for task in self.tasks:
            found.setdefault(task.job.place, []).append(task)
        for own in found.values():
            own.sort(key=lambda task: task.start)
        return found

    @cached_property
    def _busy(self) -> dict[str, float]:
        return {place: sum(task.end - task.start for task in own) for place, own in self._on.items()}

    def on(self, place: str) -> list[Timed]:
        """The jobs of a device or link, in order of time."""
        return list(self._on.get(place, ()))

    def busy(self, place: str) -> float:
        """Seconds that a device or link works."""
        return self._busy.get(place, 0.0)

    def utilisation(self, place: str) -> float:
        """Of a device or link, the part of the makespan that it works."""
        return self.busy(place) / self.makespan if self.makespan else 1.0

    @cached_property
    def devices(self) -> tuple[str, ...]:
        return tuple(place for place, own in self._on.items() if not own[0].job.transfer)

    @property
    def bubble(self) -> float:
        """The part of the devices' time in which they do nothing."""
        devices = self.devices
        return 1 - sum(map(self.utilisation, devices)) / len(devices) if devices else 0.0

    @property
    def peaks(self) -> dict[str, float]:
        """The most bytes that each device holds at a time."""
        return {device: memory.peak for device, memory in self.memory.items()}

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

    def to_json(self) -> dict[str, Any]:
        """Plain data: times in microseconds, tasks as rows under ``columns``, memory as steps."""
        number = {place: index for index, place in enumerate(self.places)}
        devices = set(self.devices)
        return {
            "makespan_us": _us(self.makespan),
            "bubble": round(self.bubble, 6),
            "places": [
                {
                    "name": place,
                    "kind": "device" if place in devices else "link",
                    "tasks": len(self._on.get(place, ())),
                    "busy_us": _us(self.busy(place)),
                    "utilisation": round(self.utilisation(place), 6),
                }
                for place in self.places
            ],
            "columns": ["name", "place", "start_us", "end_us", "stage", "phase", "microbatch"],
            "tasks": [
                [t.job.name, number[t.job.place], _us(t.start), _us(t.end), t.job.stage, t.job.phase, t.job.microbatch]
                for t in self.tasks
            ],
            "memory": {
                device: {
                    "peak": round(memory.peak),
                    "times_us": [_us(time) for time in memory.times],
                    "bytes": [round(value) for value in memory.bytes],
                }
                for device, memory in self.memory.items()
            },
        }

    def __str__(self) -> str:
        lines = [f"makespan {_time(self.makespan)}, bubble {self.bubble:.1%}"]
        devices = set(self.devices)
        for place in sorted(self._on):
            what = "tasks" if place in devices else "transfers"
            held = f", at most {self.memory[place].peak / 1e6:,.1f} MB" if place in self.memory else ""
            share = f"busy {_time(self.busy(place))} ({self.utilisation(place):.0%})"
            lines.append(f"  {place}: {len(self._on[place])} {what}, {share}{held}")
        peaks = ", ".join(f"{stage}: {count}" for stage, count in self.in_flight().items())
        return "\n".join((*lines, f"  microbatches in flight by stage: {peaks}")) if peaks else "\n".join(lines)


def _us(seconds: float) -> float:
    return round(float(seconds) * 1e6, 3)


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3f} s"
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
