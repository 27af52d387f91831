"""Outlining: convex tasks that compute what the joint graph computes."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daggc.errors import PlanError
from daggc.interp import interpret_graph
from daggc.ir.graph import Graph, Program
from daggc.ir.parser import parse
from daggc.ir.printer import print_program
from daggc.ir.types import TensorType
from daggc.ir.verifier import verify
from daggc.ops import REGISTRY
from daggc.passes.vjp import differentiate, simplify
from daggc.plan.outline import origin_of, outline, summarize_paths
from tests.plan.graphs import arrays_for, dependences, monotone_stages, random_graphs


@settings(max_examples=80, deadline=None)
@given(data=st.data(), split_backward=st.booleans())
def test_outlined_graph_computes_the_same(data: st.DataObject, split_backward: bool) -> None:
    forward = data.draw(random_graphs())
    joint = simplify(differentiate(forward))
    stages = data.draw(monotone_stages(forward))
    main, bodies = outline(joint, forward, stages, split_backward=split_backward)
    program = Program({main.name: main, **bodies})
    verify(program, REGISTRY)
    assert parse(print_program(program)) == program
    assert [(p.ref, p.value.type) for p in main.inputs] == [(p.ref, p.value.type) for p in joint.inputs]
    assert [p.ref for p in main.outputs] == [p.ref for p in joint.outputs]
    arrays = arrays_for(joint)
    for got, wanted in zip(interpret_graph(main, arrays, program), interpret_graph(joint, arrays), strict=True):
        np.testing.assert_array_equal(got, wanted)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), split_backward=st.booleans())
def test_tasks_are_convex(data: st.DataObject, split_backward: bool) -> None:
    """The quotient of the joint graph by the tasks that make its values is acyclic: so every task is convex."""
    forward = data.draw(random_graphs())
    joint = simplify(differentiate(forward))
    main, bodies = outline(joint, forward, data.draw(monotone_stages(forward)), split_backward=split_backward)
    task_of: dict[str, str] = {}
    for node in main.nodes:
        body = bodies[node.attrs["callee"]]
        task_of.update((value.name, body.name) for inner in body.nodes for value in inner.outputs)
    assert nx.is_directed_acyclic_graph(dependences(main))
    assert len(main.nodes) == len(bodies)
    for node in main.nodes:
        assert node.attrs["phase"] in ("forward", "backward", "weight_grad")
        assert node.attrs["callee"] == f"stage{node.attrs['stage']}.{node.attrs['phase']}"


def _two_layers() -> Graph:
    b = REGISTRY.builder("forward")
    square = TensorType("f64", (3, 3))
    x = b.input(square, "input", "0")
    for index in range(2):
        w = b.input(square, "param", f"{index}.w")
        with b.at(path=f"layers.{index}"):
            ones = b.emit("full", value=1, shape=(3, 3), dtype="i64")
            mask = b.emit("cast", b.emit("ge_scalar", ones, value=0), dtype="f64")
            x = b.emit("mul", b.emit("sin", b.emit("mul", x, w)), mask)
    b.output(x, "output", "0")
    return b.build()


def _by_layer(graph: Graph) -> dict[str, int]:
    return {node.outputs[0].name: int(node.path.removeprefix("layers.")) for node in graph.nodes}


def test_masks_are_made_again_in_every_task() -> None:
    forward = _two_layers()
    joint = simplify(differentiate(forward))
    _, bodies = outline(joint, forward, _by_layer(forward))
    assert list(bodies) == ["stage0.forward", "stage1.forward", "stage1.backward", "stage0.backward"]
    for name, body in bodies.items():
        assert all(port.value.type.differentiable for port in body.inputs), name
        assert "full" in [node.op for node in body.nodes], name


def test_weight_gradients_apart() -> None:
    forward = _two_layers()
    joint = simplify(differentiate(forward, ["param:0.w", "param:1.w"]))
    _, bodies = outline(joint, forward, _by_layer(forward), split_backward=True)
    # Nothing waits for the first stage's backward, so it stays in one piece.
    assert list(bodies) == [
        "stage0.forward",
        "stage1.forward",
        "stage1.backward",
        "stage1.weight_grad",
        "stage0.backward",
    ]
    assert [port.kind for port in bodies["stage1.backward"].outputs] == ["value", "value"]
    assert [port.ref for port in bodies["stage1.weight_grad"].outputs] == ["grad:param:1.w"]


def test_a_tied_parameters_gradient_is_no_cotangent() -> None:
    """The last stage's term of a shared gradient is added in the first stage; its backward does not wait for it."""
    b = REGISTRY.builder("forward")
    square = TensorType("f64", (3, 3))
    w, x = b.input(square, "param", "w"), b.input(square, "input", "0")
    first = b.emit("mul", x, w)
    middle = b.emit("sin", first)
    b.output(b.emit("mul", middle, w), "output", "0")
    forward = b.build()
    joint = simplify(differentiate(forward))
    stages = {node.outputs[0].name: index for index, node in enumerate(forward.nodes)}
    main, bodies = outline(joint, forward, stages, split_backward=True)
    assert [port.kind for port in bodies["stage2.weight_grad"].outputs] == ["value"]
    assert [port.ref for port in bodies["stage0.weight_grad"].outputs] == ["grad:param:w"]
    assert {"stage2.weight_grad"} == {
        node.attrs["callee"]
        for node in main.nodes
        if set(node.outputs) & set(next(n for n in main.nodes if n.attrs["callee"] == "stage0.weight_grad").inputs)
        and node.attrs["stage"] == 2
    }


def test_a_function_runs_though_nothing_reads_its_result() -> None:
    b = REGISTRY.builder("forward")
    x = b.input(TensorType("f64", (3, 3)), "input", "0")
    b.emit("python.call", x, target="print", dtypes=("f64",), shapes=((3, 3),))
    b.output(b.emit("sin", x), "output", "0")
    forward = b.build()
    main, bodies = outline(simplify(differentiate(forward)), forward, {"python_call": 0, "sin": 1})
    assert [node.op for node in bodies["stage0.forward"].nodes] == ["python.call"]
    assert len(main.nodes[0].outputs) == 1  # a call without results would be dead


def test_a_node_without_a_stage_is_refused() -> None:
    forward = _two_layers()
    stages = _by_layer(forward)
    del stages[origin_of(forward.nodes[-1])]
    with pytest.raises(PlanError, match=r"belongs to no stage.*layers\.1"):
        outline(simplify(differentiate(forward)), forward, stages)


def test_paths_are_summed_up() -> None:
    assert summarize_paths(["wte", "h.0.attn", "h.0.mlp.fc", "", "h.3.attn"]) == "wte .. h.3"
    assert summarize_paths(["transformer.h.0.attn.c_attn", "transformer.h.0"]) == "transformer.h.0"
    assert summarize_paths([]) == ""
