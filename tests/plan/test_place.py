"""Placement: every value has a device and moves only through transfers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daggc.errors import PlanError
from daggc.interp import interpret_graph
from daggc.ir.graph import Node, Program
from daggc.ir.parser import parse
from daggc.ir.printer import print_program
from daggc.ir.verifier import verify
from daggc.ops import REGISTRY
from daggc.passes.vjp import differentiate, simplify
from daggc.plan.outline import outline
from daggc.plan.place import place
from tests.plan.graphs import SQUARE, arrays_for, monotone_stages, random_graphs


def _alternating(node: Node) -> str:
    return f"cpu:{node.attrs['stage'] % 2}"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_placed_graph_computes_the_same(data: st.DataObject) -> None:
    forward = data.draw(random_graphs())
    joint = simplify(differentiate(forward))
    main, bodies = outline(joint, forward, data.draw(monotone_stages(forward)))
    if not main.nodes:
        return
    placed = place(main, _alternating)
    program = Program({placed.name: placed, **bodies})
    verify(program, REGISTRY)
    assert parse(print_program(program)) == program
    assert all(value.type.device in ("cpu:0", "cpu:1") for value in placed.values())
    assert [port.ref for port in placed.inputs] == [port.ref for port in joint.inputs]
    arrays = arrays_for(joint)
    for got, wanted in zip(interpret_graph(placed, arrays, program), interpret_graph(joint, arrays), strict=True):
        np.testing.assert_array_equal(got, wanted)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_one_transfer_for_each_value_and_destination(data: st.DataObject) -> None:
    forward = data.draw(random_graphs())
    joint = simplify(differentiate(forward))
    main, _ = outline(joint, forward, data.draw(monotone_stages(forward)))
    if not main.nodes:
        return
    transfers = [node for node in place(main, _alternating).nodes if node.op == "transfer"]
    routes = Counter((node.inputs[0].name, node.attrs["device"]) for node in transfers)
    assert not routes or max(routes.values()) == 1
    assert all(node.inputs[0].type.device != node.attrs["device"] for node in transfers)


def test_inputs_live_where_they_are_told_to() -> None:
    b = REGISTRY.builder("forward")
    x = b.input(SQUARE, "input", "0")
    b.output(b.emit("sin", x), "output", "0")
    forward = b.build()
    main, _ = outline(forward, forward, {"sin": 0})
    (call,) = place(main, lambda node: "cuda:0").nodes
    assert call.op == "call"
    placed = place(main, lambda node: "cuda:0", lambda port: "cpu:0" if port.kind == "input" else None)
    assert [node.op for node in placed.nodes] == ["transfer", "call"]
    assert [str(port.value.type) for port in placed.inputs] == ["f64[3,3]@cpu:0"]
    with pytest.raises(PlanError, match="only calls are placed, got sin"):
        place(forward, lambda node: "cpu:0")


def test_a_buffer_that_is_only_written_lives_where_its_new_value_is_made() -> None:
    b = REGISTRY.builder("forward")
    x, w = b.input(SQUARE, "input", "0"), b.input(SQUARE, "param", "w")
    b.input(SQUARE, "buffer", "norm")
    b.output(b.emit("sin", x), "output", "0")
    b.output(b.emit("cos", w), "buffer", "norm")
    forward = b.build()
    main, _ = outline(forward, forward, {"sin": 0, "cos": 1})
    placed = place(main, _alternating)
    assert {port.ref: port.value.type.device for port in placed.inputs}["buffer:norm"] == "cpu:1"
