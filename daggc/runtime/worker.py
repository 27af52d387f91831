"""What runs on a worker: programs it knows, the entry point of tasks, and what it reports about itself."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from distributed import WorkerPlugin

import daggc
from daggc.backend.codegen import compile_graph
from daggc.backend.dask_graph import Call, Resident
from daggc.backend.serializers import aligned
from daggc.errors import RunError
from daggc.frontend.opaque import register_functions
from daggc.ir.graph import Program
from daggc.runtime import store

_PROGRAMS: dict[str, Program] = {}
_RECORDS: deque[Record] = deque(maxlen=200_000)
_threads = threading.local()


@dataclass(frozen=True, slots=True)
class Record:
    """When a task ran: seconds since the epoch, on the worker's clock."""

    name: str
    microbatch: int
    start: float
    end: float


@dataclass(frozen=True)
class Facts:
    """What a worker says about itself."""

    address: str
    name: str
    device: str  # torch device its tasks run on: cpu or cuda
    memory: float  # bytes that tasks may use
    threads: int
    torch: str
    daggc: str
    cpu_capability: str


def describe(dask_worker: Any = None) -> Facts:
    """Ask a worker what it is; runs there."""
    device = own_device()
    memory = float(getattr(getattr(dask_worker, "memory_manager", None), "memory_limit", 0) or 0)
    if device.type == "cuda":
        memory = float(torch.cuda.get_device_properties(device).total_memory)
    elif not memory:
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Facts(
        address=str(dask_worker.address),
        name=str(dask_worker.name),
        device=device.type,
        memory=memory,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        daggc=daggc.__version__,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
    )


def own_device() -> torch.device:
    """The device tasks run on here: the first visible GPU, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@dataclass
class ProgramPlugin(WorkerPlugin):
    """Makes a program known to every worker, those that join later too."""

    key: str
    program: Program
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"daggc-{self.key}"

    def setup(self, worker: Any) -> None:
        register_functions(self.functions)
        _PROGRAMS[self.key] = self.program

    def teardown(self, worker: Any) -> None:
        _PROGRAMS.pop(self.key, None)


def run_task(call: Call, context: tuple[Any, ...], *dependencies: Any) -> tuple[Any, ...]:
    """The entry point of every task.

    Args:
        context: ``()``, or the store's name, the version the task reads and the number of torch threads.

    Returns:
        The outputs of the callee; for an update, the new version.
    """
    try:
        program = _PROGRAMS[call.program]
    except KeyError:
        raise RunError(f"this worker does not know program {call.program}; was its daggc plugin removed?") from None
    name, version, threads = context or ("", 0, 0)
    if threads and getattr(_threads, "count", None) != threads:
        torch.set_num_threads(threads)
        _threads.count = threads
    device = own_device()
    state = store.get(name) if name else None

    def argument(source: tuple[int, Any] | Resident) -> torch.Tensor:
        if isinstance(source, Resident):
            assert state is not None, "tasks that read a store are given its name"
            return state.read(source.ref, version)
        place, index = source
        value = dependencies[place]
        return aligned((value if index is None else value[index]).to(device))

    def compute() -> tuple[torch.Tensor, ...]:
        return compile_graph(program[call.callee])([argument(source) for source in call.arguments], device)

    start = time.time()
    if call.commits:
        assert state is not None, "updates are given a store"
        state.update(version, lambda: dict(zip(call.commits, compute(), strict=True)))
        results: tuple[Any, ...] = (version + 1,)
    else:
        results = compute()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    _RECORDS.append(Record(call.name, call.microbatch, start, time.time()))
    return results


def know(key: str, program: Program) -> None:
    """Make a program known in this process."""
    _PROGRAMS[key] = program


def take_records() -> list[Record]:
    """The records since the last call; runs on a worker."""
    records = list(_RECORDS)
    _RECORDS.clear()
    return records
