"""What tasks and transfers take beyond their ops: chains and fans of trivial tasks, run as a step's tasks are.

Each number is a slope: a long chain less a short one, over the tasks between, timed by the client. So clocks of
different hosts are never compared, and what submitting takes at all falls out.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from statistics import median

import torch
from distributed import Future

from daggc.backend.dask_graph import Found, emit
from daggc.errors import DaggcError
from daggc.ir.graph import Graph, Program
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.call import declare
from daggc.plan.place import place
from daggc.runtime.dask_executor import new_token
from daggc.runtime.pool import Pool
from daggc.runtime.worker import run_task

_LARGE = TensorType("f32", (1 << 20,))  # what bandwidth is measured with: 4 MiB
_SMALL = TensorType("f32", (1,))
_REPEATS = 3
_FEW, _MANY = 4, 28  # tasks of chains whose CPU time is measured
_SHORTEST = 1e-6  # no slope is taken for less, whatever noise there was


@dataclass(frozen=True)
class Overheads:
    """Of tasks on one device.

    Attributes:
        overhead: seconds for each of many tasks that wait for nothing.
        hop: seconds more when each waits for the one before it.
    """

    overhead: float
    hop: float


class Meter:
    """Times trivial tasks on a pool; a context, for the workers must know its program meanwhile."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._key = f"calibration-{new_token()[:8]}"
        self._data: dict[tuple[str, TensorType], Future] = {}

    def __enter__(self) -> Meter:
        self.pool.ship(self._key, Program(self._bodies), {})
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(DaggcError):
            self.pool.forget(self._key)
        self._data.clear()

    def overheads(self, device: str) -> Overheads:
        """Of a device's tasks."""
        fan = self._slope([device], _SMALL, 4, 28, chained=False)
        chain = self._slope([device], _SMALL, 2, 12)
        return Overheads(fan, max(chain - fan, 0.0))

    def handling(self, device: str) -> float:
        """Seconds of CPU that all processes together spend on a task of a chain that does next to nothing.

        Only of processes on this host; where the scheduler is on another one, its part is not counted.
        """
        return self._spent([device], _SMALL)

    def handling_between(self, source: str, target: str, task: float) -> tuple[float, float]:
        """Seconds of CPU that each end of a message spends on it, and for each of its bytes.

        Args:
            task: what a task takes without a message.
        """
        message = max(self._spent([source, target], _SMALL) - task, 0.0)
        large = self._spent([source, target], _LARGE) - self._spent([source], _LARGE)
        return message / 2, max(large - message, 0.0) / _LARGE.nbytes / 2

    def _spent(self, devices: Sequence[str], type_: TensorType) -> float:
        """Seconds of CPU of all processes for a task of a chain over the devices in turn."""
        spent: dict[int, list[float]] = {_FEW: [], _MANY: []}
        self._seconds(devices, type_, _FEW, True)
        for count, own in spent.items():
            for _ in range(_REPEATS):
                before = self._cpu()
                self._seconds(devices, type_, count, True)
                after = self._cpu()
                own.append(sum(after[key] - before.get(key, 0.0) for key in after))
        return max((median(spent[_MANY]) - median(spent[_FEW])) / (_MANY - _FEW), 0.0)

    def _cpu(self) -> dict[tuple[str, int], float]:
        """By process: seconds of CPU so far, of the client, the scheduler and the workers."""
        client = self.pool.client
        here = _cpu_seconds()
        found = [here, client.run_on_scheduler(_cpu_seconds), *client.run(_cpu_seconds).values()]
        return {key: seconds for key, seconds in found if key[0] == here[0][0]}

    def link(self, source: str, target: str, own: Overheads) -> tuple[float, float]:
        """Latency and bandwidth, from chains that go back and forth; ``own``: of tasks without a transfer."""
        there = self._slope([source, target], _SMALL, 2, 12)
        here = own.overhead + own.hop
        large = self._slope([source, target], _LARGE, 2, 8) - self._slope([source], _LARGE, 2, 8)
        extra = max(large - (there - here), _SHORTEST)
        return max(there - own.overhead, _SHORTEST), _LARGE.nbytes / extra

    @cached_property
    def _bodies(self) -> dict[str, Graph]:
        bodies: dict[str, Graph] = {}
        for type_ in (_SMALL, _LARGE):
            b = REGISTRY.builder(f"next{type_.numel}")
            b.output(b.emit("add_scalar", b.input(type_, "value", "0"), value=1.0), "value", "0")
            bodies[f"next{type_.numel}"] = b.build()
            b = REGISTRY.builder(f"end{type_.numel}")
            x = b.input(type_, "value", "0")
            b.output(b.emit("slice", x, dim=0, start=0, end=1, step=1), "value", "0")
            bodies[f"end{type_.numel}"] = b.build()
        return bodies

    def _slope(self, devices: Sequence[str], type_: TensorType, short: int, long: int, chained: bool = True) -> float:
        """Seconds of a task: of a chain over the devices in turn, or of tasks that only share their input."""
        times = {count: [] for count in (short, long)}
        self._seconds(devices, type_, short, chained)
        for _ in range(_REPEATS):
            for count, own in times.items():
                own.append(self._seconds(devices, type_, count, chained))
        return max((min(times[long]) - min(times[short])) / (long - short), _SHORTEST)

    def _seconds(self, devices: Sequence[str], type_: TensorType, count: int, chained: bool) -> float:
        """From submitting that many tasks to having the last one's result, or all of them."""
        b = REGISTRY.builder("chain")
        given = value = b.input(type_, "input", "0")
        ends = []
        for _ in range(count):
            value = b.emit("call", value if chained else given, callee=f"next{type_.numel}", **declare([type_]))
            ends.append(value)
        for end in ends[-1:] if chained else ends:
            last = b.emit("call", end, callee=f"end{type_.numel}", **declare([_SMALL])) if type_ != _SMALL else end
            b.output(last, "output", last.name)
        main = b.build()
        turns = dict(
            zip((node.outputs[0].name for node in main.nodes), islice(cycle(devices), len(main.nodes)), strict=True)
        )
        graph = place(main, lambda node: turns[node.outputs[0].name])
        future = self._input(devices[0], type_)
        emission = emit(graph, self._key, new_token(), {"input:0": Found(str(future.key), "x")}, run_task)
        keys = list(dict.fromkeys(found.key for found in emission.outputs.values()))
        start = time.perf_counter()
        futures = self.pool.submit(emission, keys)
        self.pool.gather(futures)
        seconds = time.perf_counter() - start
        self.pool.cancel(futures)
        return seconds

    def _input(self, device: str, type_: TensorType) -> Future:
        if (device, type_) not in self._data:
            self._data[device, type_] = self.pool.scatter({"x": torch.zeros(type_.shape)}, device)
        return self._data[device, type_]


def _cpu_seconds() -> tuple[tuple[str, int], float]:
    """Host and number of this process, and the CPU time it has spent."""
    return (platform.node(), os.getpid()), time.process_time()
