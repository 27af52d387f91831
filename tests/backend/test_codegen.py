"""Generated code: the numbers of the interpreter, readable source, errors that name the user's line."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close, run_torch, to_torch
from hypothesis import assume, given

from daggc.backend.codegen import compile_graph, generate
from daggc.errors import RunError
from daggc.interp import interpret_graph
from daggc.ir.graph import Graph, Node, Port, Program, Value
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.testing import programs, random_inputs

F64 = TensorType("f64", (2, 3))
ROOT = Path(__file__).parents[2]


@given(programs(differentiable=True))
def test_generated_code_agrees_with_the_interpreter(program: Program):
    """Smooth programs, in which the last bit of one op does not decide on a branch of the next."""
    graph = program.forward
    arrays = list(random_inputs(graph).values())
    wanted = interpret_graph(graph, arrays)
    assume(all(np.isfinite(array).all() for array in wanted))
    for port, got, want in zip(graph.outputs, run_torch(graph, arrays), wanted, strict=True):
        assert_close(got, want, port.ref, tolerance=1e-9 if want.dtype == np.float64 else None)


@given(programs(dtypes=("f64", "f32", "bf16")))
def test_generated_code_gives_declared_types_and_leaves_inputs_alone(program: Program):
    graph = program.forward
    arrays = list(random_inputs(graph).values())
    tensors = [to_torch(array) for array in arrays]
    try:
        results = compile_graph(graph)(tensors)
    except RunError as wrong:
        assume(not isinstance(wrong.__cause__, NotImplementedError))  # torch has no bf16 avg_pool3d on a CPU
        raise
    for port, tensor in zip(graph.outputs, results, strict=True):
        assert not tensor.requires_grad
        assert tuple(tensor.shape) == port.value.type.shape
    for tensor, array in zip(tensors, arrays, strict=True):
        assert torch.equal(tensor.nan_to_num(), to_torch(array).nan_to_num()), "an input was written to"


@given(programs())
def test_source_is_python_and_stable(program: Program):
    source = generate(program.forward)
    ast.parse(source)
    assert generate(program.forward) == source
    assert compile_graph(program.forward) is compile_graph(program.forward)


def sigmoid_graph(path: str = "", name: str = "x") -> Graph:
    b = REGISTRY.builder("forward")
    x = b.input(F64, "input", name)
    with b.at(path=path, source="mlp.py:3" if path else ""):
        y = b.emit("mul", b.emit("exp", x), x)
    b.output(b.emit("neg", y), "output", "0")
    return b.build()


def test_source_reads_well():
    assert generate(sigmoid_graph("fc.1")) == (
        "def forward(device, x):\n"
        "    exp = torch.exp(x)  # in module 'fc.1', at mlp.py:3\n"
        "    mul = exp * x  # in module 'fc.1', at mlp.py:3\n"
        "    del exp, x\n"
        "    neg = torch.neg(mul)\n"
        "    del mul\n"
        "    return (neg,)\n"
    )


def test_graphs_of_one_structure_share_a_function():
    first, second = compile_graph(sigmoid_graph("fc.1")), compile_graph(sigmoid_graph("fc.2", "other"))
    assert first.function is second.function


@pytest.mark.parametrize(
    "name", ["lambda", "1x", "a.b", "größe", "torch", "device", "x$1", "x_1", "None", "kernels", "del", "x²", "float"]
)
def test_any_name_becomes_an_identifier(name: str):
    x, y = Value(name, F64), Value(f"{name}_1", F64)
    graph = Graph(
        name,
        (Port(x, "input", "0"), Port(y, "input", "1")),
        (Node("sub", (x, y), (Value("x.1", F64),)),),
        (Port(Value("x.1", F64), "output", "0"), Port(x, "output", "1")),
    )
    arrays = [np.ones((2, 3)), np.full((2, 3), 3.0)]
    difference, same = run_torch(graph, arrays)
    np.testing.assert_array_equal(difference, -2 * np.ones((2, 3)))
    np.testing.assert_array_equal(same, arrays[0])


def test_names_that_python_takes_for_one():
    """Python normalises identifiers: a ligature is the letters it is made of."""
    b = REGISTRY.builder("forward")
    values = [b.input(F64, "input", str(index), name=name) for index, name in enumerate(("ﬁ", "fi", "\uff46i"))]
    for index, value in enumerate(values):
        b.output(value, "output", str(index))
    arrays = [np.full((2, 3), float(index)) for index in range(3)]
    for got, wanted in zip(run_torch(b.build(), arrays), arrays, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_value_may_be_called_as_what_generated_code_calls():
    b = REGISTRY.builder("torch")
    x = b.input(F64, "input", "0", name="float")
    b.output(b.emit("mul_scalar", x, value=float("inf")), "output", "0")
    assert np.isinf(run_torch(b.build(), [np.ones((2, 3))])[0]).all()


def test_a_note_cannot_leave_its_comment():
    """Paths come from files: a line break in one is no line of code."""
    for evil in ("a\n    raise SystemExit  #", "a\r    raise SystemExit", "\0", "\ud800", "\x0c\u2028raise"):
        b = REGISTRY.builder("forward")
        x = b.input(F64, "input", "0")
        with b.at(path=evil, source=evil, origin=evil):
            b.output(b.emit("neg", x), "output", "0")
        source = generate(b.build())
        assert len(source.splitlines()) == 4, source
        assert run_torch(b.build(), [np.ones((2, 3))])[0].shape == (2, 3)


def test_errors_name_the_users_line():
    b = REGISTRY.builder("forward")
    x, y = b.input(F64, "input", "0"), b.input(F64, "input", "1")
    with b.at(path="blocks.7.mlp", source="mlp.py:3"):
        b.output(b.emit("mul", b.emit("exp", x), y), "output", "0")
    with pytest.raises(RunError, match=r"in generated code, line 4: mul = .*blocks.7.mlp.*mlp.py:3") as caught:
        compile_graph(b.build())([torch.ones(2, 3), torch.ones(4, 5)])
    assert "size of tensor" in str(caught.value)


_PRINT_SOURCE = """
import sys
from daggc.backend.codegen import generate
from daggc.ir.parser import parse
from daggc.passes.manager import pipeline, run
import daggc.passes.canonicalize, daggc.passes.cse, daggc.passes.dce, daggc.passes.fold, daggc.passes.vjp
from daggc.ir.printer import print_program
program = run(parse(sys.stdin.read()), pipeline("canonicalize,fold,cse,dce,vjp,canonicalize,fold,cse,dce"))
print(print_program(program))
for graph in program.graphs.values():
    print(generate(graph), graph.structure())
"""

_TEXT = """daggc 1
graph @forward(
  %w: f64[4,3] param "fc.weight",
  %b: f64[4] param "fc.bias",
  %x: f64[2,3] input "0"
) -> (
  %z output "0",
  %s output "1"
) {
  %h: f64[2,4] = linear(%x, %w, %b) !path "fc"
  %c: f64[2,4] = full() {dtype="f64", shape=[2, 4], value=0.5}
  %n: f64[2,4] = neg(%c)
  %g: f64[2,4] = gelu(%h) {approximate="none"}
  %a: f64[2,4] = add(%g, %n)
  %z: f64[2,4] = softmax(%a) {dim=1}
  %s: f64[] = sum(%z) {dims=[0, 1], keepdim=False}
}
"""


def test_the_same_source_whatever_the_hash_seed():
    outputs = {
        subprocess.run(
            [sys.executable, "-c", _PRINT_SOURCE],
            input=_TEXT,
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "271828")
    }
    assert len(outputs) == 1
    assert "def backward(" in outputs.pop()
