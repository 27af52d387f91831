"""The roofline."""

from __future__ import annotations

from dataclasses import replace

import pytest

from daggc.ir.graph import Program
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.plan.cost import OPAQUE_SECONDS, Costs, graph_flops, graph_seconds, node_key, node_seconds
from daggc.plan.curves import Curve
from daggc.plan.device import Device, cpu_device
from daggc.plan.outline import outline

DEVICE = Device("d", "cpu", {"elementwise": 1e9}, bandwidth=1e9, memory=1e9, overhead=0.5, launch=1e-3)


def _adds(count: int, size: int):
    b = REGISTRY.builder("forward")
    x = b.input(TensorType("f64", (size,)), "input", "0")
    for _ in range(count):
        x = b.emit("add", x, x)
    b.output(x, "output", "0")
    return b.build()


def test_roofline() -> None:
    small, large = _adds(1, 1000).nodes[0], _adds(1, 10**6).nodes[0]
    assert node_seconds(small, DEVICE) == pytest.approx(1e-3 + 1e-6)
    assert node_seconds(large, DEVICE) == pytest.approx(24e6 / 1e9)
    assert graph_seconds(_adds(3, 1000), DEVICE) == pytest.approx(0.5 + 3 * (1e-3 + 1e-6))


def test_calls_count_their_bodies() -> None:
    graph = _adds(4, 10)
    main, bodies = outline(graph, graph, {node.outputs[0].name: index // 2 for index, node in enumerate(graph.nodes)})
    assert graph_flops(main, Program(bodies)) == graph_flops(graph) == 40


def test_opaque_functions_are_equal_chunks() -> None:
    b = REGISTRY.builder("forward")
    x = b.input(TensorType("f64", (2,)), "input", "0")
    b.emit("python.call", x, target="f", dtypes=("f64",), shapes=((2,),))
    b.emit("python.call", x, target="f", dtypes=("f64",), shapes=((200, 300),))
    first, second = b.build().nodes
    assert node_seconds(first, cpu_device()) == node_seconds(second, cpu_device()) == OPAQUE_SECONDS


def test_measured_times_come_before_curves_and_curves_before_the_roofline() -> None:
    graph = _adds(2, 1000)
    node = graph.nodes[0]
    curved = replace(DEVICE, curves={"add": Curve(((1000, 24000, 3e-3),))})
    assert node_seconds(node, curved) == pytest.approx(3e-3)
    known = replace(curved, profile={node_key(node): 5e-3})
    assert node_seconds(node, known) == 5e-3
    assert graph_seconds(graph, known) == pytest.approx(0.5 + 1e-2)
    assert node_seconds(_adds(1, 1001).nodes[0], known) == pytest.approx(3e-3, rel=0.01)
    shared = replace(known, slowdown={"elementwise": 2.0, "gemm": 9.0})
    assert node_seconds(node, shared) == 1e-2


def test_a_key_tells_what_a_node_does_and_nothing_else() -> None:
    first, second = _adds(2, 1000).nodes
    assert node_key(first) == node_key(second) == "add(f64[1000], f64[1000]) {}"
    assert node_key(_adds(1, 999).nodes[0]) != node_key(first)
    b = REGISTRY.builder("forward")
    x = b.input(TensorType("f32", (2,)), "input", "0")
    for length in (3, 300):
        b.emit("python.call", x, target="f" * length, dtypes=("f32",), shapes=((2,),))
    short, long = b.build().nodes
    assert "fff" in node_key(short)
    assert len(node_key(long)) < 60


def test_thin_outer_products_are_of_a_kind_of_their_own() -> None:
    b = REGISTRY.builder("forward")
    for inner in (8, 32):
        x, y = (b.input(TensorType("f32", shape), "input", str(shape)) for shape in ((64, inner), (inner, 64)))
        b.emit("matmul", x, y)
    costs = Costs.of(b.build().nodes)
    assert [costs.names[kind].op for kind in costs.kinds] == ["matmul outer", "matmul"]
