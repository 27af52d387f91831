"""What a process holds, and what of it grows; and a cluster whose scheduler is a process of its own."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dask
import psutil
from distributed import Client
from distributed.deploy.subprocess import SubprocessCluster

from daggc.runtime.local_workers import dask_settings


@dataclass(frozen=True)
class Held:
    """Of a process: bytes resident in memory, bytes in use of glibc's, and blocks in use of Python's own allocator."""

    resident: int
    used: int
    blocks: int


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def held() -> Held:
    """Of this process, after a collection of garbage."""
    gc.collect()
    glibc = ctypes.CDLL(None)
    found = _Mallinfo2()
    if hasattr(glibc, "mallinfo2"):
        glibc.mallinfo2.restype = _Mallinfo2
        found = glibc.mallinfo2()
    return Held(psutil.Process().memory_info().rss, found.uordblks + found.hblkhd, sys.getallocatedblocks())


def types() -> Counter[str]:
    """How many objects of each type the garbage collector knows in this process."""
    gc.collect()
    return Counter(f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.get_objects())


def everywhere(client: Any, function: Any) -> dict[str, Any]:
    """What a function gives here, on the scheduler and on each worker, by the name of the process."""
    workers = client.run(function)
    names = {address: f"worker {number}" for number, address in enumerate(sorted(workers))}
    found = {"client": function(), "scheduler": client.run_on_scheduler(function)}
    return found | {names[address]: result for address, result in workers.items()}


@contextmanager
def separate_processes(count: int) -> Iterator[Client]:
    """A client of a scheduler and workers that are processes of their own, set up as daggc sets them up.

    Silent workers are not given up: a machine that sleeps for a minute in a run of many need not end it.
    """
    with dask.config.set({**dask_settings(1), "distributed.scheduler.worker-ttl": None}):
        inherited = "DASK_INTERNAL_INHERIT_CONFIG"
        os.environ[inherited] = dask.config.serialize(dask.config.global_config)
        try:
            with (
                SubprocessCluster(
                    n_workers=count,
                    threads_per_worker=2,
                    dashboard_address=":0",
                    worker_kwargs={"memory_limit": 0, "preload": ["daggc.runtime.worker"]},
                ) as cluster,
                Client(cluster, timeout=60) as client,
            ):
                client.wait_for_workers(count, timeout=240)
                yield client
        finally:
            del os.environ[inherited]
