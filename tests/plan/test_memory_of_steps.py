"""Predicted memory of placed steps: never less than the values alive, and what processes take beside them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daggc.ir.attrs import Attrs
from daggc.ir.graph import Graph, Node, Port, Program, Value
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.plan.device import Cluster, Link, cpu_device, gpu_device
from daggc.plan.simulate import Runtime, Simulation, simulate
from daggc.plan.simulate.bodies import allocation_of

WIDE = TensorType("f32", (1000,))


def body(inputs: int) -> Graph:
    """A function of the sum of its inputs."""
    b = REGISTRY.builder(f"body{inputs}")
    values = [b.input(WIDE, "value", str(i)) for i in range(inputs)]
    total = values[0]
    for value in values[1:]:
        total = b.emit("add", total, value)
    b.output(b.emit("tanh", total), "value", "y")
    return b.build()


@st.composite
def placed(draw: st.DrawFn) -> tuple[Graph, Program, Cluster]:
    """A placed graph of calls on up to three devices, each reading one to three values made before it."""
    devices = [f"cpu:{i}" for i in range(draw(st.integers(1, 3)))]
    start = Value("x", WIDE.with_(device=devices[0]))
    values, nodes = [start], []
    for index in range(draw(st.integers(1, 8))):
        device = draw(st.sampled_from(devices))
        reads = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3, unique_by=lambda value: value.name))
        arguments: list[Value] = []
        for value in reads:
            if value.type.device != device:
                moved = Value(f"m{index}_{value.name}", value.type.with_(device=device))
                nodes.append(Node("transfer", (value,), (moved,), Attrs({"device": device})))
                value = moved
            arguments.append(value)
        made = Value(f"y{index}", WIDE.with_(device=device))
        attrs = Attrs({"callee": f"body{len(arguments)}", "device": device, "task": f"T{index}"})
        nodes.append(Node("call", tuple(arguments), (made,), attrs))
        values.append(made)
    graph = Graph("step", (Port(start, "input", "x"),), tuple(nodes), (Port(values[-1], "output", "0"),))
    bodies = {f"body{count}": body(count) for count in (1, 2, 3)}
    return graph, Program({"step": graph, **bodies}), Cluster(tuple(map(cpu_device, range(3))), Link(0.1, 8000.0))


def alive(graph: Graph, done: Simulation, device: str, moment: float) -> int:
    """Bytes of the values on a device that were begun to be made and are still to be read."""
    makers = {node.outputs[0].name: index for index, node in enumerate(graph.nodes)}
    readers: dict[str, list[float]] = {}
    for index, node in enumerate(graph.nodes):
        for value in node.inputs:
            readers.setdefault(value.name, []).append(done.tasks[index].end)
    kept = {port.value.name for port in graph.outputs}
    total = 0
    for value in {value.name: value for node in graph.nodes for value in (*node.inputs, *node.outputs)}.values():
        begun = done.tasks[makers[value.name]].start if value.name in makers else 0.0
        last = np.inf if value.name in kept else max(readers.get(value.name, [begun]))
        total += value.type.nbytes if value.type.device == device and begun <= moment < last else 0
    return total


@given(placed())
def test_never_less_than_the_values_alive(case: tuple[Graph, Program, Cluster]) -> None:
    graph, program, cluster = case
    done = simulate(graph, program, cluster, lambda node: 1.0)
    moments = sorted({time for task in done.tasks for time in (task.start, task.end)})
    for device, memory in done.memory.items():
        for moment in [(a + b) / 2 for a, b in pairwise(moments)]:
            assert memory.at(moment) >= alive(graph, done, device, moment)


@given(placed(), st.floats(1, 2), st.floats(0, 1e6), st.integers(0, 3))
def test_processes_take_more(case: tuple[Graph, Program, Cluster], slack: float, process: float, ahead: int) -> None:
    """Slack for each byte, something for itself, and the inputs of the steps ahead; a GPU's allocator has none."""
    graph, program, cluster = case
    plain = simulate(graph, program, cluster, lambda node: 1.0).peaks
    runtime = Runtime(slack=slack, process=process, ahead=ahead)
    peaks = simulate(graph, program, cluster, lambda node: 1.0, runtime=runtime).peaks
    for device, peak in peaks.items():
        inputs = sum(port.value.type.nbytes for port in graph.inputs if port.value.type.device == device)
        assert peak == pytest.approx((plain[device] + ahead * inputs) * slack + process, abs=0.01)


@given(placed(), st.floats(0, 0.5), st.floats(0, 1))
def test_holes_are_left_by_what_is_allocated(
    case: tuple[Graph, Program, Cluster], holes: float, most_holes: float
) -> None:
    """A body of n inputs makes n values, one after the other: its adds and its result; a transfer makes one."""
    graph, program, cluster = case
    plain = simulate(graph, program, cluster, lambda node: 1.0).peaks
    peaks = simulate(
        graph, program, cluster, lambda node: 1.0, runtime=Runtime(holes=holes, most_holes=most_holes)
    ).peaks
    for device, peak in peaks.items():
        nodes = [node for node in graph.nodes if node.attrs["device"] == device]
        allocated = sum(WIDE.nbytes * (len(node.inputs) if node.op == "call" else 1) for node in nodes)
        assert peak == pytest.approx(plain[device] + min(holes * allocated, most_holes * plain[device]), abs=0.01)


def sent(count: int, host: str) -> tuple[Graph, Program, Cluster]:
    """A line of calls: each device makes a value and sends it to the other, ``count`` times in all."""
    devices = tuple(replace(cpu_device(index), host=host) for index in range(2))
    value = start = Value("y0", WIDE.with_(device="cpu:0"))
    nodes: list[Node] = []
    for index in range(count):
        here, there = f"cpu:{index % 2}", f"cpu:{(index + 1) % 2}"
        made, moved = Value(f"m{index}", WIDE.with_(device=here)), Value(f"y{index + 1}", WIDE.with_(device=there))
        nodes.append(Node("call", (value,), (made,), Attrs({"callee": "body1", "device": here, "task": f"T{index}"})))
        nodes.append(Node("transfer", (made,), (moved,), Attrs({"device": there})))
        value = moved
    last = Value("z", value.type)
    attrs = Attrs({"callee": "body1", "device": str(value.type.device), "task": "last"})
    nodes.append(Node("call", (value,), (last,), attrs))
    graph = Graph("step", (Port(start, "input", "x"),), tuple(nodes), (Port(last, "output", "0"),))
    return graph, Program({"step": graph, "body1": body(1)}), Cluster(devices, Link(1e-6, 1e12))


@pytest.mark.parametrize("count", [2, 4, 12])
def test_a_block_of_shared_memory_is_used_again_and_stays_at_both_ends(count: int) -> None:
    graph, program, cluster = sent(count, "host")
    plain = simulate(graph, program, cluster, lambda node: 1.0)
    shared = simulate(graph, program, cluster, lambda node: 1.0, runtime=Runtime(shares=0))
    for device in ("cpu:0", "cpu:1"):  # one block each way, and what came is in no other memory
        assert plain.peaks[device] <= shared.peaks[device] <= plain.peaks[device] + 2 * WIDE.nbytes


def test_only_large_messages_within_a_host_are_shared() -> None:
    graph, program, cluster = sent(4, "host")
    plain = simulate(graph, program, cluster, lambda node: 1.0).peaks
    assert simulate(graph, program, cluster, lambda node: 1.0, runtime=Runtime(shares=WIDE.nbytes)).peaks == plain
    graph, program, cluster = sent(4, "")
    assert simulate(graph, program, cluster, lambda node: 1.0, runtime=Runtime(shares=0)).peaks == plain


def test_a_gpu_has_no_process_to_count() -> None:
    value, made = (Value(name, WIDE.with_(device="gpu:0")) for name in "xy")
    node = Node("call", (value,), (made,), Attrs({"callee": "body1", "device": "gpu:0", "task": "T"}))
    graph = Graph("step", (Port(value, "input", "x"),), (node,), (Port(made, "output", "0"),))
    program = Program({"step": graph, "body1": body(1)})
    cluster = Cluster((gpu_device(0),))
    plain = simulate(graph, program, cluster).peaks
    assert (
        plain == simulate(graph, program, cluster, runtime=Runtime(slack=1.5, holes=1.0, shares=0, process=1e9)).peaks
    )


def test_kernels_that_copy_what_they_read_need_room() -> None:
    b = REGISTRY.builder("body")
    x = b.input(TensorType("f32", (2, 3, 8, 8)), "value", "x")
    weight = b.input(TensorType("f32", (4, 3, 3, 3)), "value", "w")
    geometry = {
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "transposed": False,
        "memory_format": "contiguous",
    }
    y = b.emit("conv", x, weight, **geometry, output_padding=(0, 0), groups=1)
    b.output(y, "value", "y")
    assert allocation_of(b.build()).workspace >= x.type.nbytes + y.type.nbytes
