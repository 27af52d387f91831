"""Every op against itself: type rule, NumPy meaning, torch lowering, decomposition and derivatives agree.

One test per (op, sample), so that an op arrives tested with its samples.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import assert_close, assert_same_bits, coarsest, run_torch, to_numpy, to_torch

from daggc.backend.codegen import compile_graph, generate
from daggc.errors import DifferentiationError, IRError, RunError, TypeRuleError
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
    has_true_derivative,
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
VARIADIC = ("concat", "stack", "einsum")


def is_exact(op_sample: OpSample) -> bool:
    """Whether derivatives can be taken, of numbers not rounded to fewer bits on the way."""
    node = sample_graph(op_sample).nodes[0]
    floats = [value.type.dtype for value in (*node.inputs, *node.outputs) if value.type.differentiable]
    return any(value.type.differentiable for value in node.inputs) and set(floats) <= {"f64", "c128"}


every_sample = pytest.mark.parametrize("op_sample", SAMPLES, ids=str)
differentiable_sample = pytest.mark.parametrize(
    "op_sample",
    [s for s in SAMPLES if s.op.vjp is not NOT_DIFFERENTIABLE and has_true_derivative(s) and is_exact(s)],
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
    try:
        results = run_torch(graph, arrays)
    except RunError as wrong:
        if dtype in ("f16", "bf16") and "not implemented for" in str(wrong):
            pytest.skip(f"torch has no CPU kernel: {wrong}")
        raise
    tolerance = coarsest(graph)
    for got, wanted in zip(results, interpret_graph(graph, arrays), strict=True):
        assert_close(got, wanted, tolerance=tolerance)


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, the first axis innermost in memory; every second number of a vector."""
    if tensor.dim() == 1:
        return tensor.repeat_interleave(2)[::2]
    return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() else tensor


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    """The first entry along the first axis in place of all, with stride 0: what ``broadcast`` lowers to."""
    return tensor[:1].expand(tensor.shape) if tensor.dim() and tensor.shape[0] else tensor


@every_sample
@pytest.mark.parametrize("layout", [transposed, expanded])
def test_lowering_takes_any_strides(op_sample: OpSample, layout: Callable[[torch.Tensor], torch.Tensor]):
    """Some aten kernels read memory as if it were contiguous; a lowering has to see to it."""
    graph = sample_graph(op_sample)
    arrays = arrays_of(graph)
    everyone = range(len(arrays))
    for chosen in (everyone, *([index] for index in everyone if len(arrays) > 1)):
        tensors = [
            layout(to_torch(array))
            if index in chosen and (layout is transposed or arg.domain not in ("distinct", "key", "regular"))
            else to_torch(array)
            for index, (array, arg) in enumerate(zip(arrays, op_sample.sample.inputs, strict=True))
        ]
        results = compile_graph(graph)(tensors)
        wanted = interpret_graph(graph, [to_numpy(tensor) for tensor in tensors])
        for got, want in zip(results, wanted, strict=True):
            assert_close(to_numpy(got), want, f"inputs {list(chosen)}", tolerance=coarsest(graph))


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


def cut(array: np.ndarray, labels: Sequence[str | None], label: str, parts: int) -> np.ndarray:
    """The first of so many equal parts along the axis with the label."""
    return array[
        tuple(
            slice(size // parts) if own == label else slice(None) for size, own in zip(array.shape, labels, strict=True)
        )
    ]


@every_sample
def test_cutting_along_axes_commutes_with_the_op(op_sample: OpSample):
    """An axis label says that a part of the inputs gives that part of the outputs: this is held to it.

    Axes of one label may have sizes in proportion (a reshape that merges axes): each is cut into as many parts.
    """
    graph = sample_graph(op_sample)
    node = graph.nodes[0]
    axes = op_sample.op.axes(node)
    if axes is None:
        return
    arrays = arrays_of(graph)
    whole = interpret_graph(graph, arrays)
    for label in sorted({label for labels in axes.inputs for label in labels if label is not None}):
        labelled = [*zip(arrays, axes.inputs, strict=True), *zip(whole, axes.outputs, strict=True)]
        parts = math.gcd(
            *(n for array, labels in labelled for n, own in zip(array.shape, labels, strict=True) if own == label)
        )
        if parts == 1 or label in axes.reduced or not any(label in labels for labels in axes.outputs):
            continue
        pieces = [cut(array, labels, label, parts) for array, labels in labelled]
        given, wanted = pieces[: len(arrays)], pieces[len(arrays) :]
        b = REGISTRY.builder("part")
        inputs = [
            b.input(value.type.with_(shape=array.shape), "input", str(index))
            for index, (value, array) in enumerate(zip(node.inputs, given, strict=True))
        ]
        shapes = {array.shape: piece.shape for (array, _), piece in zip(labelled, pieces, strict=True)}
        try:
            outputs = b.emit_many(node.op, *inputs, **_cut_attrs(node.attrs, shapes))
        except TypeRuleError:
            continue  # the same op at the smaller size has other attributes, such as a number of groups
        for index, value in enumerate(outputs):
            b.output(value, "output", str(index))
        for got, want in zip(interpret_graph(b.build(), given), wanted, strict=True):
            assert_close(got, want, f"cut along {label!r}")


def _cut_attrs(attrs: Attrs, shapes: Mapping[tuple[int, ...], tuple[int, ...]]) -> dict[str, object]:
    """Attributes that spell out a shape, with the shape after the cut."""
    return {name: shapes.get(value, value) if "shape" in name else value for name, value in attrs.items()}


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


NO_AUTOGRAD = (  # torch's messages
    "is not implemented",
    "is not differentiable with respect to",
    "does not support automatic differentiation for outputs with complex dtype",
    "complex case are specified up to multiplication by",  # the random function depends on the phase of eigenvectors
)


def torch_gradients(
    graph: Graph, inputs: Mapping[str, np.ndarray], cotangents: Mapping[str, np.ndarray], wrt: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None:
    """Gradients of the generated forward by torch's autograd.

    Returns:
        Gradients by ref, and the cotangents that took part (some outputs are not differentiable in torch);
        None if torch has no derivative of a kernel.
    """
    leaves = {ref: to_torch(array).requires_grad_(ref in wrt) for ref, array in inputs.items()}
    try:
        outputs = compile_graph(graph).function(torch.device("cpu"), *leaves.values())
        used = {
            port.ref: output
            for port, output in zip(graph.outputs, outputs, strict=True)
            if port.ref in cotangents and output.requires_grad
        }
        if not used:
            return {}, {}
        cts = {ref: cotangents[ref] for ref in used}
        found = torch.autograd.grad(
            list(used.values()), [leaves[ref] for ref in wrt], list(map(to_torch, cts.values())), allow_unused=True
        )
    except (RuntimeError, NotImplementedError) as wrong:
        if any(message in str(wrong) for message in NO_AUTOGRAD):
            return None
        raise
    return {ref: to_numpy(grad) for ref, grad in zip(wrt, found, strict=True) if grad is not None}, cts


@differentiable_sample
def test_vjp_agrees_with_autograd(op_sample: OpSample):
    program = differentiated(op_sample)
    graph = sample_graph(op_sample)
    inputs = random_inputs(graph)
    ports = [port for port in graph.outputs if port.ref in float_outputs(program)]
    cotangents = random_direction(ports, seed=1)
    given = sorted(gradients(program, inputs, cotangents))
    result = torch_gradients(graph, inputs, cotangents, given)
    if result is None:
        pytest.skip("torch has no derivative of the kernel this lowers to; finite differences check it")
    found, used = result
    grads = gradients(program, inputs, used) if used else {}
    for ref in given:
        assert ref in grads or not found[ref].any()
        if ref in found:
            assert_close(grads[ref], found[ref], ref)
        else:
            assert ref not in grads or not grads[ref].any(), f"{ref}: torch has no gradient, the VJP rule gives one"


@differentiable_sample
def test_inputs_without_cotangent_have_none_in_torch(op_sample: OpSample):
    program = differentiated(op_sample)
    graph = sample_graph(op_sample)
    inputs = random_inputs(graph)
    ports = [port for port in graph.outputs if port.value.type.differentiable]
    cotangents = random_direction(ports, seed=1)
    given = {port.target for port in program.backward.outputs}
    for port in graph.inputs:
        if port.value.type.differentiable and port.ref not in given:
            found, _ = torch_gradients(graph, inputs, cotangents, [port.ref]) or ({}, {})
            assert port.ref not in found or not found[port.ref].any(), f"torch has a gradient for {port.ref}"


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


PARTIAL = ("igamma", "igammac", "zeta")  # no derivative by the first operand, in torch as in daggc


@differentiable_sample
def test_second_order_agrees_with_finite_differences(op_sample: OpSample):
    if op_sample.op.name in PARTIAL:
        return
    check_second_order(differentiated(op_sample))


def check_second_order(first: Program) -> None:
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


@pytest.mark.parametrize(
    "op_sample",
    [c for s in SAMPLES if (c := with_dtype(s, "c128")) is not None and s.op.vjp is not NOT_DIFFERENTIABLE],
    ids=str,
)
def test_complex_numbers(op_sample: OpSample):
    """What takes complex numbers computes and differentiates them as torch does, or refuses to differentiate."""
    graph = sample_graph(op_sample)
    if not any(port.value.type.is_complex for port in graph.inputs):
        return
    inputs = random_inputs(graph)
    arrays = list(inputs.values())
    try:
        results = run_torch(graph, arrays)
    except RunError as wrong:
        assert "not implemented for" in str(wrong) or "not supported" in str(wrong)
        pytest.skip("torch has no complex kernel")
    for got, wanted in zip(results, interpret_graph(graph, arrays), strict=True):
        assert_close(got, wanted)
    try:
        program = vjp(Program({"forward": graph}))
    except DifferentiationError:
        return
    cotangents = random_direction([p for p in graph.outputs if p.ref in float_outputs(program)], seed=1)
    grads = gradients(program, inputs, cotangents)
    found, _ = torch_gradients(graph, inputs, cotangents, sorted(grads)) or ({}, {})
    for ref, wanted in found.items():
        assert_close(grads[ref], wanted, ref)
    if is_exact(op_sample) and has_true_derivative(op_sample):
        check_second_order(program)


# --- special numbers ----------------------------------------------------------------------------------

TORCH_VARIES = {
    "airy_ai": "torch's kernel has five digits near -2",
    "hardtanh_backward": "at NaN, torch's vectorised and scalar loops differ",
    "igamma": "torch gives numbers at nan, and ten digits at large ones",
    "igammac": "torch gives numbers at nan, and ten digits at large ones",
    "lerp": "torch fuses the product and the sum: other digits where they cancel",
    "logaddexp2": "torch fuses the product and the sum: other digits where they cancel",
    "polygamma": "torch's trigamma has ten digits",
    "zeta": "torch gives nan at infinity",
}
SPECIAL = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 1e-15, 1e15, -1e15, 20.0, 800.0)


@pytest.mark.parametrize(
    "op_sample",
    [
        s
        for s in SAMPLES
        if s.index == 0
        and any(arg.type.dtype == "f64" for arg in s.sample.inputs)
        and s.op.cost(sample_graph(s).nodes[0]).op_class == "elementwise"
        and len({arg.type.shape for arg in s.sample.inputs}) == 1
        and all(arg.domain != "unit" for arg in s.sample.inputs)
        and s.op.name not in TORCH_VARIES
    ],
    ids=str,
)
def test_special_numbers(op_sample: OpSample):
    """NaN, infinities, zeros of both signs, ties of rounding and the far ends, in all pairs."""
    shape = op_sample.sample.inputs[0].type.shape
    pairs = np.array([(x, y) for x in SPECIAL for y in SPECIAL]).T
    graph = sample_graph(op_sample)
    for chunk in range(0, pairs.shape[1], math.prod(shape)):
        numbers = [np.resize(row[chunk : chunk + math.prod(shape)], shape) for row in pairs]
        arrays = [
            numbers[index % 2] if port.value.type.dtype == "f64" else array
            for index, (port, array) in enumerate(zip(graph.inputs, arrays_of(graph), strict=True))
        ]
        for got, wanted in zip(run_torch(graph, arrays), interpret_graph(graph, arrays), strict=True):
            if got.dtype.kind == "f":
                with np.errstate(all="ignore"):
                    np.testing.assert_allclose(got, wanted, rtol=1e-10, err_msg=f"of {arrays}")
            else:
                np.testing.assert_array_equal(got, wanted, err_msg=f"of {arrays}")


# --- random ops ---------------------------------------------------------------------------------------

RANDOM = [s for s in SAMPLES if any(arg.domain == "key" for arg in s.sample.inputs)]


@pytest.mark.parametrize("op_sample", RANDOM, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_random_ops_draw_the_same_bits_in_torch(op_sample: OpSample, seed: int):
    graph = sample_graph(op_sample)
    arrays = arrays_of(graph, seed)
    for got, wanted in zip(run_torch(graph, arrays), interpret_graph(graph, arrays), strict=True):
        assert_same_bits(got, wanted)


KEY = np.array([7, 1], np.int64)
MANY = 40_000


def drawn(op: str, **attrs: object) -> np.ndarray:
    b = REGISTRY.builder("forward")
    key = b.input(TensorType("i64", (2,)), "key", "0")
    b.output(b.emit(op, key, stream=3, **attrs), "output", "0")
    (result,) = interpret_graph(b.build(), [KEY])
    return result


@pytest.mark.parametrize(
    ("op", "attrs", "mean", "deviation"),
    [
        ("uniform", {"low": -2.0, "high": 3.0, "dtype": "f64"}, 0.5, 5 / math.sqrt(12)),
        ("uniform", {"low": 0.0, "high": 1.0, "dtype": "bf16"}, 0.5, 1 / math.sqrt(12)),
        ("normal", {"mean": 1.0, "std": 0.5, "dtype": "f64"}, 1.0, 0.5),
        ("normal", {"mean": 0.0, "std": 1.0, "dtype": "f32"}, 0.0, 1.0),
        ("bernoulli", {"p": 0.3, "dtype": "f64"}, 0.3, math.sqrt(0.21)),
        ("bernoulli", {"p": 0.9, "dtype": "bool"}, 0.9, 0.3),
        ("randint", {"low": -3, "high": 7, "dtype": "i64"}, 1.5, math.sqrt(99 / 12)),
    ],
)
def test_random_numbers_have_the_moments_of_their_distribution(op: str, attrs: dict, mean: float, deviation: float):
    numbers = drawn(op, shape=(MANY,), **attrs).astype(np.float64)
    assert abs(numbers.mean() - mean) < 5 * deviation / math.sqrt(MANY)
    assert abs(numbers.std() / deviation - 1) < 0.02
    half = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    assert abs(half) < 5 / math.sqrt(MANY), "neighbours are independent"


def test_streams_and_keys_draw_different_numbers():
    b = REGISTRY.builder("forward")
    key = b.input(TensorType("i64", (2,)), "key", "0")
    for stream in range(3):
        b.output(
            b.emit("uniform", key, low=0.0, high=1.0, shape=(MANY,), dtype="f64", stream=stream), "output", f"{stream}"
        )
    graph = b.build()
    draws = [
        *interpret_graph(graph, [KEY]),
        *interpret_graph(graph, [KEY + [0, 1]]),
        *interpret_graph(graph, [KEY + [1, 0]]),
    ]
    for first in range(len(draws)):
        for second in range(first):
            assert abs(np.corrcoef(draws[first], draws[second])[0, 1]) < 5 / math.sqrt(MANY)


def test_permutations_hold_every_index_once():
    numbers = drawn("randperm", size=1000, shape=(1000,), dtype="i64")
    np.testing.assert_array_equal(np.sort(numbers), np.arange(1000))
    assert (numbers != np.arange(1000)).sum() > 900


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


EVIL = ('"); evil(); ("', "'); evil(); ('", "evil()", "x\nevil()", "0) or evil(", "{evil()}", "\\")


@every_sample
def test_attributes_cannot_become_code(op_sample: OpSample):
    """Programs come from files: text in an attribute is refused, or stays text in generated code."""
    graph = sample_graph(op_sample)
    node = graph.nodes[0]
    for key, value in node.attrs.items():
        for evil in EVIL:
            for attack in (evil, (evil,), (evil,) * len(value) if isinstance(value, tuple) else evil):
                attrs = Attrs({**node.attrs, key: attack})
                try:
                    REGISTRY.infer(node.op, [value.type for value in node.inputs], attrs)
                    source = generate(replace(graph, nodes=(replace(node, attrs=attrs),)))
                except IRError:
                    continue
                names = [part.id for part in ast.walk(ast.parse(source)) if isinstance(part, ast.Name)]
                assert "evil" not in names, f"{key}={attack!r} gives {source}"


@pytest.mark.parametrize("op_sample", [s for s in SAMPLES if s.index == 0 and s.op.name not in VARIADIC], ids=str)
def test_a_wrong_number_of_inputs_is_refused(op_sample: OpSample):
    name, types = op_sample.op.name, [arg.type for arg in op_sample.sample.inputs]
    with pytest.raises(TypeRuleError):
        REGISTRY.infer(name, types * 20 if types else [TensorType("f64", (2,))], Attrs(op_sample.sample.attrs))
