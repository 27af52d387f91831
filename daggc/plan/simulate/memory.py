"""Memory over time: what each device holds, from when tasks run and who reads what they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from daggc.plan.simulate.jobs import Timed


@dataclass(frozen=True, slots=True)
class Buffer:
    """Bytes that a device holds from when the job that makes them begins until the last that reads them has ended.

    Attributes:
        maker: index of a job; -1 for what is there from the start.
        readers: indices of jobs. What nobody reads is freed when its maker ends.
        kept: it stays to the end.
    """

    device: str
    nbytes: float
    maker: int = -1
    readers: tuple[int, ...] = ()
    kept: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes over time as steps: ``bytes[i]`` from ``times[i]`` to ``times[i + 1]``.

    Attributes:
        times: [n] seconds, ascending.
        bytes: [n].
    """

    times: np.ndarray
    bytes: np.ndarray

    @property
    def peak(self) -> float:
        """The most bytes at a time."""
        return float(self.bytes.max(initial=0.0))

    def at(self, time: float) -> float:
        """Bytes at a moment; after what is freed then, and with what is allocated then."""
        place = int(np.searchsorted(self.times, time, side="right")) - 1
        return float(self.bytes[place]) if place >= 0 else 0.0


def memory_over_time(
    tasks: Sequence[Timed],
    buffers: Iterable[Buffer],
    resident: Mapping[str, float] | None = None,
    workspace: Mapping[int, float] | None = None,
) -> dict[str, Memory]:
    """What each device holds while tasks run.

    Args:
        resident: bytes by device that are there all the time.
        workspace: bytes by index of a task that it needs while it runs, beside its results.
    """
    starts = np.array([task.start for task in tasks])
    ends = np.array([task.end for task in tasks])
    changes: dict[str, list[tuple[float, float]]] = {device: [(0.0, own)] for device, own in (resident or {}).items()}
    for buffer in buffers:
        if not buffer.nbytes:
            continue
        own = changes.setdefault(buffer.device, [])
        own.append((float(starts[buffer.maker]) if buffer.maker >= 0 else 0.0, buffer.nbytes))
        if not buffer.kept:
            last = [float(ends[reader]) for reader in buffer.readers]
            last += [float(ends[buffer.maker])] if buffer.maker >= 0 else []
            own.append((max(last, default=0.0), -buffer.nbytes))
    for index, nbytes in (workspace or {}).items():
        if nbytes:
            own = changes.setdefault(tasks[index].job.place, [])
            own += [(tasks[index].start, nbytes), (tasks[index].end, -nbytes)]
    return {device: _steps(own) for device, own in changes.items()}


def _steps(changes: Sequence[tuple[float, float]]) -> Memory:
    """Changes of one device summed up; at one moment all at once: what ends makes room for what begins."""
    times = np.array([time for time, _ in changes])
    moments, place = np.unique(times, return_inverse=True)
    total = np.cumsum(np.bincount(place, [change for _, change in changes], len(moments)))
    return Memory(moments, np.round(total, 3))
