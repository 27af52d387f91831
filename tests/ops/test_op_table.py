"""Every op against itself: type rule, NumPy meaning, torch lowering, decomposition and derivatives agree.

One test per (op, sample), so that an op arrives tested with its samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from helpers import assert_close, assert_same_bits, run_torch, to_numpy, to_torch

from daggc.backend.codegen import compile_graph
from daggc.errors import TypeRuleError
from daggc.interp import decomposition, interpret, interpret_graph
from daggc.ir.attrs import Attrs
from daggc.ir.graph import Graph, Program
from daggc.ir.types import TensorType
from daggc.ir.verifier import verify, verify_graph
from daggc.ops import REGISTRY
from daggc.ops.opdef import BY_DECOMPOSITION, NOT_DIFFERENTIABLE
from daggc.passes.split import join
from daggc.passes.vjp import vjp
from daggc.testing import (
    OpSample,
    finite_difference,
    inner,
    op_samples,
    random_direction,
    random_inputs,
    sample_graph,
    with_dtype,
)

SAMPLES = list(op_samples())

# Ops without samples, and why they have none.
WITHOUT_SAMPLES = {
    "call": "needs a program with the body; tests/passes and the planner's tests run it",
    "transfer": "only in placed graphs",
    "python.call": "runs a Python function of the user's",
    "torch.call": "has no meaning without torch; its own tests compare it with eager torch",
}
# Differentiable ops whose VJP is on purpose not the derivative of their value.
NOT_THE_DERIVATIVE = {"stop_gradient": "its VJP gives nothing, its value depends on its input"}



def is_exact(op_sample: OpSample) -> bool:
    """Whether derivatives can be taken, of numbers not rounded to fewer bits on the way."""
    node = sample_graph(op_sample).nodes[0]
    floats = [value.type.dtype for value in (*node.inputs, *node.outputs) if value.type.differentiable]
    return any(value.type.differentiable for value in node.inputs) and set(floats) <= {"f64", "c128"}


every_sample = pytest.mark.parametrize("op_sample", SAMPLES, ids=str)
differentiable_sample = pytest.mark.parametrize(
    "op_sample",
    [
        s
        for s in SAMPLES
        if s.op.vjp is not NOT_DIFFERENTIABLE
        and s.op.name not in NOT_THE_DERIVATIVE
        and is_exact(s)
    ],
    ids=str,
)


def arrays_of(graph: Graph, seed: int = 0) -> list[np.ndarray]:
    return list(random_inputs(graph, seed).values())


def test_ops_without_samples_are_known():
    assert {name for name, op in REGISTRY.items() if not op.samples} == set(WITHOUT_SAMPLES)


@every_sample
def test_type_rule_agrees_with_evaluate(op_sample: OpSample):
    graph = sample_graph(op_sample)
    verify_graph(graph, REGISTRY)
    for port, array in zip(graph.outputs, interpret_graph(graph, arrays_of(graph)), strict=True):
        assert array.dtype == port.value.type.numpy_dtype
        assert array.shape == port.value.type.shape


@every_sample
@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16", "f16"])
def test_lowering_agrees_with_evaluate(op_sample: OpSample, dtype: str):
    typed = with_dtype(op_sample, dtype)
    if typed is None:
        return  # the type rule does not take this dtype
    graph = sample_graph(typed)
    if dtype != "f64" and graph == sample_graph(op_sample):
        return  # the sample has no f64 that another dtype could replace
    arrays = arrays_of(graph)
    for got, wanted in zip(run_torch(graph, arrays), interpret_graph(graph, arrays), strict=True):
        assert_close(got, wanted)


@every_sample
def test_cost_and_axes(op_sample: OpSample):
    node = sample_graph(op_sample).nodes[0]
    cost = op_sample.op.cost(node)
    assert cost.flops >= 0 and cost.bytes >= 0
    assert cost.op_class in ("gemm", "conv", "attention", "reduction", "elementwise", "view", "opaque")
    axes = op_sample.op.axes(node)
    if axes is None:
        return
    assert [len(labels) for labels in axes.inputs] == [value.type.rank for value in node.inputs]
    assert [len(labels) for labels in axes.outputs] == [value.type.rank for value in node.outputs]
    assert set(axes.reduced.values()) <= {"sum", "mean"}


def cut(array: np.ndarray, labels: Sequence[str | None], label: str, part: slice) -> np.ndarray:
    return array[tuple(part if own == label else slice(None) for own in labels)]


@every_sample
def test_cutting_along_axes_commutes_with_the_op(op_sample: OpSample):
    """An axis label says that a slice of the inputs gives that slice of the outputs: this is held to it.

    Only for samples whose attributes do not name the cut size (a ``reshape`` to a shape is another op then).
    """
    graph = sample_graph(op_sample)
    node = graph.nodes[0]
    axes = op_sample.op.axes(node)
    if axes is None:
        return
    arrays = arrays_of(graph)
    whole = interpret_graph(graph, arrays)
    for label in sorted({label for labels in axes.inputs for label in labels if label is not None}):
        sizes = {
            size
            for value, labels in zip(node.inputs, axes.inputs, strict=True)
            for size, own in zip(value.type.shape, labels, strict=True)
            if own == label
        }
        assert len(sizes) == 1, f"axis {label!r} has sizes {sizes}"
        if sizes == {1} or label in axes.reduced or not any(label in labels for labels in axes.outputs):
            continue
        part = slice(0, 1)
        parts = [cut(array, labels, label, part) for array, labels in zip(arrays, axes.inputs, strict=True)]
        types = [
            TensorType(value.type.dtype, array.shape) for value, array in zip(node.inputs, parts, strict=True)
        ]
        wanted = [cut(array, labels, label, part) for array, labels in zip(whole, axes.outputs, strict=True)]
        attrs = _cut_attrs(node.attrs, [v.type.shape for v in node.outputs], [w.shape for w in wanted])
        b = REGISTRY.builder("part")
        inputs = [b.input(type_, "input", str(index)) for index, type_ in enumerate(types)]
        for index, value in enumerate(b.emit_many(node.op, *inputs, **attrs)):
            b.output(value, "output", str(index))
        for got, want in zip(interpret_graph(b.build(), parts), wanted, strict=True):
            assert_close(got, want, f"cut along {label!r}")


def _cut_attrs(attrs: Attrs, old: Sequence[tuple[int, ...]], new: Sequence[tuple[int, ...]]) -> dict[str, object]:
    """Attributes that spell out an output's shape, with the shape it has after the cut."""
    shapes = dict(zip(old, new, strict=True))
    return {name: shapes.get(value, value) if name == "shape" else value for name, value in attrs.items()}


@pytest.mark.parametrize("op_sample", [s for s in SAMPLES if s.op.decompose is not None], ids=str)
def test_decomposition_agrees(op_sample: OpSample):
    graph = sample_graph(op_sample)
    parts = decomposition(graph.nodes[0])
    verify_graph(parts, REGISTRY)
    assert all(node.op != op_sample.op.name for node in parts.nodes), "an op does not decompose into itself"
    arrays = arrays_of(graph)
    wanted = run_torch(graph, arrays) if op_sample.op.evaluate is BY_DECOMPOSITION else interpret_graph(graph, arrays)
    for got, want in zip(interpret_graph(parts, arrays), wanted, strict=True):
        assert_close(got, want)


# --- derivatives --------------------------------------------------------------------------------------


def differentiated(op_sample: OpSample) -> Program:
    program = vjp(Program({"forward": sample_graph(op_sample)}))
    verify(program, REGISTRY)
    return program


def gradients(program: Program, inputs: dict[str, np.ndarray], cotangents: dict[str, np.ndarray]):
    """Gradients by ref of the input, from the interpreter."""
    given = {f"cotangent:{ref}": array for ref, array in cotangents.items()}
    results = interpret(program, {**inputs, **given})
    return {ref.removeprefix("grad:"): array for ref, array in results.items() if ref.startswith("grad:")}


def float_outputs(program: Program) -> list[str]:
    """Refs of the outputs that have a cotangent."""
    return [port.target for port in program.backward.inputs_of("cotangent")]


@differentiable_sample
def test_vjp_agrees_with_finite_differences(op_sample: OpSample):
    program = differentiated(op_sample)
    graph = sample_graph(op_sample)
    inputs = random_inputs(graph)
    wanted = set(float_outputs(program))
    cotangents = random_direction([port for port in graph.outputs if port.ref in wanted], seed=1)
    grads = gradients(program, inputs, cotangents)
    assert grads, "a differentiable op gives a gradient to some input"
    direction = random_direction([port for port in graph.inputs if port.ref in grads], seed=2)
    slope = finite_difference(graph, inputs, direction, cotangents)
    assert slope.reliable, f"the sample is not smooth here: {slope}"
    derivative = sum(inner(grads[ref], along) for ref, along in direction.items())
    assert slope.agrees(derivative), f"VJP gives {derivative}, differences give {slope}"


def torch_gradients(graph: Graph, inputs: list[torch.Tensor], cotangents: dict[str, np.ndarray], create: bool = False):
    """Gradients of the generated forward by torch's autograd, None where torch has none."""
    function = compile_graph(graph).function
    outputs = function(torch.device("cpu"), *inputs)
    pairs = [
        (output, to_torch(cotangents[port.ref]))
        for port, output in zip(graph.outputs, outputs, strict=True)
        if port.ref in cotangents and output.requires_grad
    ]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = torch.autograd.grad(
        [output for output, _ in pairs], wanted, [ct for _, ct in pairs], allow_unused=True, create_graph=create
    )
    return [
        found[wanted_index[id(tensor)]] if tensor.requires_grad else None
        for wanted_index in [{id(tensor): index for index, tensor in enumerate(wanted)}]
        for tensor in inputs
    ]


@differentiable_sample
def test_vjp_agrees_with_autograd(op_sample: OpSample):
    program = differentiated(op_sample)
    graph = sample_graph(op_sample)
    inputs = random_inputs(graph)
    wanted = set(float_outputs(program))
    cotangents = random_direction([port for port in graph.outputs if port.ref in wanted], seed=1)
    grads = gradients(program, inputs, cotangents)
    leaves = [to_torch(array).requires_grad_(array.dtype.kind in "fc") for array in inputs.values()]
    for port, found in zip(graph.inputs, torch_gradients(graph, leaves, cotangents), strict=True):
        got = grads.get(port.ref)
        if found is None:
            assert got is None or not got.any(), f"{port.ref}: torch has no gradient, the VJP rule gives {got}"
        elif got is None:
            assert not found.any(), f"{port.ref}: the VJP rule gives nothing, torch gives {found}"
        else:
            assert_close(got, to_numpy(found), port.ref)


@differentiable_sample
def test_generated_backward_agrees_with_the_interpreter(op_sample: OpSample):
    """The nodes that VJP rules emit run in torch as in NumPy."""
    graph = join(*_forward_and_backward(differentiated(op_sample)))
    inputs = {**random_inputs(graph), **random_direction(graph.inputs_of("cotangent"), seed=1)}
    arrays = [inputs[port.ref] for port in graph.inputs]
    for got, wanted in zip(run_torch(graph, arrays), interpret_graph(graph, arrays), strict=True):
        assert_close(got, wanted)


def _forward_and_backward(program: Program) -> tuple[Graph, Graph]:
    return program.forward, program.backward


@differentiable_sample
def test_second_order_agrees_with_finite_differences(op_sample: OpSample):
    first = differentiated(op_sample)
    joint = join(first.forward, first.backward)
    inputs = {**random_inputs(joint), **random_direction(joint.inputs_of("cotangent"), seed=1)}
    second = vjp(first)
    verify(second, REGISTRY)
    primal = {port.ref for port in joint.inputs}
    new = {port.ref: port for port in second.backward.inputs_of("cotangent") if port.ref not in primal}
    numbers = random_direction(list(new.values()), seed=2)
    by_output = {new[ref].target.rstrip("'"): array for ref, array in numbers.items()}
    results = interpret(second, {**inputs, **numbers})
    grads = {
        ref.removeprefix("grad:").rstrip("'"): array
        for ref, array in results.items()
        if ref.startswith("grad:") and ref not in {port.ref for port in joint.outputs}
    }
    direction = random_direction([port for port in joint.inputs if port.ref in grads], seed=3)
    slope = finite_difference(joint, inputs, direction, by_output)
    assert slope.reliable, f"the derivative is not smooth here: {slope}"
    derivative = sum(inner(grads[ref], along) for ref, along in direction.items())
    assert slope.agrees(derivative), f"VJP of VJP gives {derivative}, differences give {slope}"


# --- random ops ---------------------------------------------------------------------------------------

RANDOM = [s for s in SAMPLES if any(arg.domain == "key" for arg in s.sample.inputs)]


@pytest.mark.parametrize("op_sample", RANDOM, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_random_ops_draw_the_same_bits_in_torch(op_sample: OpSample, seed: int):
    graph = sample_graph(op_sample)
    arrays = arrays_of(graph, seed)
    for got, wanted in zip(run_torch(graph, arrays), interpret_graph(graph, arrays), strict=True):
        assert_same_bits(got, wanted)


# --- errors -------------------------------------------------------------------------------------------

NONSENSE = (None, "nonsense", -7, 10**6, 0.5, (), (-7, 10**6), ("a", None), True)


@pytest.mark.parametrize("op_sample", [s for s in SAMPLES if s.index == 0], ids=str)
def test_wrong_inputs_and_attributes_are_type_rule_errors(op_sample: OpSample):
    """A type rule accepts or raises TypeRuleError, whatever it is given; it never fails in another way."""
    name, types = op_sample.op.name, [arg.type for arg in op_sample.sample.inputs]
    attrs = dict(op_sample.sample.attrs)
    attempts: list[tuple[list[TensorType], dict[str, object]]] = [
        (types[:-1], attrs),
        ([*types, *types], attrs),
        ([], attrs),
        ([type_.with_(shape=(7, 2, 3, 5, 1, 2, 2)) for type_ in types], attrs),
        ([type_.with_(shape=()) for type_ in types], attrs),
        *(([type_.with_(dtype=dtype) for type_ in types], attrs) for dtype in ("bool", "i64", "c64", "u8", "f16")),
        *((types, {key: value for key, value in attrs.items() if key != gone}) for gone in attrs),
        *((types, {**attrs, key: value}) for key in attrs for value in NONSENSE),
    ]
    for given, options in attempts:
        try:
            REGISTRY.infer(name, given, Attrs(options))
        except TypeRuleError as wrong:
            assert str(wrong).startswith(f"{name}("), "the message shows the op, its inputs and attributes"


@pytest.mark.parametrize("op_sample", [s for s in SAMPLES if s.index == 0], ids=str)
def test_a_wrong_number_of_inputs_is_refused(op_sample: OpSample):
    name, types = op_sample.op.name, [arg.type for arg in op_sample.sample.inputs]
    with pytest.raises(TypeRuleError):
        REGISTRY.infer(name, types * 20 if types else [TensorType("f64", (2,))], Attrs(op_sample.sample.attrs))
