"""Rematerialization keeps the meaning bit for bit and keeps fewer bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers import assert_same_bits, differentiated
from hypothesis import given

from daggc.errors import IRError
from daggc.interp import interpret
from daggc.ir.graph import Graph, Node, Program
from daggc.ir.parser import parse
from daggc.ir.printer import print_program
from daggc.ir.types import TensorType
from daggc.ir.verifier import verify
from daggc.ops import REGISTRY
from daggc.passes.manager import pipeline, run
from daggc.passes.remat import LEVELS, kept_bytes, rematerialize
from daggc.passes.split import split
from daggc.passes.vjp import differentiate, simplify, vjp
from daggc.testing import programs, random_direction, random_inputs

WIDTH = 8
CHAIN = TensorType("f64", (4, WIDTH))


def layers(count: int) -> Graph:
    """linear, gelu, times a dropout mask: some values are cheap to make again, some are not."""
    b = REGISTRY.builder("forward")
    key = b.input(TensorType("i64", (2,)), "key", "key")
    x = b.input(CHAIN, "input", "0")
    for index in range(count):
        w = b.input(TensorType("f64", (WIDTH, WIDTH)), "param", f"{index}.weight")
        with b.at(f"layers.{index}"):
            x = b.emit("gelu", b.emit("linear", x, w), approximate="none")
            mask = b.emit("uniform", key, shape=CHAIN.shape, dtype="f64", low=0.0, high=1.0, stream=index)
            x = b.emit("mul", x, mask)
    b.output(b.emit("sum", b.emit("mul", x, x), dims=(0, 1), keepdim=False), "output", "0")
    return b.build()


def layer_of(graph: Graph) -> Callable[[Node], int]:
    layer = {node.outputs[0].name: int(node.path.partition(".")[2] or 99) for node in graph.nodes}
    return lambda node: layer.get(node.origin or node.outputs[0].name, 99)


def same_numbers(before: Program, after: Program) -> None:
    inputs = {**random_inputs(before.forward), **random_direction(before.backward.inputs_of("cotangent"), seed=1)}
    wanted, got = interpret(before, inputs), interpret(after, inputs)
    for ref, array in wanted.items():
        if not ref.startswith("residual:"):
            assert_same_bits(got[ref], array, ref)


@pytest.mark.parametrize("level", LEVELS)
@given(program=programs(differentiable=True, max_ops=10))
def test_results_and_gradients_keep_every_bit(level: str, program: Program):
    before = differentiated(program)
    after = run(before, pipeline(f"remat{{level={level}}}"))
    verify(after, REGISTRY)
    same_numbers(before, after)
    assert parse(print_program(after)) == after


@pytest.mark.parametrize("level", LEVELS)
@given(program=programs(differentiable=True, max_ops=10))
def test_no_more_bytes_are_kept(level: str, program: Program):
    forward = program.forward
    joint = simplify(differentiate(forward))
    refs = {port.ref for port in forward.outputs}
    for group_of in (lambda node: 0, lambda node: len(node.path) % 3):
        after = rematerialize(joint, refs, group_of, LEVELS[level])
        assert kept_bytes(after, forward) <= kept_bytes(joint, forward)


def test_the_cheap_level_keeps_what_products_read_and_give():
    forward = layers(3)
    joint = simplify(differentiate(forward, [port.ref for port in forward.inputs_of("param")]))
    after = rematerialize(joint, {"output:0"}, lambda node: 0, LEVELS["cheap"])
    kept = split(after, forward)[0].outputs_of("residual")
    makers = {value.name: node.op for node in after.nodes for value in node.outputs}
    assert [makers[port.value.name] for port in kept] == ["linear"] * 3
    assert kept_bytes(joint, forward) > 2.5 * kept_bytes(after, forward)


def test_the_full_level_keeps_what_enters_each_group():
    forward = layers(4)
    joint = simplify(differentiate(forward, [port.ref for port in forward.inputs_of("param")]))
    after = rematerialize(joint, {"output:0"}, layer_of(forward), LEVELS["full"])
    kept = split(after, forward)[0].outputs_of("residual")
    makers = {value.name: (node.op, node.path) for node in after.nodes for value in node.outputs}
    assert [makers[port.value.name] for port in kept] == [("mul", f"layers.{index}") for index in range(4)]
    again = [node for node in after.nodes if node.outputs[0].name.endswith("_again")]
    assert {node.op for node in again} >= {"linear", "uniform"}


def test_copies_come_just_before_their_readers():
    """So that those of one group are gone before the next group's are made."""
    forward = layers(4)
    joint = simplify(differentiate(forward, [port.ref for port in forward.inputs_of("param")]))
    after = rematerialize(joint, {"output:0"}, layer_of(forward), LEVELS["full"])
    paths = [node.path for node in after.nodes if node.outputs[0].name.endswith("_again")]
    assert paths == sorted(paths, reverse=True)


def test_a_program_without_a_backward_is_left_alone():
    program = Program({"forward": layers(1)})
    assert run(program, pipeline("remat")) == program


def test_an_unknown_level_is_refused():
    with pytest.raises(IRError, match="level is one of cheap, full"):
        run(vjp(Program({"forward": layers(1)})), pipeline("remat{level=most}"))
