"""What the doctor asks: functions that run in a process, on a worker, on the scheduler, and what they give."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import distributed
import torch
from dask.sizeof import sizeof
from dask.system import CPU_COUNT
from distributed.protocol.serialize import dask_serialize
from distributed.system import MEMORY_LIMIT

import daggc
from daggc.backend import serializers  # noqa: F401  # registers how tensors travel, where this is asked
from daggc.runtime.calibration.measure import Environment, environment
from daggc.runtime.replicas import drops_replicas
from daggc.runtime.streams import Intervals, scheduler_intervals, worker_interval

PROBE = 1000  # f32 elements of the tensor whose size is asked
_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_", "OMP_", "MKL_", "OPENBLAS_", "LD_PRELOAD", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Process:
    """What a process is.

    Attributes:
        versions: of Python and the packages that must agree.
        variables: environment variables of allocators and threads that it was started with.
        cores: that it may use.
        threads: of torch inside a task.
        memory: bytes that it may use.
        glibc: whether its allocator is glibc's.
        gpus: names of the GPUs that torch sees.
        has_gpu: whether the machine has one, whatever torch sees.
    """

    host: str
    versions: Mapping[str, str]
    variables: Mapping[str, str]
    cores: int
    threads: int
    memory: float
    glibc: bool
    gpus: tuple[str, ...]
    has_gpu: bool


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker is.

    Attributes:
        slots: tasks that Dask runs there at once.
        memory_limit: bytes; 0 is none.
        fractions: of the limit, at which it spills to disk (``target``, ``spill``) and stops (``pause``); 0 is never.
        profile: whether its threads are sampled.
        interval: seconds for which messages to the scheduler are collected.
        probe: bytes that Dask takes a tensor of ``PROBE`` f32 elements for.
        serializer: the module that makes bytes of tensors.
        environment: what its speed depends on; calibrations are kept under it.
    """

    address: str
    name: str
    process: Process
    slots: int
    memory_limit: float
    fractions: Mapping[str, float]
    profile: bool
    interval: float
    probe: int
    serializer: str
    environment: Environment

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"


@dataclass(frozen=True)
class SchedulerFacts:
    """What a scheduler is set to.

    Attributes:
        worker_ttl: seconds after which a silent worker is given up; None is never.
        no_workers_timeout: seconds after which a task that no worker may run fails; None is never.
        intervals: seconds for which messages are collected; those of other processes are 0.
        drops_replicas: whether it drops copies of values that steps have sent.
        blocked: what it refuses to do.
    """

    versions: Mapping[str, str]
    stealing: bool
    worker_ttl: float | None
    no_workers_timeout: float | None
    intervals: Intervals
    blocked: tuple[str, ...]
    drops_replicas: bool = False


def versions() -> dict[str, str]:
    """Of Python and the packages that must agree."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dask": dask.__version__,
        "distributed": distributed.__version__,
        "daggc": daggc.__version__,
    }


def this_process() -> Process:
    """What this process is."""
    return Process(
        host=socket.gethostname(),
        versions=versions(),
        variables=_variables(),
        cores=CPU_COUNT,
        threads=torch.get_num_threads(),
        memory=float(MEMORY_LIMIT),
        glibc=sys.platform == "linux" and platform.libc_ver()[0] == "glibc",
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        has_gpu=shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists(),
    )


def _variables() -> dict[str, str]:
    """Variables as they were when the process began: what is set later, the allocator does not see."""
    try:
        given = Path("/proc/self/environ").read_bytes().decode(errors="replace").split("\0")
        found = dict(item.split("=", 1) for item in given if "=" in item)
    except OSError:
        found = dict(os.environ)
    return {name: value for name, value in sorted(found.items()) if name.startswith(_VARIABLES)}


def worker_facts(dask_worker: Any) -> WorkerFacts:
    """What a worker is; runs there."""
    memory = dask_worker.memory_manager
    fractions = {name: getattr(memory, f"memory_{name}_fraction", None) for name in ("target", "spill", "pause")}
    return WorkerFacts(
        address=str(dask_worker.address),
        name=str(dask_worker.name),
        process=this_process(),
        slots=int(dask_worker.state.nthreads),
        memory_limit=float(memory.memory_limit or 0),
        fractions={name: float(fraction or 0) for name, fraction in fractions.items()},
        profile="profile" in dask_worker.periodic_callbacks,
        interval=worker_interval(dask_worker),
        probe=int(sizeof(torch.zeros(PROBE))),
        serializer=dask_serialize.dispatch(torch.Tensor).__module__,
        environment=environment(0),
    )


def scheduler_facts(dask_scheduler: Any) -> SchedulerFacts:
    """What a scheduler is set to; runs there."""
    intervals = scheduler_intervals(dask_scheduler)
    return SchedulerFacts(
        versions=versions(),
        stealing="stealing" in dask_scheduler.extensions,
        worker_ttl=dask_scheduler.worker_ttl or None,
        no_workers_timeout=dask_scheduler.no_workers_timeout or None,
        intervals=Intervals(intervals["to_worker"], 0.0, intervals["to_client"], 0.0),
        blocked=tuple(sorted(dask_scheduler.blocked_handlers)),
        drops_replicas=drops_replicas(dask_scheduler),
    )
