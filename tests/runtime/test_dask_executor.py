"""What travels between the client and workers, and between workers: no more than must."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from distributed import Client
from torch import nn

import daggc
from daggc.backend.dask_graph import Emission
from daggc.errors import CaptureError
from daggc.runtime.dask_executor import DaskExecutor
from daggc.runtime.pool import Pool
from daggc.runtime.shipping import checksum

pytestmark = pytest.mark.timeout(120)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.Tanh()))).double()


def x(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What was scattered (refs) and submitted (emissions)."""
    seen: dict[str, list[Any]] = {"scattered": [], "submitted": []}
    scatter, submit = Pool.scatter, Pool.submit

    def watched_scatter(self: Pool, tensors: Any, device: str) -> Any:
        seen["scattered"] += list(tensors)
        return scatter(self, tensors, device)

    def watched_submit(self: Pool, emission: Emission, keys: Any) -> Any:
        seen["submitted"].append(emission)
        return submit(self, emission, keys)

    monkeypatch.setattr(Pool, "scatter", watched_scatter)
    monkeypatch.setattr(Pool, "submit", watched_submit)
    return seen


def test_only_changed_parameters_are_shipped(two_workers: Client, watched: dict[str, list[Any]]) -> None:
    net = model()
    compiled = daggc.compile(net, client=two_workers)
    compiled(x())
    assert sorted(watched["scattered"]) == sorted(f"param:{name}" for name, _ in net.named_parameters())
    watched["scattered"].clear()
    compiled(x())
    assert watched["scattered"] == []
    with torch.no_grad():
        net[2].weight.add_(1)
    compiled(x())
    assert watched["scattered"] == ["param:2.weight"]


def test_residuals_and_parameters_do_not_travel(two_workers: Client, watched: dict[str, list[Any]]) -> None:
    compiled = daggc.compile(model(), client=two_workers, stages=2)
    compiled(x()).sum().backward()
    for emission in watched["submitted"]:
        for key in emission.calls:
            for dependency in emission.tasks[key].dependencies:
                at_home = emission.device.get(dependency, emission.device[key]) == emission.device[key]
                assert at_home or dependency.startswith("daggc.send-"), (key, dependency)


def settled_tasks(client: Client) -> set[str]:
    """The scheduler's tasks once releases under way (they are asynchronous) have arrived: the same twice running."""
    before: set[str] | None = None
    for _ in range(50):
        now = client.run_on_scheduler(lambda dask_scheduler: {str(key) for key in dask_scheduler.tasks})
        if now == before:
            return now
        before = now
        time.sleep(0.2)
    raise AssertionError("the scheduler's tasks did not come to rest in 10 s")


def test_nothing_is_kept_on_workers_once_a_run_is_over(two_workers: Client) -> None:
    compiled = daggc.compile(model(), client=two_workers)
    compiled(x()).sum().backward()
    after_one = settled_tasks(two_workers)
    for _ in range(3):
        compiled(x()).sum().backward()
    assert settled_tasks(two_workers) <= after_one


def test_a_wrong_shape_is_refused_before_anything_is_sent(two_workers: Client, watched: dict[str, list[Any]]) -> None:
    compiled = daggc.compile(model(), client=two_workers)
    compiled(x())
    watched["submitted"].clear()
    with pytest.raises(CaptureError, match="module '0'"):
        compiled(torch.ones(5, 15, dtype=torch.float64))
    with pytest.raises(CaptureError, match="module '0'"):
        compiled.lazy(torch.ones(5, 15, dtype=torch.float64))
    assert watched["submitted"] == []


def test_workers_that_join_later_know_the_program(two_workers: Client) -> None:
    compiled = daggc.compile(model(), client=two_workers)
    compiled(x())
    executor: DaskExecutor = next(iter(compiled._entries.values())).executor
    key = executor.key
    known = two_workers.run(lambda: key in __import__("daggc.runtime.worker", fromlist=["x"])._PROGRAMS)
    assert all(known.values())
    name = f"daggc-{key}"
    assert name in two_workers.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.worker_plugins))


def test_checksum_sees_every_change() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    before = checksum(tensor)
    assert checksum(tensor.clone()) == before
    assert checksum(tensor[[1, 0, 2]]) != before
    assert checksum(tensor.to(torch.bfloat16)) != before
    assert checksum(torch.empty(0)) == 0
