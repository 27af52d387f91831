"""The roofline."""

from __future__ import annotations

import pytest

from daggc.ir.graph import Program
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.plan.cost import OPAQUE_SECONDS, graph_flops, graph_seconds, node_seconds
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
