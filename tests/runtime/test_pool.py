"""Bad places and lost workers: a clear error that names the place, soon, and nothing left running."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
import torch
from cluster import processes
from distributed import Client, LocalCluster
from torch import nn

import daggc
from daggc.errors import PlanError, RunError, WorkerLostError
from daggc.runtime.pool import pool_of

pytestmark = pytest.mark.timeout(120)


@daggc.opaque(out=lambda x: torch.empty_like(x))
def slow(x: torch.Tensor) -> torch.Tensor:
    time.sleep(1)
    return x * 2


class Slow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = slow(x * self.weight)
        return x


def test_devices_are_numbered_by_worker_names(two_workers: Client) -> None:
    pool = pool_of(two_workers)
    assert list(pool.addresses) == ["cpu:0", "cpu:1"]
    workers = two_workers.scheduler_info()["workers"]
    assert [str(workers[address]["name"]) for address in pool.addresses.values()] == ["0", "1"]
    assert list(pool_of(two_workers, ["cpu:1"]).addresses) == ["cpu:1"]
    assert list(pool_of(two_workers, ["1"]).addresses) == ["cpu:1"]


def test_a_device_that_does_not_exist(two_workers: Client) -> None:
    with pytest.raises(PlanError, match="no device cpu:7, gpu:0; the client's workers are cpu:0, cpu:1"):
        daggc.compile(Slow(), client=two_workers, devices=["cpu:0", "gpu:0", "cpu:7"])


def test_a_pin_to_a_device_that_does_not_exist(two_workers: Client) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(PlanError, match="cpu:5"):
        daggc.compile(model, client=two_workers, pins={"0": "cpu:5"})(torch.ones(2, 3))


def test_no_workers() -> None:
    with (
        LocalCluster(n_workers=0, dashboard_address=None, processes=False) as cluster,
        Client(cluster, set_as_default=False) as client,
        pytest.raises(RunError, match="has no workers"),
    ):
        daggc.compile(Slow(), client=client)


def test_a_closed_client() -> None:
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, processes=False) as cluster:
        client = Client(cluster, set_as_default=False)
        compiled = daggc.compile(nn.Linear(3, 3), client=client)
        compiled(torch.ones(2, 3))
        client.close()
        with pytest.raises(RunError, match="client"):
            compiled(torch.ones(2, 3))
        with pytest.raises(RunError):
            daggc.compile(nn.Linear(3, 3), client=client)(torch.ones(2, 3))


def test_workers_in_this_process_do_not_share_memory_by_accident() -> None:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, processes=False) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
        compiled = daggc.compile(model, client=client)
        for _ in range(2):
            given = torch.randn(4, 3)
            expected = torch.func.functional_call(
                model, {name: x.clone() for name, x in model.state_dict().items()}, (given,)
            )
            torch.testing.assert_close(compiled(given), expected)


def _kill_soon(client: Client, address: str, seconds: float) -> threading.Thread:
    pid = client.run(os.getpid, workers=[address])[address]

    def kill() -> None:
        time.sleep(seconds)
        os.kill(pid, 9)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def _kill_at_work(client: Client, address: str) -> threading.Thread:
    """Kill a worker half a second after it was first given a task."""

    def given(dask_scheduler: Any) -> bool:
        return any(task.key.startswith("daggc.") for task in dask_scheduler.workers[address].processing)

    pid = client.run(os.getpid, workers=[address])[address]

    def kill() -> None:
        _wait_until(lambda: client.run_on_scheduler(given), seconds=60)
        time.sleep(0.5)
        os.kill(pid, 9)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def _running(client: Client) -> int:
    """Tasks of daggc that the scheduler still has to run, or runs."""

    def count(dask_scheduler: Any) -> int:
        return sum(
            task.state in ("processing", "no-worker", "waiting", "queued") for task in dask_scheduler.tasks.values()
        )

    return client.run_on_scheduler(count)


@pytest.mark.parametrize("victim", ["cpu:0", pytest.param("cpu:1", marks=pytest.mark.slow)])
def test_a_worker_killed_in_mid_run(victim: str) -> None:
    with processes(2) as client:
        compiled = daggc.compile(Slow(), client=client, stages=2)
        address = compiled._pool.addresses[victim]
        thread = _kill_at_work(client, address)
        start = time.monotonic()
        with pytest.raises(WorkerLostError, match=rf"worker {victim} \({address}\) is gone"):
            compiled(torch.ones(3))
        assert time.monotonic() - start < 15
        thread.join()
        _wait_until(lambda: _running(client) == 0)
        client.wait_for_workers(2, timeout=30)  # the nanny brings it back
        again = daggc.compile(Slow(), client=client)
        assert again(torch.ones(3)).tolist() == [16, 16, 16]


@pytest.mark.slow
def test_a_worker_that_is_gone_before_anything_was_sent() -> None:
    with processes(2) as client:
        compiled = daggc.compile(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), client=client, stages=2)
        _kill_soon(client, compiled._pool.addresses["cpu:0"], 0).join()
        _wait_until(lambda: compiled._pool.addresses["cpu:0"] not in client.nthreads())
        with pytest.raises(WorkerLostError, match="worker cpu:0"):
            compiled(torch.ones(2, 8))


def test_a_worker_killed_between_forward_and_backward() -> None:
    with processes(2) as client:
        compiled = daggc.compile(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), client=client, stages=2)
        loss = compiled(torch.ones(2, 8)).sum()
        _kill_soon(client, compiled._pool.addresses["cpu:0"], 0).join()
        start = time.monotonic()
        with pytest.raises(WorkerLostError, match="worker cpu:0"):
            loss.backward()
        with pytest.raises(WorkerLostError, match="worker cpu:0"):
            compiled(torch.ones(2, 8))
        assert time.monotonic() - start < 15
        _wait_until(lambda: _running(client) == 0)


def test_a_scheduler_that_is_gone() -> None:
    with processes(1) as client:
        compiled = daggc.compile(nn.Linear(3, 3), client=client)
        compiled(torch.ones(2, 3))
        client.cluster.close()
        start = time.monotonic()
        with pytest.raises(RunError, match=r"scheduler|client"):
            compiled(torch.ones(2, 3))
        assert time.monotonic() - start < 30


def _wait_until(condition: Any, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "still not so"
        time.sleep(0.1)
