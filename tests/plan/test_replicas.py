"""Schedules of stages with replicas."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daggc.plan.schedule import SCHEDULES, SPLIT_BACKWARD
from daggc.plan.schedule.replicas import replicated
from daggc.plan.schedule.tasks import Schedule

ORDERED = ("gpipe", "1f1b", "zb-h1", "dag")


def runs(schedule: Schedule, devices: list[list[int]]) -> bool:
    """Whether every task runs once, on its replica's device, in an order in which nothing waits for ever."""
    orders = [list(order) for order in schedule.orders]
    needs, done = schedule.needs(), set()
    while any(orders):
        ready = [order for order in orders if order and all(need in done for need in needs[order[0]])]
        if not ready:
            return False
        done.update(order.pop(0) for order in ready)
    placed = all(
        devices[task.stage][task.microbatch % len(devices[task.stage])] == device
        for device, order in enumerate(schedule.orders)
        for task in order
    )
    return placed and done == set(schedule.emitted) and len(schedule.emitted) == len(done)


@given(st.sampled_from(ORDERED), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(1, 9), st.booleans())
def test_every_task_runs_once_on_its_replicas_device(name: str, counts: list[int], microbatches: int, timed: bool):
    devices, first = [], 0
    for count in counts:
        devices.append(list(range(first, first + count)))
        first += count
    split = name in SPLIT_BACKWARD
    options = {"seconds": {"forward": [1.0] * len(counts), "backward": 2.0, "weight_grad": 1.0}} if timed else {}
    schedule = replicated(SCHEDULES[name], devices, microbatches, split, **options)
    assert schedule.microbatches == microbatches
    assert len(schedule.emitted) == len(counts) * microbatches * (3 if split else 2)
    assert runs(schedule, devices)


def test_replicas_work_side_by_side():
    schedule = replicated(SCHEDULES["1f1b"], [[0, 1], [2]], 4)
    assert [" ".join(map(str, order)) for order in schedule.orders] == [
        "F0.0 F0.2 B0.0 B0.2",
        "F0.1 F0.3 B0.1 B0.3",
        "F1.0 F1.1 B1.0 B1.1 F1.2 F1.3 B1.2 B1.3",
    ]


@pytest.mark.parametrize("name", ORDERED)
def test_without_replicas_nothing_changes(name: str):
    split = name in SPLIT_BACKWARD
    assert replicated(SCHEDULES[name], [[0], [1], [0]], 3, split) == SCHEDULES[name](3, 3, [0, 1, 0], split)
