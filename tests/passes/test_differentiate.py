"""VJP of generated programs, first and second order, against finite differences along one direction."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_close, assert_same_bits, assert_unmoved, differentiated, run_torch
from hypothesis import assume, given

from daggc.errors import DifferentiationError, IRError
from daggc.interp import interpret, interpret_graph
from daggc.ir.graph import Graph, Program
from daggc.ir.parser import parse
from daggc.ir.printer import print_program
from daggc.ir.types import TensorType
from daggc.ir.verifier import verify
from daggc.ops import REGISTRY
from daggc.passes.manager import pipeline, run
from daggc.passes.split import join
from daggc.passes.vjp import differentiate, has_gradient, vjp
from daggc.testing import finite_difference, inner, programs, random_direction, random_inputs, rounded_otherwise

SMOOTH = programs(differentiable=True, max_ops=8)


def backward_of(program: Program) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Random cotangents by ref of the output, and gradients by ref of the input."""
    ports = program.backward.inputs_of("cotangent")
    cotangents = random_direction(ports, seed=1)
    results = interpret(program, {**random_inputs(program.forward), **cotangents})
    grads = {ref.removeprefix("grad:"): array for ref, array in results.items() if ref.startswith("grad:")}
    return {ref.removeprefix("cotangent:"): array for ref, array in cotangents.items()}, grads


def tame(*arrays: np.ndarray) -> bool:
    """Whether numbers are such that finite differences can tell anything."""
    return all(np.isfinite(array).all() and (not array.size or np.abs(array).max() < 1e4) for array in arrays)


@given(SMOOTH)
def test_gradients_agree_with_finite_differences(program: Program):
    after = differentiated(program)
    verify(after, REGISTRY)
    cotangents, grads = backward_of(after)
    inputs = random_inputs(program.forward)
    direction = random_direction([p for p in program.forward.inputs if p.ref in grads], seed=2)
    slope = finite_difference(program.forward, inputs, direction, cotangents)
    assume(slope.reliable and tame(*grads.values()))
    derivative = sum(inner(grads[ref], along) for ref, along in direction.items())
    assert slope.agrees(derivative), f"VJP gives {derivative}, differences give {slope}"


@given(SMOOTH)
def test_inputs_without_a_gradient_do_not_matter(program: Program):
    """A differentiable input that has no ``grad`` output reaches no output."""
    _, grads = backward_of(differentiated(program))
    floats = [port for port in program.forward.inputs_of("param", "input") if port.value.type.is_float]
    assert_unmoved(program, [port for port in floats if port.ref not in grads])


@given(SMOOTH)
def test_vjp_leaves_the_outputs_unchanged(program: Program):
    inputs = random_inputs(program.forward)
    before, after = interpret(program, inputs), interpret(differentiated(program), inputs)
    assert after.keys() == before.keys()
    for ref, array in before.items():
        assert_same_bits(after[ref], array, ref)


@given(SMOOTH)
def test_residuals_are_neither_inputs_nor_idle(program: Program):
    after = differentiated(program)
    residuals = after.forward.outputs_of("residual")
    inputs = {port.value.name for port in after.forward.inputs}
    assert not inputs & {port.value.name for port in residuals}
    read = {value.name for node in after.backward.nodes for value in node.inputs}
    read |= {port.value.name for port in after.backward.outputs}
    assert {port.value.name for port in after.backward.inputs_of("residual")} <= read
    assert [port.ref for port in residuals] == [port.ref for port in after.backward.inputs_of("residual")]
    origins = {node.origin for node in after.backward.nodes}
    primal = {value.name for node in program.forward.nodes for value in node.outputs}
    assert origins <= primal | {""}, "a cotangent node says which primal it belongs to"
    assert all(node.origin in primal for node in after.forward.nodes)


@given(SMOOTH)
def test_split_and_join_are_inverse(program: Program):
    after = differentiated(program)
    joint = join(after.forward, after.backward)
    verify(Program({"forward": joint}), REGISTRY)
    inputs = {**random_inputs(joint), **random_direction(joint.inputs_of("cotangent"), seed=1)}
    together = interpret_graph(joint, [inputs[port.ref] for port in joint.inputs])
    apart = interpret(after, inputs)
    assert [port.ref for port in joint.outputs] == list(apart)
    for port, array in zip(joint.outputs, together, strict=True):
        assert_same_bits(apart[port.ref], array, port.ref)


def _well_conditioned(graph: Graph, arrays: list[np.ndarray], wanted: list[np.ndarray]) -> bool:
    """Whether results hardly move with the last digits of every number: two ways to round may then be compared.

    The scale of a layer norm over equal numbers, for one, is a large multiple of rounding errors.
    """
    for seed in range(3):
        for want, other in zip(wanted, rounded_otherwise(graph, arrays, seed), strict=True):
            scale = max(1.0, np.abs(want).max(initial=0.0))
            if want.dtype == np.float64 and not np.abs(want - other).max(initial=0.0) <= 1e-10 * scale:
                return False
    return True


@given(SMOOTH)
def test_backward_in_torch_agrees_with_the_interpreter(program: Program):
    after = differentiated(program)
    joint = join(after.forward, after.backward)
    inputs = {**random_inputs(joint), **random_direction(joint.inputs_of("cotangent"), seed=1)}
    arrays = [inputs[port.ref] for port in joint.inputs]
    wanted = interpret_graph(joint, arrays)
    assume(tame(*(array for array in wanted if array.dtype.kind == "f")))
    assume(_well_conditioned(joint, arrays, wanted))
    for port, got, want in zip(joint.outputs, run_torch(joint, arrays), wanted, strict=True):
        assert_close(got, want, port.ref, tolerance=1e-9 if want.dtype == np.float64 else None)


@given(programs(differentiable=True, max_ops=5))
def test_second_order_agrees_with_finite_differences(program: Program):
    first = differentiated(program)
    joint = join(first.forward, first.backward)
    inputs = {**random_inputs(joint), **random_direction(joint.inputs_of("cotangent"), seed=1)}
    try:
        second = vjp(first)
    except DifferentiationError:
        assert not any(port.value.name in _floats_made(joint) for port in joint.outputs)
        return
    verify(second, REGISTRY)
    assert parse(print_program(second)) == second
    primal = {port.ref for port in joint.inputs}
    news = [port for port in second.backward.inputs_of("cotangent") if port.ref not in primal]
    numbers = random_direction(news, seed=2)
    cotangents = {port.target.rstrip("'"): numbers[port.ref] for port in news}
    results = interpret(second, {**inputs, **numbers})
    outputs = {port.ref for port in joint.outputs}
    grads = {
        ref.removeprefix("grad:").rstrip("'"): array
        for ref, array in results.items()
        if ref.startswith("grad:") and ref not in outputs
    }
    for port, array in zip(joint.outputs, interpret_graph(joint, [inputs[p.ref] for p in joint.inputs]), strict=True):
        assert_same_bits(results[port.ref], array, port.ref)
    direction = random_direction([port for port in joint.inputs if port.ref in grads], seed=3)
    slope = finite_difference(joint, inputs, direction, cotangents)
    assume(slope.reliable and tame(*grads.values()))
    derivative = sum(inner(grads[ref], along) for ref, along in direction.items())
    assert slope.agrees(derivative, tolerance=1e-4), f"VJP of VJP gives {derivative}, differences give {slope}"


def _floats_made(graph: Graph) -> set[str]:
    return {value.name for node in graph.nodes for value in node.outputs if value.type.differentiable}


@given(SMOOTH)
def test_simplifying_the_pair_keeps_gradients(program: Program):
    """Addition is not associative, but nothing here reorders it: the bits stay."""
    after = differentiated(program)
    simple = run(after, pipeline("canonicalize,fold,cse,dce"))
    inputs = {**random_inputs(after.forward), **random_direction(after.backward.inputs_of("cotangent"), seed=1)}
    wanted, got = interpret(after, inputs), interpret(simple, inputs)
    for ref, array in wanted.items():
        assert_same_bits(got[ref], array, ref)


# --- by hand ------------------------------------------------------------------------------------------

F64 = TensorType("f64", (3,))


def product() -> Program:
    b = REGISTRY.builder("forward")
    w, x = b.input(F64, "param", "w"), b.input(F64, "input", "0")
    n = b.input(TensorType("i64", (3,)), "input", "1")
    b.output(b.emit("mul", w, x), "output", "0")
    b.output(n, "output", "1")
    return Program({"forward": b.build()})


def test_wrt_chooses():
    program = product()
    for text, refs in (
        ("vjp", ["param:w", "input:0"]),
        ("vjp{wrt=params}", ["param:w"]),
        ("vjp{wrt=inputs}", ["input:0"]),
    ):
        after = run(program, pipeline(text))
        assert [port.target for port in after.backward.outputs] == refs
        assert after.provenance[-1].startswith("vjp")
    assert [port.target for port in vjp(program, ["input:0"]).backward.outputs] == ["input:0"]
    assert [port.ref for port in vjp(program).backward.inputs_of("cotangent")] == ["cotangent:output:0"]


@pytest.mark.parametrize("wrt", [["param:nothing"], ["input:1"], ["w"]])
def test_wrt_of_something_else(wrt: list[str]):
    with pytest.raises(DifferentiationError, match=wrt[0]):
        vjp(product(), wrt)


def test_has_gradient():
    """Of several inputs one is enough, and of several outputs one."""
    b = REGISTRY.builder("forward")
    x, y, z = (b.input(F64, "input", str(index)) for index in range(3))
    b.output(b.emit("gt_scalar", x, value=0.0), "output", "0")
    b.output(b.emit("exp", y), "output", "1")
    b.output(b.emit("exp", z), "buffer", "z")
    program = Program({"forward": b.build()})
    assert has_gradient(program, ["input:0", "input:1"])
    assert not has_gradient(program, ["input:0"])
    assert not has_gradient(program, ["input:2"])
    assert not has_gradient(program, [])


def test_nothing_to_differentiate():
    b = REGISTRY.builder("forward")
    x = b.input(F64, "input", "0")
    b.output(b.emit("gt_scalar", x, value=0.0), "output", "0")
    with pytest.raises(DifferentiationError, match="no output of @forward depends"):
        vjp(Program({"forward": b.build()}))
    with pytest.raises(IRError, match="wrt is one of"):
        run(product(), pipeline("vjp{wrt=everything}"))


def test_contributions_are_added_in_program_order():
    """``x`` used by several nodes, and twice by one."""
    b = REGISTRY.builder("forward")
    x = b.input(F64, "input", "0")
    square = b.emit("mul", x, x)
    b.output(b.emit("add", b.emit("mul", square, x), x), "output", "0")
    graph = b.build()
    numbers = np.array([0.5, -1.0, 2.0])
    after = vjp(Program({"forward": graph}))
    results = interpret(after, {"input:0": numbers, "cotangent:output:0": np.ones(3)})
    np.testing.assert_allclose(results["grad:input:0"], 3 * numbers**2 + 1, rtol=1e-15)
    assert sum(node.op == "add" for node in differentiate(graph).nodes) == 1 + 3


def test_third_order():
    b = REGISTRY.builder("forward")
    x = b.input(TensorType("f64", ()), "input", "0")
    b.output(b.emit("exp", b.emit("mul_scalar", x, value=2.0)), "output", "0")
    program = Program({"forward": b.build()})
    for _ in range(3):
        program = vjp(program)
        verify(program, REGISTRY)
    given = {port.ref: np.array(0.3) for port in program.forward.inputs}
    given |= {port.ref: np.array(1.0) for port in program.backward.inputs_of("cotangent")}
    assert all(np.isfinite(array).all() for array in interpret(program, given).values())


def test_an_unused_cotangent_is_zero():
    program = vjp(product())
    inputs = {"w": np.ones(3), "input:0": np.arange(3.0), "1": np.arange(3)}
    results = interpret(program, {**inputs, "cotangent:output:0": np.ones(3)})
    np.testing.assert_array_equal(results["grad:param:w"], np.arange(3.0))
    assert "grad:param:w" not in interpret(program, inputs)


def test_gradients_of_holomorphic_functions_are_conjugates_of_derivatives():
    b = REGISTRY.builder("forward")
    x = b.input(TensorType("c128", (3,)), "input", "0")
    b.output(b.emit("real", b.emit("exp", b.emit("mul", x, x))), "output", "0")
    numbers = np.array([1 + 2j, -0.5j, 0.3 - 1j])
    results = interpret(vjp(Program({"forward": b.build()})), {"input:0": numbers, "cotangent:output:0": np.ones(3)})
    assert_close(results["grad:input:0"], np.conj(2 * numbers * np.exp(numbers**2)))
