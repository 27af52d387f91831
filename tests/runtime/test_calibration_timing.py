"""Clocks beside every node, the programs they run in, and what becomes of their times."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import nn

import daggc
from daggc.backend.codegen import compile_graph
from daggc.ir.graph import Graph, Port, Program, Value
from daggc.ir.types import DTYPES, TensorType
from daggc.ops import REGISTRY
from daggc.passes.vjp import differentiate, simplify
from daggc.plan.cost import Costs, node_key
from daggc.plan.device import cpu_device
from daggc.runtime.calibration.programs import pieces
from daggc.runtime.calibration.rows import bandwidth_of, curves_of, profile_of, rates_of
from daggc.runtime.calibration.suite import PART, perceptron, suite, transformer
from daggc.runtime.calibration.timing import random_input, time_graphs, with_clocks


def _inputs(graph: Graph) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [random_input(port, generator) for port in graph.inputs]


def test_clocks_change_nothing_and_there_is_one_for_each_node() -> None:
    graph = transformer(1, 8, 32, 16)
    marks: list[list[float]] = []
    clocked = with_clocks(graph, time.thread_time, marks.append)
    with torch.no_grad():
        results = clocked(torch.device("cpu"), *_inputs(graph))
    for got, wanted in zip(results, compile_graph(graph)(_inputs(graph)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    (own,) = marks
    assert len(own) == len(graph.nodes) + 1
    assert own == sorted(own)


def test_times_of_graphs() -> None:
    graphs = [perceptron(4, (8, 16)), perceptron(256, (256, 512))]
    small, large = time_graphs(graphs, 0.0)
    assert len(small.seconds) == len(graphs[0].nodes)
    assert small.rounds == large.rounds == 4
    assert min(small.seconds) > 0
    assert sum(large.seconds) > sum(small.seconds)


def test_a_graph_that_does_not_run_on_random_inputs_leaves_the_others() -> None:
    b = REGISTRY.builder("bad")
    weight, ids = b.input(TensorType("f32", (1, 3)), "param", "w"), b.input(TensorType("i64", (50,)), "input", "0")
    b.output(REGISTRY.importers["embedding.default"](b, weight, ids), "output", "0")
    bad, good = time_graphs([b.build(), perceptron(4, (8, 16))], 0.0)
    assert bad.seconds == ()
    assert "IndexError" in bad.error
    assert good.seconds


def test_there_are_inputs_of_every_dtype() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for shape in ((), (3, 4)):
            made = random_input(Port(Value("x", TensorType(dtype, shape)), "param", "x"), generator)
            assert tuple(made.shape) == shape
            assert str(made.dtype) == f"torch.{made.dtype}".split(".", 1)[1]


def test_the_suite_has_the_ops_of_ordinary_models() -> None:
    graphs = suite("cpu")
    ops = {node.op for graph in graphs for node in graph.nodes}
    assert {
        "matmul", "linear", "conv", "conv_input_grad", "conv_weight_grad", "attention", "attention_backward", "softmax",
        "layer_norm_backward", "embedding_backward", "batch_norm", "recurrent_layer_backward", "adamw_update",
        "sgd_update", "bernoulli", "max_pool_backward", "gelu_backward",
    } <= ops  # fmt: skip
    classes = {kind.op_class for graph in graphs for kind in Costs.of(graph.nodes).names}
    assert {"gemm", "conv", "attention", "reduction", "elementwise", "view", "copy"} <= classes
    assert len(suite("cuda")) > len(graphs)
    assert max(PART) < len(graphs)
    assert not [graph.name for graph in (graphs[place] for place in PART) if not graph.nodes]


def test_rows_give_curves_rates_and_a_profile() -> None:
    graph = perceptron(4, (8, 16, 8))
    seconds = [1e-5 * (index + 1) for index in range(len(graph.nodes))]
    curves = curves_of([(graph, seconds)])
    assert {"matmul", "linear", "elementwise", "gemm", "view"} <= set(curves)
    rates = rates_of(curves, cpu_device().flops)
    assert set(rates) <= set(cpu_device().flops)
    assert min(rates.values()) > 0 < bandwidth_of(curves)
    profile = profile_of([(graph, seconds), (graph, [3 * each for each in seconds])])
    unique = [key for key in Costs.of(graph.nodes).keys if Costs.of(graph.nodes).keys.count(key) == 1]
    index = Costs.of(graph.nodes).keys.index(unique[0])
    assert profile[unique[0]] == pytest.approx(2 * seconds[index])


def test_an_op_measured_on_small_data_only_follows_its_class_on_large() -> None:
    b = REGISTRY.builder("forward")
    values = [b.input(TensorType("f32", (size,)), "input", str(size)) for size in (4, 1 << 20)]
    for value in (*values, values[1]):
        b.emit("exp", value)
    b.emit("tanh", values[0])
    graph = b.build()
    curve = curves_of([(graph, [1e-6, 1e-3, 1e-3, 2e-6])])["tanh"]
    (large,) = curve.seconds(np.array([10.0 * (1 << 20)]), np.array([8.0 * (1 << 20)]))
    assert 5e-4 < large < 2e-3


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.Tanh())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).sum()


def test_pieces_have_every_distinct_node_once() -> None:
    program = daggc.trace(Small(), (torch.ones(4, 8),))
    joint = simplify(differentiate(program.forward))
    keys = {node_key(node) for node in joint.nodes}
    whole = pieces(program, float("inf"))
    assert len(whole) == 1
    assert {node_key(node) for node in whole[0].nodes} == keys
    parts = pieces(program, 300.0)
    assert len(parts) > 1
    assert {node_key(node) for part in parts for node in part.nodes} == keys
    assert len({part.structure() for part in parts}) == len(parts)
    assert all(own.seconds for own in time_graphs(parts, 0.0))


def test_python_functions_run_only_when_asked_for() -> None:
    b = REGISTRY.builder("forward")
    x = b.input(TensorType("f32", (2,)), "input", "0")
    y = b.emit("python.call", b.emit("exp", x), target="f", dtypes=("f32",), shapes=((2,),))
    b.output(b.emit("tanh", y), "output", "0")
    graphs = {"forward": b.build(), "other": b.build()}  # not differentiated
    for opaque in (False, True):
        ops = {node.op for piece in pieces(Program(graphs), 1e9, opaque) for node in piece.nodes}
        assert ops == {"exp", "tanh", *(["python.call"] if opaque else [])}
