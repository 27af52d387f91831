"""Gradients where functions are not smooth, as autograd has them: at zeros, ties, ends of intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import to_numpy, to_torch

from daggc.backend.codegen import compile_graph
from daggc.errors import DifferentiationError
from daggc.interp import decomposition, interpret, interpret_graph
from daggc.ir.attrs import Dense
from daggc.ir.graph import Program
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.opdef import NOT_DIFFERENTIABLE
from daggc.passes.vjp import vjp
from daggc.testing import OpSample, op_samples, random_direction, random_inputs, sample_graph, with_dtype

NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.5, -2.5, 3.0, 0.3, 6.0, -3.0, 20.0, -20.0)
COMPLEX = (0j, 1 + 0j, 1j, -1 + 0j, 0.5 - 2j, -1j, 2 + 2j)
# Op -> why its gradient differs from torch's at some of these numbers.
OTHERWISE: dict[str, str] = {
    "softplus_backward": "at its threshold torch's second derivative is 0, and here that of softplus, 2e-9",
}
# Ops that may take any of equal numbers.
ANY_OF_EQUALS = ("kthvalue", "topk")


def is_elementwise(sample: OpSample, dtype: str) -> bool:
    inputs = sample.sample.inputs
    return (
        sample.op.vjp is not NOT_DIFFERENTIABLE
        and any(arg.type.dtype == dtype for arg in inputs)
        and len({arg.type.shape for arg in inputs}) == 1
        and sample.op.cost(sample_graph(sample).nodes[0]).op_class == "elementwise"
        and not any(arg.domain in ("unit", "key") for arg in inputs)
    )


REAL = [sample for sample in op_samples() if is_elementwise(sample, "f64")]
SAMPLES = [sample for sample in REAL if sample.op.name not in OTHERWISE]
AS_COMPLEX = [c for s in op_samples() if (c := with_dtype(s, "c128")) is not None and is_elementwise(c, "c128")]


def check(sample: OpSample, numbers: tuple) -> None:
    """Compare gradients at all pairs of numbers, an array of them at a time."""
    graph = sample_graph(sample)
    try:
        program = vjp(Program({"forward": graph}))
    except DifferentiationError:
        return
    inputs = random_inputs(graph)
    shape = sample.sample.inputs[0].type.shape
    size = math.prod(shape)
    pairs = np.array([(x, y) for x in numbers for y in numbers]).T
    wrt = [port.target for port in program.backward.outputs]
    cotangents = {
        ref: np.abs(array) for ref, array in random_direction(program.backward.inputs_of("cotangent"), seed=1).items()
    }
    for start in range(0, pairs.shape[1], size):
        parts = [np.resize(row[start : start + size], shape) for row in pairs]
        moved = {
            ref: parts[index % 2].astype(array.dtype) if array.dtype.kind in "fc" else array
            for index, (ref, array) in enumerate(inputs.items())
        }
        found = by_autograd(sample, moved, cotangents, wrt)
        if found is None:
            pytest.skip("torch has no derivative of the kernel this lowers to")
        results = interpret(program, {**moved, **cotangents})
        for ref, wanted in found.items():
            with np.errstate(all="ignore"):
                np.testing.assert_allclose(results[f"grad:{ref}"], wanted, rtol=1e-8, atol=1e-12, err_msg=f"{moved}")


def check_ties(sample: OpSample) -> None:
    """Compare gradients where the numbers of an argument are equal in twos and threes."""
    graph = sample_graph(sample)
    program = vjp(Program({"forward": graph}))
    inputs = {
        ref: np.resize([1.0, 0.5, 1.0, 0.5, 0.5, -1.0, 1.0], array.shape) if arg.domain == "distinct" else array
        for (ref, array), arg in zip(random_inputs(graph).items(), sample.sample.inputs, strict=True)
    }
    cotangents = random_direction(program.backward.inputs_of("cotangent"), seed=1)
    found = by_autograd(sample, inputs, cotangents, [port.target for port in program.backward.outputs])
    if found is None:
        pytest.skip("torch has no derivative of the kernel this lowers to")
    results = interpret(program, {**inputs, **cotangents})
    for ref, wanted in found.items():
        np.testing.assert_allclose(results[f"grad:{ref}"], wanted, rtol=1e-8, atol=1e-12, err_msg=f"{inputs}")


def by_autograd(sample: OpSample, inputs: dict, cotangents: dict, wrt: list[str]) -> dict[str, np.ndarray] | None:
    graph = sample_graph(sample)
    leaves = {ref: to_torch(array).requires_grad_(ref in wrt) for ref, array in inputs.items()}
    try:
        outputs = compile_graph(graph).function(torch.device("cpu"), *leaves.values())
        used = [
            (output, to_torch(cotangents[f"cotangent:{port.ref}"]))
            for port, output in zip(graph.outputs, outputs, strict=True)
            if f"cotangent:{port.ref}" in cotangents and output.requires_grad
        ]
        if len(used) < len(cotangents):
            return None
        given, cts = zip(*used, strict=True)
        grads = torch.autograd.grad(given, [leaves[ref] for ref in wrt], cts, allow_unused=True)
    except (RuntimeError, NotImplementedError):
        return None
    return {ref: to_numpy(grad) for ref, grad in zip(wrt, grads, strict=True) if grad is not None}


@pytest.mark.parametrize("op_sample", [sample for sample in REAL if sample.op.decompose is not None], ids=str)
def test_decompositions_at_kinks(op_sample: OpSample):
    """A decomposition takes the side of a kink that the op takes."""
    graph = sample_graph(op_sample)
    parts = decomposition(graph.nodes[0])
    shape = op_sample.sample.inputs[0].type.shape
    pairs = np.array([(x, y) for x in NUMBERS for y in NUMBERS]).T
    for start in range(0, pairs.shape[1], math.prod(shape)):
        numbers = [np.resize(row[start : start + math.prod(shape)], shape) for row in pairs]
        arrays = [
            numbers[index % 2] if array.dtype.kind == "f" else array
            for index, array in enumerate(random_inputs(graph).values())
        ]
        for got, wanted in zip(interpret_graph(parts, arrays), interpret_graph(graph, arrays), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-14, err_msg=f"{arrays}")


@pytest.mark.parametrize("op", ["angle", "cdist"])
def test_second_derivatives_at_zero_are_zero(op: str):
    """Where the first derivative is set to zero: at 0, or of the distance of a point to itself."""
    b = REGISTRY.builder("forward")
    if op == "angle":
        y, arrays = b.emit(op, b.input(TensorType("c128", (3,)), "input", "0")), [np.zeros(3, np.complex128)]
    else:
        points = [b.input(TensorType("f64", (2, 3)), "input", str(index)) for index in range(2)]
        y, arrays = b.emit(op, *points, p=2.0), [np.ones((2, 3))] * 2
    b.output(y, "output", "0")
    first = vjp(Program({"forward": b.build()}))
    inputs = {f"input:{index}": array for index, array in enumerate(arrays)}
    second = vjp(first)
    ports = [port for graph in (first, second) for port in graph.backward.inputs_of("cotangent")]
    cotangents = random_direction(list({port.ref: port for port in ports}.values()), seed=1)
    primal = {port.ref for port in first.backward.outputs}
    found = interpret(second, {**inputs, **cotangents})
    grads = {ref: array for ref, array in found.items() if ref.startswith("grad:") and ref not in primal}
    assert grads
    for ref, array in grads.items():
        np.testing.assert_array_equal(array, np.zeros_like(array), err_msg=ref)


@pytest.mark.parametrize("op_sample", SAMPLES, ids=str)
def test_gradients_at_kinks(op_sample: OpSample):
    check(op_sample, NUMBERS)


@pytest.mark.parametrize("op_sample", AS_COMPLEX, ids=str)
def test_gradients_at_complex_kinks(op_sample: OpSample):
    check(op_sample, COMPLEX)


@pytest.mark.parametrize(
    "op_sample",
    [
        s
        for s in op_samples()
        if s.op.vjp is not NOT_DIFFERENTIABLE
        and s.op.name not in ANY_OF_EQUALS
        and any(arg.domain == "distinct" and arg.type.dtype == "f64" for arg in s.sample.inputs)
    ],
    ids=str,
)
def test_gradients_at_ties(op_sample: OpSample):
    check_ties(op_sample)


@pytest.mark.parametrize("op_sample", [s for s in op_samples() if s.op.name == "logit"], ids=str)
def test_gradients_at_ends_of_the_unit_interval(op_sample: OpSample):
    eps = op_sample.sample.attrs.get("eps")
    ends = eps if isinstance(eps, float) else 0.25
    check(op_sample, (0.0, 1.0, ends, 1 - ends, 0.5, -0.5, 1.5))


@pytest.mark.parametrize("op", ["embedding_backward"])
def test_rows_of_padding_have_no_second_derivative(op: str):
    b = REGISTRY.builder("forward")
    index = b.emit("constant", value=Dense.of(np.array([0, 2, 0, 1])))
    ct = b.input(TensorType("f64", (4, 2)), "input", "0")
    b.output(b.emit(op, ct, index, num_weights=3, padding_idx=0), "output", "0")
    program = vjp(Program({"forward": b.build()}))
    results = interpret(program, {"input:0": np.ones((4, 2)), "cotangent:output:0": np.ones((3, 2))})
    np.testing.assert_array_equal(results["grad:input:0"][:, 0], [0, 1, 0, 1])
