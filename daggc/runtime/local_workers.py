"""Worker processes on this machine, set up for pinned tasks on large tensors.

Dask's defaults suit many small tasks of unknown cost. A plan is pinned and moves tensors of megabytes: work
stealing and the profiler only cost time, copies of what steps send are needed where they are, and the nanny's allocator
settings make every large tensor be mapped and faulted in anew. Dask's processes look 50 times a second whether their
loops are alive: that alone was 5% of a core for a scheduler and two workers that did nothing. And they keep the last
1,000 messages of each stream, with the data in them, an hour of samples of the system and the last 100 computations.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dask
from distributed import Client, LocalCluster

from daggc.errors import RunError

_GIB = 1 << 30


def worker_environment(threads: int = 1) -> dict[str, str]:
    """Environment variables that a worker process must have when it starts.

    glibc keeps freed memory up to these sizes instead of giving it back to the system after each tensor. All
    threads allocate from one heap: of several, each would keep what its own threads needed at most. They have no
    caches of small blocks: what is split off to align a tensor would stay there, and the place that the tensor
    leaves would be too small for the next one of its size.
    """
    allocator = {
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_TRIM_THRESHOLD_": str(4 * _GIB),
        "MALLOC_MMAP_THRESHOLD_": str(4 * _GIB),
        "MALLOC_TOP_PAD_": str(_GIB // 4),
    }
    return {**allocator, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))}


def dask_settings(threads: int = 1) -> dict[str, Any]:
    """Dask configuration for clusters that run daggc; for ``dask.config.set`` or a YAML file."""
    return {
        "distributed.nanny.pre-spawn-environ": worker_environment(threads),
        "distributed.scheduler.work-stealing": False,
        "distributed.scheduler.active-memory-manager.start": False,
        "distributed.scheduler.worker-ttl": "30s",
        "distributed.scheduler.no-workers-timeout": "60s",
        "distributed.worker.profile.enabled": False,
        "distributed.admin.tick.interval": "500ms",
        "distributed.admin.tick.cycle": "5s",
        "distributed.admin.low-level-log-length": 100,
        "distributed.admin.system-monitor.log-length": 120,
        "distributed.diagnostics.computations.max-history": 10,
    }


@contextmanager
def local_workers(count: int, threads: int = 1) -> Iterator[Client]:
    """A client of ``count`` worker processes on this machine; all of it is closed at the end, whatever happens.

    Args:
        count: worker processes; each computes one task at a time.
        threads: torch threads inside a task. Results depend on it in their last bits.

    Raises:
        RunError: the workers did not start, or it is called outside ``if __name__ == "__main__":``.
    """
    if count < 1 or threads < 1:
        raise RunError(f"workers and threads are at least 1, got {count} and {threads}")
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself finds out
        raise RunError(
            "a worker process that starts imports your script, which starts workers in its turn: call local_workers "
            'inside `if __name__ == "__main__":`'
        )
    with dask.config.set(dask_settings(threads)):
        try:
            cluster = LocalCluster(
                n_workers=count,
                threads_per_worker=2,  # one computes, one sends
                processes=True,
                dashboard_address=":0",
                memory_limit=0,
                silence_logs=logging.ERROR,
            )
        except RuntimeError as wrong:
            raise RunError(
                f"the worker processes did not start ({wrong}; what they said is above). A script that starts workers "
                'does so inside `if __name__ == "__main__":`'
            ) from wrong
        with cluster, Client(cluster, timeout=60) as client:
            try:
                client.wait_for_workers(count, timeout=60)
            except TimeoutError as wrong:
                raise RunError(f"{count} worker processes did not start within a minute") from wrong
            yield client


@contextmanager
def workers_for(count: int = 0, scheduler: str | None = None) -> Iterator[Client | None]:
    """The client that a command was asked to use: of a scheduler's address, of ``count`` new processes, or none.

    Raises:
        RunError: both were asked for, or the scheduler does not answer.
    """
    if scheduler and count:
        raise RunError("either connect to a scheduler or start workers, not both")
    if scheduler:
        try:
            client = Client(scheduler, timeout=30)
        except (OSError, TimeoutError, ValueError) as wrong:
            raise RunError(f"no Dask scheduler answers at {scheduler}: {wrong}") from wrong
        with client:
            yield client
    elif count:
        with local_workers(count) as client:
            yield client
    else:
        yield None
