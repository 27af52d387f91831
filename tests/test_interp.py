"""The interpreter: ports, errors, backward, calls."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_close, assert_same_bits, coarsest, run_torch
from hypothesis import given

from daggc.errors import IRError, RunError
from daggc.interp import decomposition, evaluate_node, interpret, interpret_graph
from daggc.ir.graph import Graph, Node, Port, Program, Value
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.passes.vjp import vjp
from daggc.testing import programs, random_inputs

F64 = TensorType("f64", (2, 3))


def scaled() -> Program:
    b = REGISTRY.builder("forward")
    w, x = b.input(F64, "param", "fc.weight"), b.input(F64, "input", "0")
    b.output(b.emit("mul", w, x), "output", "0")
    return Program({"forward": b.build()})


def test_inputs_by_ref_or_by_target():
    w, x = np.full((2, 3), 2.0), np.arange(6.0).reshape(2, 3)
    for inputs in ({"param:fc.weight": w, "input:0": x}, {"fc.weight": w, "0": x}):
        results = interpret(scaled(), inputs)
        np.testing.assert_array_equal(results["output:0"], 2 * x)
        assert list(results) == ["output:0"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "needs 'param:fc.weight', a f64\\[2,3\\]"),
        ({"fc.weight": np.zeros((2, 3))}, "needs 'input:0'"),
        (
            {"fc.weight": np.zeros((2, 3)), "0": np.zeros((3, 2))},
            "'input:0' must be a f64\\[2,3\\], got float64\\[3, 2\\]",
        ),
        (
            {"fc.weight": np.zeros((2, 3), np.float32), "0": np.zeros((2, 3))},
            "'param:fc.weight' must be .* got float32",
        ),
        ({"fc.weight": np.zeros((2, 3)), "0": [1, 2]}, "'input:0' must be"),
    ],
)
def test_wrong_inputs(inputs: dict, message: str):
    with pytest.raises(RunError, match=message):
        interpret(scaled(), inputs)


def test_backward_runs_only_with_cotangents():
    program = vjp(scaled())
    inputs = {"fc.weight": np.full((2, 3), 2.0), "0": np.ones((2, 3))}
    assert set(interpret(program, inputs)) == {"output:0"}
    results = interpret(program, {**inputs, "cotangent:output:0": np.ones((2, 3))})
    assert set(results) == {"output:0", "grad:param:fc.weight", "grad:input:0"}
    np.testing.assert_array_equal(results["grad:input:0"], inputs["fc.weight"])


def test_inputs_are_left_alone():
    inputs = {"fc.weight": np.full((2, 3), 2.0), "0": np.ones((2, 3))}
    for array in inputs.values():
        array.setflags(write=False)
    interpret(scaled(), inputs)


@given(programs(dtypes=("f64", "f32", "bf16", "f16")))
def test_every_type_is_what_it_says(program: Program):
    """The interpreter checks each result against its declared type; generated programs pass it with other inputs."""
    inputs = random_inputs(program.forward, seed=3)
    for array in inputs.values():
        array.setflags(write=False)
    results = interpret(program, inputs)
    for port in program.forward.outputs:
        assert results[port.ref].dtype == port.value.type.numpy_dtype
        assert results[port.ref].shape == port.value.type.shape
    again = interpret(program, inputs)
    for ref, array in results.items():
        assert_same_bits(again[ref], array, ref)


@given(programs(dtypes=("f64",), max_ops=6))
def test_every_node_agrees_with_torch(program: Program):
    """Node by node, on what the interpreter computed: rounding cannot add up, so any op may take part."""
    values = dict(
        zip((p.value.name for p in program.forward.inputs), random_inputs(program.forward).values(), strict=True)
    )
    for node in program.forward.nodes:
        arrays = [values[value.name] for value in node.inputs]
        results = evaluate_node(node, arrays)
        values.update(zip((value.name for value in node.outputs), results, strict=True))
        graph = alone(node)
        for got, wanted in zip(run_torch(graph, arrays), results, strict=True):
            assert_close(got, wanted, f"{node.op} {node.attrs}", coarsest(graph))


def alone(node: Node) -> Graph:
    """A graph of one node; an input that it reads twice is two inputs."""
    inputs = [Value(f"in{index}", value.type) for index, value in enumerate(node.inputs)]
    return Graph(
        "alone",
        tuple(Port(value, "input", str(index)) for index, value in enumerate(inputs)),
        (Node(node.op, tuple(inputs), node.outputs, node.attrs),),
        tuple(Port(value, "output", str(index)) for index, value in enumerate(node.outputs)),
    )


def test_calls_run_their_body():
    b = REGISTRY.builder("body")
    x = b.input(F64, "input", "0")
    b.output(b.emit("neg", x), "output", "0")
    main = REGISTRY.builder("main")
    x = main.input(F64, "input", "0")
    attrs = {"callee": "body", "dtypes": ["f64"], "shapes": [(2, 3)]}
    main.output(main.emit("call", main.emit("call", x, **attrs), **attrs), "output", "0")
    program = Program({"body": b.build(), "main": main.build()})
    numbers = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(interpret(program, {"0": numbers})["output:0"], numbers)
    with pytest.raises(IRError, match="no program was given"):
        interpret_graph(program["main"], [numbers])


def test_errors_name_the_users_line():
    out = Value("y", F64)
    node = Node("torch.call", (), (out,), path="blocks.0", source="gpt.py:3")
    graph = Graph("forward", (), (node,), (Port(out, "output", "0"),))
    with pytest.raises(RunError, match=r"needs torch.*in module 'blocks.0', at gpt.py:3"):
        interpret(Program({"forward": graph}), {})


def test_decomposition_of_an_op_that_has_none():
    x = Value("x", F64)
    with pytest.raises(IRError, match="'neg' has no decomposition"):
        decomposition(Node("neg", (x,), (Value("y", F64),)))


def test_a_program_without_forward():
    with pytest.raises(IRError, match="no graph @main"):
        interpret(Program({}), {})
