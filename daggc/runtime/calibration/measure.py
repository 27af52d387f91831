"""Measuring on the workers of a pool: each alone, then all of a host at once; workers alike are measured once."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

import daggc
from daggc.backend.serializers import aligned
from daggc.frontend.opaque import register_functions
from daggc.ir.graph import Graph
from daggc.plan.cost import Costs
from daggc.runtime import store
from daggc.runtime.calibration.suite import suite
from daggc.runtime.calibration.timing import NodeTimes, time_graphs
from daggc.runtime.devices import own_device
from daggc.runtime.pool import Pool
from daggc.runtime.worker import COMPUTING, set_threads

Environment = dict[str, Any]
ROUNDS = 7  # at most; a budget of seconds may end them after four
_ALLOCATOR = (
    "GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_",
    "LD_PRELOAD",
)  # fmt: skip


def environment(threads: int) -> Environment:
    """What a worker's speed depends on; runs there, on the thread that computes."""
    set_threads(threads)
    device = own_device()
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "host": socket.gethostname(),
        "device": device.type,
        "chip": chip,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "daggc": daggc.__version__,
        "allocator": {name: os.environ.get(name, "") for name in _ALLOCATOR},
    }


def own_cores() -> list[int]:
    """Numbers of the host's cores that this process may run on; none where they cannot be told. Runs on a worker."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pace(threads: int) -> float:
    """Seconds that pass while the thread that computes has a core for one; runs on a worker.

    1 where it has a core of its own, 2 where it shares it with another process or may use half of it. GPUs, and several
    threads, are measured by wall time as it is: 1.
    """
    set_threads(threads)
    if own_device().type == "cuda" or torch.get_num_threads() > 1:
        return 1.0
    numbers = torch.zeros(1 << 14)
    ratios: list[float] = []
    for _ in range(_REPEATS):
        start, begun = time.perf_counter(), time.thread_time()
        while time.thread_time() - begun < _PACED:
            numbers.add_(1)
        ratios.append((time.perf_counter() - start) / (time.thread_time() - begun))
    return max(1.0, median(ratios))


_PACED = 0.1  # seconds of a core: much longer than a process keeps it from another


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return ""


def time_there(
    graphs: Sequence[Graph], seconds: float, rounds: int, threads: int, functions: Mapping[str, Callable[..., Any]]
) -> list[NodeTimes]:
    """:func:`time_graphs` with the threads of a step's tasks; runs on a worker."""
    set_threads(threads)
    register_functions(functions)
    return time_graphs(graphs, seconds, rounds)


def suite_times(seconds: float, rounds: int, threads: int, some: Sequence[int] | None = None) -> list[NodeTimes]:
    """Times of the suite's programs, or of those at some places; runs on a worker, which makes the programs itself."""
    set_threads(threads)
    programs = suite(own_device().type)
    return time_graphs([programs[place] for place in some] if some else programs, seconds, rounds)


def argument_seconds() -> float:
    """Time that a task takes for each value of the worker's store that it reads; runs on a worker."""
    device = own_device()
    store.put(_STORE, 0, {f"param:{index}": torch.zeros(16) for index in range(_ARGUMENTS)}, device)
    times: list[float] = []
    for _ in range(_REPEATS):
        start = time.thread_time()
        kept = [aligned(store.get(_STORE).read(f"param:{index}", 0).to(device)) for index in range(_ARGUMENTS)]
        times.append((time.thread_time() - start) / len(kept))
    store.drop(_STORE)
    return median(times)


_STORE = "daggc-calibration"
_ARGUMENTS = 500
_REPEATS = 5


def on_workers(pool: Pool, devices: Sequence[str], function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run a function on devices at once, each where and when nothing else computes; their results in order."""
    addresses = pool.addresses
    futures = [
        pool.client.submit(
            function,
            *args,
            workers=[addresses[device]],
            allow_other_workers=False,
            resources={COMPUTING: 1},
            pure=False,
            retries=0,
        )
        for device in devices
    ]
    try:
        return pool.gather(futures)
    finally:
        pool.cancel(futures)


def class_totals(graphs: Sequence[Graph], times: Sequence[NodeTimes]) -> dict[str, float]:
    """Seconds of all nodes of each op class."""
    totals: dict[str, float] = {}
    for graph, own in zip(graphs, times, strict=True):
        if own.seconds:
            costs = Costs.of(graph.nodes)
            for kind, seconds in zip(costs.kinds, own.seconds, strict=True):
                name = costs.names[kind].op_class
                totals[name] = totals.get(name, 0.0) + seconds
    return totals
