"""What Dask remembers of tasks that are over does not grow with the steps of a training."""

from __future__ import annotations

from typing import Any

import torch
from dask.utils import key_split
from distributed import Client, span
from torch import nn

import daggc
from daggc.runtime.pool import pool_of
from daggc.runtime.spans import ID, FewNames, forget_names


def records(dask_scheduler: Any) -> tuple[int, int, int]:
    """Spans; groups of tasks and submissions that daggc's holds."""
    spans = dask_scheduler.extensions["spans"].spans
    return len(spans), len(spans[ID].groups), len(spans[ID].metadata["collections"])


def test_records_do_not_grow_with_steps(two_workers: Client) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    step = daggc.compile(model, client=two_workers).train_step(
        nn.functional.mse_loss, torch.optim.SGD(model.parameters(), 0.1), stages=2
    )
    seen = []
    for _ in range(3):
        for _ in range(6):
            loss = step(torch.ones(2, 4), torch.ones(2, 4))
        loss.item()
        seen.append(two_workers.run_on_scheduler(records))
    assert seen[0][0] == seen[2][0]
    assert max(groups for _, groups, _ in seen) <= 40  # of the last submissions
    assert max(submissions for _, _, submissions in seen) <= 2
    step.close()


def test_tasks_stay_in_a_span_of_the_user(two_workers: Client) -> None:
    model = nn.Linear(4, 4)
    compiled = daggc.compile(model, client=two_workers, stages=1)
    with span("mine"):
        compiled(torch.ones(2, 4))

    def names(dask_scheduler: Any) -> list[Any]:
        return [own.name for own in dask_scheduler.extensions["spans"].spans.values() if own.groups]

    assert any("mine" in name for name in two_workers.run_on_scheduler(names))


def test_kinds_of_keys_are_forgotten_when_there_are_many(two_workers: Client) -> None:
    def looks(dask_worker: Any) -> bool:
        return dask_worker.periodic_callbacks[FewNames.name].is_running()

    pool_of(two_workers)
    assert set(two_workers.run(looks).values()) == {True}
    for number in range(6_000):
        key_split(f"key-{number}")
    forget_names()
    assert key_split.cache_info().currsize == 0
    key_split("key-1")
    forget_names()
    assert key_split.cache_info().currsize == 1
