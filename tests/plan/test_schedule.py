"""Schedules: any pipeline gives an order that runs, within its credits; published orders; what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daggc.errors import PlanError
from daggc.plan.schedule import (
    BACKWARD,
    FORWARD,
    SCHEDULES,
    SPLIT_BACKWARD,
    WEIGHT_GRAD,
    Schedule,
    Task,
    check_schedule,
    dag,
    gpipe,
    interleaved,
    one_f_one_b,
    schedule_named,
    split_batch,
    zb_1p,
    zb_2p,
    zb_h1,
    zb_v,
)
from daggc.plan.simulate import simulate_schedule

pipelines = st.tuples(st.integers(1, 6), st.integers(1, 9))


def plain_1f1b(stages: int, microbatches: int, rank: int) -> list[Task]:
    """Warm up, alternate, drain."""
    warm = min(stages - rank - 1, microbatches)
    order = [Task(rank, FORWARD, k) for k in range(warm)]
    for k in range(microbatches - warm):
        order += [Task(rank, FORWARD, warm + k), Task(rank, BACKWARD, k)]
    return order + [Task(rank, BACKWARD, k) for k in range(microbatches - warm, microbatches)]


def plain_zb_h1(stages: int, microbatches: int, rank: int) -> list[Task]:
    """1F1B, with a weight gradient after each backward but the first ``rank`` ones; those come last."""
    order: list[Task] = []
    for task in plain_1f1b(stages, microbatches, rank):
        order.append(task)
        if task.phase == BACKWARD and task.microbatch >= rank:
            order.append(Task(rank, WEIGHT_GRAD, task.microbatch - rank))
    return order + [Task(rank, WEIGHT_GRAD, k) for k in range(max(microbatches - rank, 0), microbatches)]


def plain_interleaved(devices: int, chunks: int, microbatches: int, rank: int) -> list[Task]:
    """Megatron-LM's order, where the devices divide the microbatches."""
    total = chunks * microbatches

    def task(phase: str, count: int) -> Task:
        group, at = divmod(count, devices * chunks)
        chunk, within = divmod(at, devices)
        chunk = chunk if phase == FORWARD else chunks - 1 - chunk
        return Task(chunk * devices + rank, phase, group * devices + within)

    warm = min(2 * (devices - rank - 1) + (chunks - 1) * devices, total)
    order = [task(FORWARD, k) for k in range(warm)]
    for k in range(total - warm):
        order += [task(FORWARD, warm + k), task(BACKWARD, k)]
    return order + [task(BACKWARD, k) for k in range(total - warm, total)]


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


@given(st.integers(1, 6), st.integers(0, 6))
def test_zb_h1_is_the_published_order(stages, more):
    schedule = zb_h1(stages, stages + more)
    for rank, order in enumerate(schedule.orders):
        assert list(order) == plain_zb_h1(stages, stages + more, rank)


@given(st.integers(1, 4), st.integers(2, 4), st.integers(1, 4))
def test_interleaved_is_the_published_order(devices, chunks, groups):
    microbatches = devices * groups
    schedule = interleaved(devices * chunks, microbatches, chunks=chunks)
    for rank, order in enumerate(schedule.orders):
        assert list(order) == plain_interleaved(devices, chunks, microbatches, rank)


@given(st.sampled_from(["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2"]), pipelines, st.floats(0.1, 3))
def test_published_orders_do_not_depend_on_times(name, pipeline, forward):
    times = {FORWARD: forward, BACKWARD: 1.0, WEIGHT_GRAD: 0.5}
    split = name in SPLIT_BACKWARD
    plain = SCHEDULES[name](*pipeline, split_backward=split)
    assert plain == SCHEDULES[name](*pipeline, split_backward=split, seconds=times, transfer=0.3)


@st.composite
def problems(draw: st.DrawFn):
    """A schedule's name and arguments, with the limit to its memory."""
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    stages, microbatches = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    split = name in SPLIT_BACKWARD or draw(st.booleans())
    options: dict[str, object] = {"split_backward": split}
    device_of = list(range(stages))
    if draw(st.booleans()):
        devices = [draw(st.integers(0, 3)) for _ in range(stages)]
        numbers = {device: index for index, device in enumerate(dict.fromkeys(devices))}
        device_of = [numbers[device] for device in devices]
    if draw(st.booleans()):
        options["feeds"] = [
            sorted(draw(st.sets(st.integers(0, stage - 1), max_size=3))) if stage else [] for stage in range(stages)
        ]
    times = st.floats(0, 5) | st.just(1.0)
    if draw(st.booleans()):
        options["seconds"] = {phase: [draw(times) for _ in range(stages)] for phase in (FORWARD, BACKWARD, WEIGHT_GRAD)}
        options["transfer"] = draw(st.floats(0, 1))
    if draw(st.booleans()):
        options["activations"] = [draw(st.floats(0, 3)) for _ in range(stages)]
        options["weight_memory"] = draw(st.floats(0, 1))
    if name != "gpipe" and draw(st.booleans()):
        sizes = options.get("activations") or [1 / device_of.count(device) for device in device_of]
        least = [0.0] * (max(device_of) + 1)
        for device, size in zip(device_of, sizes, strict=True):
            least[device] += size
        options["memory"] = [own * draw(st.floats(1, 3)) for own in least]
    return name, (stages, microbatches, device_of), options


@settings(max_examples=300)
@given(problems())
def test_every_schedule_runs_each_task_once_in_order_within_its_credits(problem):
    name, (stages, microbatches, device_of), options = problem
    schedule = schedule_named(name)(stages, microbatches, device_of, **options)
    phases = {task.phase for task in schedule.emitted}
    assert phases == ({FORWARD, BACKWARD, WEIGHT_GRAD} if options["split_backward"] else {FORWARD, BACKWARD})
    assert len(schedule.emitted) == len(set(schedule.emitted)) == stages * microbatches * len(phases)
    feeds = options.get("feeds") or [[stage - 1] if stage else [] for stage in range(stages)]
    seen: set[Task] = set()
    for task in schedule.emitted:
        stage, k = task.stage, task.microbatch
        if task.phase == FORWARD:
            assert {Task(source, FORWARD, k) for source in feeds[stage]} <= seen
        elif task.phase == BACKWARD:
            readers = {Task(other, BACKWARD, k) for other, own in enumerate(feeds) if stage in own}
            assert {Task(stage, FORWARD, k), *readers} <= seen
        else:
            assert Task(stage, BACKWARD, k) in seen
        seen.add(task)
    for device, order in enumerate(schedule.orders):
        assert list(order) == [task for task in schedule.emitted if device_of[task.stage] == device]
    for phase in phases:
        for stage in range(stages):
            numbers = [t.microbatch for t in schedule.emitted if (t.stage, t.phase) == (stage, phase)]
            assert numbers == sorted(numbers)
    held = schedule.peak_activations(options.get("activations"), options.get("weight_memory", 0.45))
    for peak, limit in zip(held, options.get("memory", [math.inf] * len(held)), strict=True):
        assert peak <= limit + 1e-6


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "gpipe"])
def test_younger_microbatches_leave_room_for_older_ones_to_come_back(name):
    """Stages 2 and 3 are on the device of stage 0, which could fill with forwards of stage 0."""
    schedule = schedule_named(name)(4, 6, [0, 1, 0, 0], split_backward=name in SPLIT_BACKWARD, memory=1)
    assert max(schedule.peak_activations()) <= 1 + 1e-9


@given(problems())
def test_schedules_are_deterministic(problem):
    name, arguments, options = problem
    assert schedule_named(name)(*arguments, **options) == schedule_named(name)(*arguments, **options)


@given(pipelines, st.sampled_from(["1f1b", "zb-h1", "zb-h2", "zb-1p"]), st.floats(0.1, 3), st.floats(0, 1))
def test_microbatches_in_flight_are_within_the_published_credits(pipeline, name, forward, transfer):
    """F - B is at most p - r (2 (p - r) - 1 in ZB-H2), F - W at most p (2p - 1)."""
    stages, microbatches = pipeline
    times = {FORWARD: forward, BACKWARD: 1.0, WEIGHT_GRAD: 0.6}
    split = name in SPLIT_BACKWARD
    schedule = schedule_named(name)(stages, microbatches, split_backward=split, seconds=times, transfer=transfer)
    twice = name == "zb-h2"
    for rank, order in enumerate(schedule.orders):
        flying = unfinished = 0
        for task in order:
            flying += (task.phase == FORWARD) - (task.phase == BACKWARD)
            unfinished += (task.phase == FORWARD) - (task.phase == WEIGHT_GRAD)
            assert flying <= (2 * (stages - rank) - 1 if twice else stages - rank)
            assert not split or unfinished <= (2 * stages - 1 if twice else stages)


@pytest.mark.parametrize("forward", [0.5, 1.0, 2.0])
def test_the_zero_bubble_family_orders_itself_by_memory(forward):
    times = {FORWARD: forward, BACKWARD: 1.0, WEIGHT_GRAD: 0.7}

    def span(schedule: Schedule) -> float:
        result = simulate_schedule(schedule, times, 0.05)
        return max(result.on(place)[-1].end - result.on(place)[0].start for place in result.devices)

    whole, once, twice = (
        schedule(6, 18, split_backward=True, seconds=times, transfer=0.05) for schedule in (one_f_one_b, zb_1p, zb_2p)
    )
    assert span(twice) < span(once) <= span(whole) + 1e-9
    assert max(once.peak_activations()) <= 6 and max(twice.peak_activations()) <= 12


def test_zb_v_has_no_bubble_in_the_memory_of_1f1b_where_tasks_are_alike():
    for devices, microbatches in ((1, 2), (2, 4), (4, 8), (8, 16)):
        schedule = zb_v(2 * devices, microbatches)
        assert schedule.device_of == (*range(devices), *reversed(range(devices)))
        result = simulate_schedule(schedule, {FORWARD: 1, BACKWARD: 1, WEIGHT_GRAD: 1})
        spans = [result.on(place)[-1].end - result.on(place)[0].start for place in result.devices]
        assert max(spans) == 6 * microbatches
        assert max(schedule.peak_activations()) <= devices + 1e-9


def test_a_tower_that_takes_longer_goes_first():
    """Stages 0 and 1 are heads of two towers on one device; 1's tower is the longer one."""
    times = {FORWARD: [1, 1, 1, 6, 1], BACKWARD: [1, 1, 1, 6, 1]}
    feeds = [[], [], [0], [1], [2, 3]]
    schedule = dag(5, 1, [0, 0, 1, 2, 0], seconds=times, feeds=feeds)
    assert [str(task) for task in schedule.orders[0]] == ["F1.0", "F0.0", "F4.0", "B4.0", "B0.0", "B1.0"]
    assert simulate_schedule(schedule, times).makespan == 16  # the longer way and its backward


def test_several_microbatches_of_a_graph_of_stages_overlap():
    feeds = [[], [], [0, 1]]
    schedule = dag(3, 6, feeds=feeds)
    result = simulate_schedule(schedule, {FORWARD: 1, BACKWARD: 2})
    assert result.makespan <= 6 * 3 + 3
    held = dag(3, 6, feeds=feeds, memory=2)
    assert max(held.peak_activations()) <= 2


def test_a_transfer_may_differ_by_stages():
    """A slow way between stages 1 and 2 is worth starting early: stage 0 serves it first."""
    feeds, device_of = [[], [0], [0]], [0, 1, 2]
    times = {FORWARD: 1, BACKWARD: 1}
    schedule = one_f_one_b(3, 2, device_of, seconds=times, transfer={(0, 2): 5.0}, feeds=feeds)
    assert check_schedule(schedule) is schedule
    with pytest.raises(PlanError, match="takes 0 s or more"):
        one_f_one_b(3, 2, transfer={(0, 1): -1.0})


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zb_h1(2, 2, split_backward=False), "zb-h1 needs weight gradients"),
        (lambda: gpipe(2, 4, memory=3), "gpipe holds all 4 microbatches: 4 of activations on device 0"),
        (lambda: one_f_one_b(2, 4, [0, 0], activations=[1, 1], memory=1.5), "holds 2 of activations for one"),
        (lambda: one_f_one_b(2, 4, memory=[1.0]), "limit for each of 2 devices"),
        (lambda: one_f_one_b(2, 4, activations=[1.0]), "a size >= 0 for each of 2 stages"),
        (lambda: zb_1p(2, 4, weight_memory=2.0), "a part of the activations"),
        (lambda: one_f_one_b(2, 4, feeds=[[], [1]]), "stages before it"),
        (lambda: one_f_one_b(2, 4, seconds={FORWARD: 1}), "backward is missing"),
        (lambda: one_f_one_b(2, 4, seconds={FORWARD: [1], BACKWARD: 1}), "for forward of each of 2 stages"),
        (lambda: one_f_one_b(2, 4, transfer=-1.0), "takes 0 s or more"),
        (lambda: interleaved(5, 4, chunks=2), "5 stages are not 2 chunks"),
        (lambda: zb_v(3, 4), "two stages a device"),
        (lambda: schedule_named("fifo"), "there is no schedule 'fifo'; there are gpipe, 1f1b"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()


def reordered(schedule: Schedule, device: int, order: str) -> Schedule:
    by_name = {str(task): task for task in schedule.emitted}
    orders = [*schedule.orders]
    orders[device] = tuple(by_name[name] for name in order.split())
    return replace(schedule, orders=tuple(orders))


def test_a_schedule_that_never_ends_names_the_tasks_that_wait_for_each_other():
    wrong = reordered(one_f_one_b(2, 2), 0, "F0.0 B0.0 B0.1 F0.1")
    with pytest.raises(PlanError, match=r"never ends: its devices wait for each other, .*B0\.1 after"):
        check_schedule(wrong)


def test_a_schedule_lacks_no_task_and_has_none_twice_or_elsewhere():
    good = one_f_one_b(2, 2)
    with pytest.raises(PlanError, match=r"not each task once; missing: B0\.1"):
        check_schedule(reordered(good, 0, "F0.0 F0.1 B0.0"))
    with pytest.raises(PlanError, match=r"F0\.0 is there twice"):
        check_schedule(reordered(good, 0, "F0.0 F0.0 F0.1 B0.0 B0.1"))
    with pytest.raises(PlanError, match=r"F1\.0 is on device 0"):
        check_schedule(reordered(good, 0, "F0.0 F1.0 F0.1 B0.0 B0.1"))
    with pytest.raises(PlanError, match="which the pipeline has not"):
        check_schedule(replace(good, orders=((Task(7, FORWARD, 0),), good.orders[1])))
    with pytest.raises(PlanError, match=r"emitted before"):
        check_schedule(replace(good, emitted=good.emitted[::-1]))
