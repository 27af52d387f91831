"""Schedules against their closed forms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daggc.errors import PlanError
from daggc.plan.schedule import BACKWARD, FORWARD, SCHEDULES, WEIGHT_GRAD, Task, gpipe, one_f_one_b, split_batch

pipelines = st.tuples(st.integers(1, 6), st.integers(1, 9))


def plain_1f1b(stages: int, microbatches: int, rank: int) -> list[Task]:
    """Warm up, alternate, drain."""
    warm = min(stages - rank - 1, microbatches)
    order = [Task(rank, FORWARD, k) for k in range(warm)]
    for k in range(microbatches - warm):
        order += [Task(rank, FORWARD, warm + k), Task(rank, BACKWARD, k)]
    return order + [Task(rank, BACKWARD, k) for k in range(microbatches - warm, microbatches)]


@given(pipelines)
def test_one_f_one_b_is_the_published_order(pipeline):
    stages, microbatches = pipeline
    schedule = one_f_one_b(stages, microbatches)
    for rank, order in enumerate(schedule.orders):
        assert list(order) == plain_1f1b(stages, microbatches, rank)
    assert schedule.in_flight() == tuple(min(microbatches, stages - rank) for rank in range(stages))


@given(pipelines)
def test_gpipe_runs_all_forwards_first(pipeline):
    stages, microbatches = pipeline
    schedule = gpipe(stages, microbatches)
    for rank, order in enumerate(schedule.orders):
        phases = [FORWARD] * microbatches + [BACKWARD] * microbatches
        assert list(order) == [Task(rank, p, k % microbatches) for k, p in enumerate(phases)]
    assert schedule.in_flight() == (microbatches,) * stages


@st.composite
def any_schedules(draw: st.DrawFn):
    stages = draw(st.integers(1, 6))
    devices = [draw(st.integers(0, 3)) for _ in range(stages)]
    numbers = {device: index for index, device in enumerate(dict.fromkeys(devices))}
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    device_of = [numbers[device] for device in devices]
    return SCHEDULES[name](stages, draw(st.integers(1, 7)), device_of, draw(st.booleans()))


@given(any_schedules())
def test_every_task_once_after_what_it_needs(schedule):
    phases = {task.phase for task in schedule.emitted}
    assert len(schedule.emitted) == len(set(schedule.emitted)) == schedule.stages * schedule.microbatches * len(phases)
    seen: set[Task] = set()
    for task in schedule.emitted:
        assert set(task.needs(schedule.stages)) <= seen
        seen.add(task)
    for device, order in enumerate(schedule.orders):
        assert list(order) == [task for task in schedule.emitted if schedule.device_of[task.stage] == device]
    for phase in phases:
        for stage in range(schedule.stages):
            numbers = [t.microbatch for t in schedule.emitted if (t.stage, t.phase) == (stage, phase)]
            assert numbers == sorted(numbers)


@given(any_schedules())
def test_schedules_never_hold_more_than_their_credits(schedule):
    if schedule.name == "1f1b" and WEIGHT_GRAD not in {task.phase for task in schedule.emitted}:
        assert all(peak <= schedule.stages - stage for stage, peak in enumerate(schedule.in_flight()))


def test_printed():
    assert str(one_f_one_b(2, 2)).splitlines() == [
        "1f1b: 2 stages, 2 microbatches",
        "  device 0: F0.0 F0.1 B0.0 B0.1",
        "  device 1: F1.0 B1.0 F1.1 B1.1",
    ]


def test_sizes_of_microbatches():
    assert split_batch(10, 3) == (4, 3, 3)
    assert split_batch(8, 4) == (2, 2, 2, 2)
    for wrong in ((2, 3), (4, 0)):
        with pytest.raises(PlanError, match="microbatches"):
            split_batch(*wrong)


@pytest.mark.parametrize("wrong", [(0, 1, None), (2, 0, None), (2, 2, [0]), (2, 2, [0, 2])])
def test_what_is_no_pipeline(wrong):
    with pytest.raises(PlanError):
        gpipe(*wrong)
