"""What devices share, what the runtime takes, and memory over time."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daggc.errors import PlanError
from daggc.ir.attrs import Attrs
from daggc.ir.graph import Graph, Node, Port, Program, Value
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.build import reshape
from daggc.plan.device import Cluster, Link, cpu_device
from daggc.plan.simulate import Buffer, Job, Runtime, memory_over_time, run_jobs, simulate
from daggc.plan.simulate.bodies import allocation_of


def test_tasks_that_want_more_cores_than_there_are_slow_down():
    """Two cores: a and b take them; with c, each goes at two thirds until a has ended, then b and c at full pace."""
    jobs = [
        Job("a", "cpu:0", 2.0, uses=(("cores", 1.0),)),
        Job("b", "cpu:1", 4.0, uses=(("cores", 1.0),)),
        Job("wait", "cpu:2", 1.0),
        Job("c", "cpu:2", 2.0, (2,), uses=(("cores", 1.0),)),
    ]
    result = run_jobs(jobs, capacity={"cores": 2.0})
    ends = [task.end for task in result.tasks]
    # from 1 to 2.5 all three run, and a does its second second; b has 2 left, c 1
    assert ends == pytest.approx([2.5, 4.5, 1.0, 3.5])
    assert [task.end for task in run_jobs(jobs, capacity={"cores": 3.0}).tasks] == pytest.approx([2.0, 4.0, 1.0, 3.0])


def test_a_job_goes_at_the_pace_of_its_scarcest_resource():
    jobs = [Job("x", "a->b", 1.0, transfer=True, uses=(("here", 2.0), ("there", 1.0)))]
    assert run_jobs(jobs, capacity={"here": 1.0, "there": 1.0}).makespan == pytest.approx(2.0)
    jobs = [Job("x", "a->b", 1.0, transfer=True, uses=(("here", 1.0), ("here", 1.0)))]
    assert run_jobs(jobs, capacity={"here": 1.0}).makespan == pytest.approx(2.0)
    with pytest.raises(PlanError, match="x uses 'here'; there are no resources"):
        run_jobs(jobs)


@given(works=st.lists(st.tuples(st.floats(0.1, 4), st.integers(1, 3)), min_size=1, max_size=8), cores=st.integers(1, 4))
def test_shared_work_is_conserved(works, cores):
    """Independent tasks: never more than the cores, never idle cores while tasks wait for them, no task too fast."""
    jobs = [Job(str(i), f"cpu:{i}", s, uses=(("cores", float(t)),)) for i, (s, t) in enumerate(works)]
    result = run_jobs(jobs, capacity={"cores": float(cores)})
    total = sum(seconds * threads for seconds, threads in works)
    assert result.makespan >= total / cores * (1 - 1e-9)
    assert result.makespan >= max(seconds for seconds, _ in works) * (1 - 1e-9)
    if all(threads == works[0][1] for _, threads in works) and len({s for s, _ in works}) == 1:
        seconds, threads = works[0]
        assert result.makespan == pytest.approx(seconds * max(1.0, len(works) * threads / cores))


def test_the_scheduler_works_off_tasks_one_after_another():
    jobs = [Job(f"a{i}", f"cpu:{i}", 1.0) for i in range(3)]
    jobs += [Job(f"b{i}", f"cpu:{i}", 1.0, (i,)) for i in range(3)]
    runtime = Runtime(submit=0.5, dispatch=0.25, message=0.125)
    result = run_jobs(jobs, runtime=runtime)
    starts = [task.start for task in result.tasks]
    assert starts == pytest.approx([3.0, 3.0, 3.0, 4.375, 4.625, 4.875])


WIDE = TensorType("f32", (1000,))


def chain(step_devices: tuple[str, ...], replaced: bool = False) -> tuple[Graph, Program]:
    """x -> tanh(tanh(x)) on each device in turn; the last is an output. The first reads a parameter."""
    b = REGISTRY.builder("body")
    x = b.input(WIDE, "value", "x")
    b.output(b.emit("sin", b.emit("tanh", b.emit("cos", x))), "value", "y")
    body = b.build()
    nodes: list[Node] = []
    home = WIDE.with_(device=step_devices[0])
    current = Value("w", home)
    port = Port(current, "param", "w")
    for index, device in enumerate(step_devices):
        if current.type.device != device:
            moved = Value(f"m{index}", WIDE.with_(device=device))
            nodes.append(Node("transfer", (current,), (moved,), Attrs({"device": device})))
            current = moved
        result = Value(f"y{index}", WIDE.with_(device=device))
        attrs = {"callee": "body", "device": device, "task": f"T{index}", "stage": index, "phase": "forward"}
        nodes.append(Node("call", (current,), (result,), Attrs(attrs)))
        current = result
    out = Port(current, "param", "w") if replaced else Port(current, "output", "0")
    graph = Graph("step", (port,), tuple(nodes), (out,))
    return graph, Program({"step": graph, "body": body})


def test_memory_of_a_chain():
    """4,000 bytes each: the parameter stays, results go when the next task has ended, one value of workspace."""
    graph, program = chain(("cpu:0", "cpu:0", "cpu:0"))
    result = simulate(graph, program, Cluster((cpu_device(0),)), lambda node: 1.0)
    memory = result.memory["cpu:0"]
    assert [memory.at(t) for t in (0.5, 1.5, 2.5, 9.0)] == [12_000, 16_000, 16_000, 8_000]
    assert memory.peak == result.peaks["cpu:0"] == 16_000


def test_what_is_sent_is_held_until_it_was_used():
    graph, program = chain(("cpu:0", "cpu:1"))
    cluster = Cluster((cpu_device(0), cpu_device(1)), Link(0.0, 4000.0))
    result = simulate(graph, program, cluster, lambda node: 1.0)
    # T0 to 1, the transfer to 2, T1 to 3
    here, there = result.memory["cpu:0"], result.memory["cpu:1"]
    assert [here.at(t) for t in (0.5, 1.5, 2.5, 3.5)] == [12_000, 8_000, 8_000, 4_000]
    assert [there.at(t) for t in (0.5, 1.5, 2.5, 3.5)] == [0, 4_000, 12_000, 4_000]


@pytest.mark.parametrize(("versions", "before", "after"), [(1, 4_000, 4_000), (2, 8_000, 8_000)])
def test_a_parameter_that_is_replaced(versions, before, after):
    graph, program = chain(("cpu:0",), replaced=True)
    one = Cluster((cpu_device(0),))
    memory = simulate(graph, program, one, lambda node: 1.0, runtime=Runtime(versions=versions)).memory["cpu:0"]
    assert memory.at(0.5) == before + 8_000 and memory.at(1.0) == after


def test_what_bodies_allocate():
    b = REGISTRY.builder("body")
    x = b.input(WIDE, "value", "x")
    y = b.emit("cos", b.emit("tanh", x))
    b.output(y, "value", "y")
    b.output(reshape(b, y, (10, 100)), "value", "view")
    b.output(reshape(b, x, (10, 100)), "value", "seen")
    found = allocation_of(b.build())
    assert found.outputs == (4000.0, 0.0, 0.0) and found.shares == (0, 0, -1) and found.workspace == 4000.0


def test_hosts_share_cores_and_loopback():
    graph, program = chain(("cpu:0", "cpu:1"))
    devices = tuple(replace(cpu_device(i), host="here", threads=2) for i in range(2))
    slow = simulate(graph, program, Cluster(devices, Link(0.0, 4000.0), cores={"here": 1}), lambda node: 1.0)
    assert [task.end for task in slow.tasks] == pytest.approx([2.0, 3.0, 5.0])
    cluster = Cluster(devices, Link(0.0, 4000.0), cores={"here": 1})
    busy = simulate(graph, program, cluster, lambda node: 1.0, runtime=Runtime(transfer_cores=1.0))
    assert [task.end for task in busy.tasks] == pytest.approx([2.0, 4.0, 6.0])
    jobs = [Job(str(i), f"{i}->x", 1.0, transfer=True, uses=(("loopback", 1.0),)) for i in range(3)]
    assert run_jobs(jobs, capacity={"loopback": 1.0}).makespan == pytest.approx(3.0)


@given(st.data())
def test_memory_is_the_sum_of_what_is_alive(data):
    """Against a count at every moment."""
    spans = data.draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9), st.integers(1, 5)), min_size=1))
    jobs = [Job(str(i), str(i), float(length)) for i, (_, length, _) in enumerate(spans)]
    tasks = run_jobs(jobs).tasks
    tasks = tuple(
        replace(task, start=float(start), end=float(start + length))
        for task, (start, length, _) in zip(tasks, spans, strict=True)
    )
    buffers = [Buffer("d", float(size), index) for index, (_, _, size) in enumerate(spans)]
    memory = memory_over_time(tasks, buffers, {"d": 3.0})["d"]
    for moment in np.arange(0.5, 30.0):
        alive = sum(size for start, length, size in spans if start <= moment < start + length)
        assert memory.at(moment) == 3 + alive
    assert memory.at(100.0) == 3


def test_a_simulation_is_plain_data_and_the_same_each_time():
    graph, program = chain(("cpu:0", "cpu:1", "cpu:0"))
    cluster = Cluster((cpu_device(0), cpu_device(1)))
    found = [json.dumps(simulate(graph, program, cluster).to_json()) for _ in range(2)]
    assert found[0] == found[1]
    data = json.loads(found[0])
    assert [row[0] for row in data["tasks"]] == ["T0", "m1", "T1", "m2", "T2"]
    assert {place["name"]: place["kind"] for place in data["places"]}["cpu:0->cpu:1"] == "link"
    assert data["memory"]["cpu:0"]["peak"] == 16_000


def test_a_hundred_thousand_jobs_take_seconds():
    jobs = [
        Job(f"j{i}", f"d{i % 1024}", 1.0 + i % 7, (i - 1024, i - 1023) if i >= 1024 else (), uses=(("net", 1.0),))
        if i % 50 == 0
        else Job(f"j{i}", f"d{i % 1024}", 1.0 + i % 7, (i - 1024, i - 1023) if i >= 1024 else ())
        for i in range(100_000)
    ]
    start = time.process_time()
    result = run_jobs(jobs, False, {"net": 50.0})
    assert len(result.places) == 1024 and 0 < result.bubble < 1
    assert time.process_time() - start < 10
