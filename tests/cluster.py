"""Dask clusters for tests: real worker processes, one thread each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dask
from distributed import Client, LocalCluster

# Death is noticed and reported soon; nothing waits for long.
SETTINGS = {
    "distributed.comm.timeouts.connect": "10s",
    "distributed.comm.retry.count": 0,
    "distributed.scheduler.allowed-failures": 0,
    "distributed.worker.profile.enabled": False,
}


@contextmanager
def processes(workers: int = 2, **options: Any) -> Iterator[Client]:
    """A client of a cluster of worker processes, closed whatever happens; it is not the default client.

    ``options``: further ones of LocalCluster.
    """
    with (
        dask.config.set(SETTINGS),
        LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=0, **options
        ) as cluster,
        Client(cluster, set_as_default=False, timeout=60) as client,
    ):
        client.wait_for_workers(workers, timeout=60)
        yield client
