"""Dask's memory manager leaves alone what steps have sent, and drops other copies as before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import dask
import pytest
from distributed import Client, Event, LocalCluster

from daggc.runtime.pool import pool_of
from daggc.runtime.replicas import drops_replicas

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def client() -> Iterator[Client]:
    with (
        dask.config.set({"distributed.scheduler.active-memory-manager.start": True}),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, processes=False) as cluster,
        Client(cluster, set_as_default=False) as made,
    ):
        yield made


def _copy(*_: Any) -> int:
    return 1


def _wait(event: str, *_: Any) -> int:
    Event(event).wait(timeout=30)
    return 1


def copies_after_a_look(client: Client, name: str) -> int:
    """Copies of a value of which one is on the worker of a task that will read it, but waits for something else."""
    first, second = list(client.scheduler_info()["workers"])
    made = client.submit(_copy, key=f"{name}-made", workers=[first], allow_other_workers=False)
    read = client.submit(_copy, made, key=f"{name}-read", workers=[second], allow_other_workers=False)
    read.result(timeout=30)
    other = client.submit(_wait, name, key=f"{name}-other", workers=[first], allow_other_workers=False)
    last = client.submit(_copy, made, other, key=f"{name}-last", workers=[second], allow_other_workers=False)
    key = str(made.key)
    client.amm.run_once()
    end = time.monotonic() + 2
    while (copies := len(client.who_has()[key])) == 2 and time.monotonic() < end:
        time.sleep(0.05)
    Event(name, client=client).set()
    last.result(timeout=30)
    return copies


def test_copies_of_what_steps_sent_stay_and_others_are_dropped(client: Client) -> None:
    assert client.run_on_scheduler(drops_replicas)
    assert copies_after_a_look(client, "daggc.before") == 1  # Dask by itself: it will be sent again
    pool_of(client)
    pool_of(client)
    assert not client.run_on_scheduler(drops_replicas)
    assert copies_after_a_look(client, "daggc.after") == 2
    assert copies_after_a_look(client, "others") == 1
