"""The simulator against closed forms and published tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daggc.errors import PlanError
from daggc.ir.attrs import Attrs
from daggc.ir.graph import Graph, Node, Port, Program, Value
from daggc.ir.types import TensorType
from daggc.plan.device import Link, cluster_of, cpu_device
from daggc.plan.schedule import BACKWARD, FORWARD, WEIGHT_GRAD, gpipe, one_f_one_b
from daggc.plan.simulate import Job, run_jobs, simulate, simulate_schedule

TIMES = {FORWARD: 1.0, BACKWARD: 2.0}


@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b])
@given(stages=st.integers(1, 6), more=st.integers(0, 8))
def test_bubble_and_memory_of_equal_stages(schedule, stages, more):
    """The bubble is (p-1)(F+B); m or p-r microbatches are in flight."""
    microbatches = stages + more
    result = simulate_schedule(schedule(stages, microbatches), TIMES)
    assert result.makespan == pytest.approx((microbatches + stages - 1) * 3.0)
    assert result.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))
    expected = [microbatches if schedule is gpipe else stages - rank for rank in range(stages)]
    assert list(result.in_flight().values()) == expected


# Zero Bubble Pipeline Parallelism, Tables 5 and 9: stages, microbatches, F, B, W, transfer (ms), bubble rate of 1F1B.
PUBLISHED = [
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431),
    (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240),
    (8, 24, 29.718, 29.444, 19.927, 0.527, 0.2347),
    (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552),
    (16, 128, 11.325, 11.308, 8.109, 0.378, 0.1251),
    (32, 96, 10.419, 10.207, 7.715, 0.408, 0.2646),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=str)
def test_published_bubble_rates_of_1f1b(row):
    stages, microbatches, forward, backward, weight, transfer, rate = row
    times = {FORWARD: forward, BACKWARD: backward + weight}
    result = simulate_schedule(one_f_one_b(stages, microbatches), times, transfer)
    assert round(result.bubble_of_stage(0), 4) == rate


def test_split_backward_shortens_the_bubble():
    whole = simulate_schedule(one_f_one_b(4, 8), {FORWARD: 1, BACKWARD: 2})
    split = simulate_schedule(one_f_one_b(4, 8, split_backward=True), {FORWARD: 1, BACKWARD: 1, WEIGHT_GRAD: 1})
    assert split.makespan < whole.makespan


def test_links_carry_one_transfer_at_a_time_and_latency_occupies_nobody():
    jobs = [
        Job("a", "cpu:0", 1.0),
        Job("ab", "0->1", 2.0, (0,), 0.5, True),
        Job("ac", "0->1", 2.0, (0,), 0.5, True),
        Job("b", "cpu:1", 1.0, (1,)),
        Job("c", "cpu:1", 1.0, (2,)),
    ]
    result = run_jobs(jobs)
    assert [(task.start, task.end) for task in result.tasks] == [(0, 1), (1, 3), (3, 5), (3.5, 4.5), (5.5, 6.5)]
    assert result.makespan == 6.5 and result.utilisation("0->1") == pytest.approx(4 / 6.5)


def test_devices_keep_the_order_unless_told_otherwise():
    jobs = [
        Job("slow", "cpu:0", 5.0),
        Job("waits", "cpu:1", 1.0, (0,)),
        Job("free", "cpu:1", 3.0),
    ]
    assert run_jobs(jobs).makespan == 9.0
    assert run_jobs(jobs, strict=False).makespan == 6.0


def test_a_job_that_needs_a_later_one_is_refused():
    with pytest.raises(PlanError, match="comes later"):
        run_jobs([Job("a", "cpu:0", 1.0, (1,)), Job("b", "cpu:0", 1.0)])


def test_a_placed_graph():
    """Two calls with a transfer of 8 MB between them."""
    here, there = (TensorType("f64", (1_000_000,), device) for device in ("cpu:0", "cpu:1"))
    plain = here.with_(device=None)
    x, y, moved, z = Value("x", here), Value("y", here), Value("moved", there), Value("z", there)
    body = Graph("body", (Port(Value("x", plain), "value", "x"),), (), (Port(Value("x", plain), "value", "x"),))

    def call(task: str, source: Value, target: Value, **more: object) -> Node:
        attrs = {"callee": "body", "device": target.type.device, "task": task, "stage": 0, "phase": "forward", **more}
        return Node("call", (source,), (target,), Attrs(attrs))

    nodes = (call("F0.0", x, y), Node("transfer", (y,), (moved,), Attrs({"device": "cpu:1"})), call("F1.0", moved, z))
    graph = Graph("step", (Port(x, "input", "0"),), nodes, (Port(z, "output", "0"),))
    cluster = cluster_of([cpu_device(0), cpu_device(1)], Link(1e-3, 1e9))
    result = simulate(graph, Program({"step": graph, "body": body}), cluster, lambda node: 0.01)
    assert result.makespan == pytest.approx(0.01 + 8e-3 + 1e-3 + 0.01)
    assert "cpu:0->cpu:1: 1 transfers" in str(result)
    by_model = simulate(graph, Program({"step": graph, "body": body}), cluster)
    assert by_model.makespan == pytest.approx(2 * cpu_device(0).overhead + 9e-3)
