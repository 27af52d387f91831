"""What runs on a worker: programs it knows, the entry point of tasks, and what it reports about itself."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dask
import torch
from distributed import WorkerPlugin

import daggc
from daggc.backend.dask_graph import Argument, Call, Resident, Update
from daggc.backend.local import run_graph
from daggc.backend.serializers import aligned
from daggc.errors import RunError
from daggc.frontend.opaque import register_functions
from daggc.ir.graph import Node, Program
from daggc.runtime import store
from daggc.runtime.devices import own_device
from daggc.runtime.memory import resident_now

_PROGRAMS: dict[str, Program] = {}
_RECORDS: deque[Record] = deque(maxlen=4_000)  # some 200 bytes each: a worker must not seem to grow until it is full
_SHORT = 0.05  # of its limit on memory, how far a worker stays below where it is killed
_HELD = 0.0  # bytes of this process before it had any model
_threads = threading.local()
computing = threading.Lock()  # held while something computes: one task or lane of this process at a time


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


COMPUTING = "daggc-computing"  # a Dask resource, of which every worker has one


async def offer_computing(dask_worker: Any) -> None:
    """Give a worker the resource that tasks which compute hold; runs there.

    One computes at a time, whatever the number of Dask threads; a second thread sends results meanwhile. With
    one thread a result waits for the task that computes next before it is sent.
    """
    await dask_worker.set_resources(**{COMPUTING: 1})


def describe(dask_worker: Any = None) -> Facts:
    """Ask a worker what it is; runs there.

    Of a limit on its memory, tasks may use what it did not hold at first, up to where Dask pauses the worker; one that
    does not pause, until shortly before its nanny kills it.
    """
    global _HELD
    device = own_device()
    memory = usable(getattr(dask_worker, "memory_manager", None))
    if memory and device.type == "cpu":
        _HELD = _HELD or resident_now()
        memory = max(memory - _HELD, 1.0)
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


def usable(manager: Any) -> float:
    """Bytes that a worker's process may hold in all before Dask does anything about it; 0 without a limit."""
    limit = float(getattr(manager, "memory_limit", 0) or 0)
    killed = float(dask.config.get("distributed.worker.memory.terminate", 0.95) or 1.0)
    return limit * min(float(getattr(manager, "memory_pause_fraction", 0) or 1.0), killed - _SHORT)


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


@dataclass(frozen=True, slots=True)
class Context:
    """What every task of a training step on one device is handed.

    Attributes:
        store: the name of the state it reads.
        version: the version it reads; its update makes the next.
        threads: torch threads inside a task; 0 leaves them as they are.
    """

    store: str
    version: int
    threads: int = 0


def run_task(call: Call, context: Context | None, *dependencies: Any) -> tuple[torch.Tensor, ...]:
    """The entry point of tasks: run a callee; returns its outputs."""
    if context is not None:
        set_threads(context.threads)
    return _run(call, context, dependencies)


def read_state(refs: Sequence[str], context: Context, *_: Any) -> tuple[torch.Tensor, ...]:
    """The entry point of tasks that give tensors of the store to other workers."""
    state = store.get(context.store)
    return tuple(state.read(ref, context.version) for ref in refs)


def run_update(update: Update, context: Context, *dependencies: Any) -> tuple[int]:
    """The entry point of updates: make the store's next version, once; returns its number."""
    set_threads(context.threads)
    state = store.get(context.store)

    def compute() -> dict[str, torch.Tensor]:
        changed = {ref: argument(source, context, dependencies, own_device()) for ref, source in update.values}
        for call, refs in zip(update.calls, update.commits, strict=True):
            changed.update(zip(refs, _run(call, context, dependencies), strict=True))
        return changed

    state.update(context.version, compute)
    return (context.version + 1,)


def ran(node: Node, start: float) -> None:
    """Record a call that has run."""
    device = own_device()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    attrs = node.attrs
    name = str(attrs.get("task", attrs["callee"]))
    _RECORDS.append(Record(sys.intern(name), int(attrs.get("microbatch", -1)), start, time.time()))


def program_of(key: str) -> Program:
    """A program that was made known to this worker."""
    if key not in _PROGRAMS:
        raise RunError(f"this worker does not know program {key}; was its daggc plugin removed?")
    return _PROGRAMS[key]


def _run(call: Call, context: Context | None, dependencies: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    program = program_of(call.program)
    device = own_device()
    inputs = [argument(source, context, dependencies, device) for source in call.arguments]
    with computing:
        start = time.time()
        results = run_graph(program, program[call.callee], inputs, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    _RECORDS.append(Record(sys.intern(call.name), call.microbatch, start, time.time()))
    return results


def argument(
    source: Argument, context: Context | None, dependencies: Sequence[Any], device: torch.device
) -> torch.Tensor:
    if isinstance(source, Resident):
        assert context is not None, "tasks that read a store are told which"
        return store.get(context.store).read(source.ref, context.version)
    place, index = source
    value = dependencies[place]
    return aligned((value if index is None else value[index]).to(device))


def set_threads(count: int) -> None:
    """Results depend on the number of torch's threads: it is part of the plan."""
    if count and getattr(_threads, "count", None) != count:
        torch.set_num_threads(count)
        _threads.count = count


def know(key: str, program: Program) -> None:
    """Make a program known in this process."""
    _PROGRAMS[key] = program


def unknow(key: str) -> None:
    """Undo :func:`know`."""
    _PROGRAMS.pop(key, None)


def put_state(name: str, version: int, tensors: Mapping[str, torch.Tensor], more: bool) -> int:
    """Create or replace a store on this worker, or add to it, on the device its tasks run on; it takes the tensors."""
    return store.put(name, version, tensors, own_device(), copy=False, more=more)


def to_own_device(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors on the device this worker's tasks run on."""
    return {name: tensor.to(own_device()) for name, tensor in tensors.items()}


def take_records() -> list[Record]:
    """The records since the last call; runs on a worker."""
    records = list(_RECORDS)
    _RECORDS.clear()
    return records
