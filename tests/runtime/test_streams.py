"""Dask's streams send at once on every cluster that daggc uses, and on none that it must leave alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import dask
import pytest
import torch
from distributed import Client, LocalCluster

import daggc
from daggc.errors import RunError
from daggc.runtime.pool import pool_of
from daggc.runtime.streams import AT_ONCE, DASK, SWITCH, Intervals, scheduler_intervals, set_streams, worker_interval

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, processes=False) as made:
        yield made


def intervals(client: Client) -> list[Intervals]:
    """Of every worker."""
    own = client.run_on_scheduler(scheduler_intervals)
    return [
        Intervals(own["to_worker"], from_worker, own["to_client"], client.scheduler_comm.interval)
        for from_worker in client.run(worker_interval).values()
    ]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, "still not so"
        time.sleep(0.05)


def test_dask_collects_messages_until_daggc_uses_the_cluster(cluster: LocalCluster) -> None:
    with Client(cluster, set_as_default=False) as client:
        assert intervals(client) == [DASK]
        pool_of(client)
        assert intervals(client) == [AT_ONCE]
        pool_of(client)
        assert intervals(client) == [AT_ONCE]


def test_workers_and_clients_that_come_later_send_at_once_too(cluster: LocalCluster) -> None:
    with Client(cluster, set_as_default=False) as client:
        pool_of(client)
        cluster.scale(2)
        client.wait_for_workers(2, timeout=30)
        until(lambda: intervals(client) == [AT_ONCE, AT_ONCE])
        with Client(cluster, set_as_default=False) as another:
            until(lambda: another.run_on_scheduler(scheduler_intervals)["to_client"] == AT_ONCE.to_client)


def test_streams_are_left_alone_when_told_so(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "off")
    with Client(cluster, set_as_default=False) as client:
        pool_of(client)
        assert intervals(client) == [DASK]
        monkeypatch.setenv(SWITCH, "perhaps")
        with pytest.raises(RunError, match="DAGGC_STREAMS is on or off, got 'perhaps'"):
            pool_of(client)


def test_a_cluster_that_takes_no_plugins_is_used_all_the_same() -> None:
    with (
        dask.config.set({"distributed.scheduler.blocked-handlers": ["register_scheduler_plugin"]}),
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, processes=False) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        model = torch.nn.Linear(3, 3)
        torch.testing.assert_close(daggc.compile(model, client=client)(torch.ones(2, 3)), model(torch.ones(2, 3)))
        assert client.run_on_scheduler(scheduler_intervals)["to_worker"] == DASK.to_worker


def test_a_measurement_sets_them_back(cluster: LocalCluster) -> None:
    with Client(cluster, set_as_default=False) as client:
        pool_of(client)
        set_streams(client, DASK)
        assert intervals(client) == [DASK]
