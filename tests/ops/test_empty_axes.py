"""Axes of size 0: what a type rule admits of them, the interpreter and torch do alike, derivatives included.

In each sample axes become empty: all axes of one size or all but one of them, with the numbers of that size in
attributes and without; one to three axes; numbers in attributes alone. Most of that is refused, as torch refuses it;
what is not must work. A kernel of torch's that ends the process ends this test: such a variant is one for the type
rule to refuse.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from helpers import assert_close, coarsest, run_torch
from test_op_table import torch_gradients

from daggc.errors import DaggcError, DifferentiationError, TypeRuleError
from daggc.interp import decomposition, interpret, interpret_graph
from daggc.ir.attrs import Attr, Attrs
from daggc.ir.graph import Graph, Program
from daggc.ir.verifier import verify
from daggc.ops import REGISTRY
from daggc.ops.opdef import NOT_DIFFERENTIABLE, OpDef, Sample
from daggc.passes.split import join
from daggc.passes.vjp import vjp
from daggc.testing import (
    OpSample,
    has_true_derivative,
    op_samples,
    random_direction,
    random_inputs,
    sample_graph,
    with_dtype,
)

TRIED = 400  # variants of a sample, most of them refused
CHECKED = 12  # admitted variants of a sample, the first of them with derivatives:
DIFFERENTIATED = 5

# Op with samples -> why no variant of its samples is admitted.
NEVER_EMPTY = {
    "batch_norm": "torch refuses statistics of nothing, and of no channels",
    "batch_norm_backward": "torch's kernel divides by the number of elements, an integer: the process ends",
    "batch_norm_eval_backward": "the same kernel; the derivative of an empty batch is emitted in simple ops",
    "checkpoint": "the graph inside has the sizes of the sample",
    "cond": "the graphs inside have the sizes of the sample",
    "constant": "its numbers are in an attribute",
    "ctc_loss": "torch refuses log probabilities of no step, no sample or no class",
    "ctc_loss_backward": "torch refuses log probabilities of no step, no sample or no class",
    "fft_c2c": "torch refuses tensors without elements (MKL does)",
    "fft_c2r": "torch refuses tensors without elements (MKL does)",
    "fft_r2c": "torch refuses tensors without elements (MKL does)",
    "max": "nothing has no extremum, in torch as well",
    "min": "nothing has no extremum, in torch as well",
    "scan": "the graph inside has the sizes of the sample",
    "while_loop": "the graphs inside have the sizes of the sample",
}
# What torch's derivatives of size 0 fail with, where its forward does not; daggc's are as empty as they should be.
NO_EMPTY_AUTOGRAD = (
    "cannot reshape tensor of 0 elements",  # embedding_backward, grid_sample_backward
    "Tensor must have a last dimension with stride 1",  # view_as_real
    "Expected grad_output to have non-zero size",  # adaptive_max_pool to no positions
)

Axis = tuple[int, int]  # (input, axis)
Place = tuple[str | int, ...]  # the name of an attribute, and where in it


# --- variants -----------------------------------------------------------------------------------------


def _numbers(attrs: dict[str, Attr]) -> Iterator[tuple[Place, int]]:
    """Where attributes hold positive integers, in tuples as well."""

    def within(place: Place, value: Attr) -> Iterator[tuple[Place, int]]:
        if type(value) is int and value > 0:
            yield place, value
        elif isinstance(value, tuple):
            for at, item in enumerate(value):
                yield from within((*place, at), item)

    for name, value in attrs.items():
        yield from within((name,), value)


def _put_zero(value: Attr, place: Sequence) -> Attr:
    if not place:
        return 0
    assert isinstance(value, tuple)
    at, *rest = place
    return (*value[:at], _put_zero(value[at], rest), *value[at + 1 :])


def _emptied(sample: Sample, axes: frozenset[Axis], places: frozenset[Place]) -> Sample:
    """The sample with zeros in place of these sizes and numbers."""
    inputs = tuple(
        replace(
            arg,
            type=arg.type.with_(
                shape=tuple(0 if (at, axis) in axes else size for axis, size in enumerate(arg.type.shape))
            ),
        )
        for at, arg in enumerate(sample.inputs)
    )
    attrs = dict(sample.attrs)
    for name, *rest in places:
        attrs[str(name)] = _put_zero(attrs[str(name)], rest)
    return Sample(inputs, attrs)


def _choices(sample: Sample) -> Iterator[tuple[frozenset[Axis], frozenset[Place]]]:
    """Which sizes and numbers become 0, the likeliest to be admitted first; some come twice."""
    sizes = {
        (at, axis): size
        for at, arg in enumerate(sample.inputs)
        for axis, size in enumerate(arg.type.shape)
        if size and arg.domain != "key"
    }
    numbers = dict(_numbers(dict(sample.attrs)))

    def of(size: int) -> tuple[frozenset[Axis], frozenset[Place]]:
        return (
            frozenset(axis for axis, own in sizes.items() if own == size),
            frozenset(place for place, own in numbers.items() if own == size),
        )

    nothing: frozenset = frozenset()
    known = sorted({*sizes.values(), *numbers.values()})
    for axes, places in map(of, known):
        yield axes, places
        yield axes, nothing
        yield nothing, places
        yield from ((axes, frozenset((place,))) for place in numbers)
        yield from ((axes - {axis}, kept) for axis in axes for kept in (nothing, places))
    for count in (1, 2, 3):
        for chosen in itertools.combinations(sizes, count):
            here = {sizes[axis] for axis in chosen}
            yield frozenset(chosen), nothing
            yield frozenset(chosen), frozenset(place for place, own in numbers.items() if own in here)
        if count < 3:
            yield from ((nothing, frozenset(places)) for places in itertools.combinations(numbers, count))
            yield from (
                (frozenset((axis,)), frozenset(places))
                for axis in sizes
                for places in itertools.combinations(numbers, count)
            )
    for first, second in itertools.combinations(known, 2):
        yield of(first)[0] | of(second)[0], of(first)[1] | of(second)[1]


def empty_variants(op_sample: OpSample) -> Iterator[OpSample]:
    """What the type rule admits of a sample with empty axes."""
    tried: set[tuple] = set()
    found = 0
    for choice in _choices(op_sample.sample):
        if len(tried) >= TRIED or found >= CHECKED:
            return
        if choice in tried:
            continue
        tried.add(choice)
        sample = _emptied(op_sample.sample, *choice)
        types = [arg.type for arg in sample.inputs]
        try:
            outputs = REGISTRY.infer(op_sample.op.name, types, Attrs(sample.attrs))
        except TypeRuleError:
            continue
        if not all(type_.numel for type_ in (*types, *outputs)):
            found += 1
            yield replace(op_sample, sample=sample)


# --- what is held to be true of them ------------------------------------------------------------------


def _with_valid_indices(op_sample: OpSample, graph: Graph, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Indices become 0, which is one of any size but 0; ports are named by place."""
    zeros = {str(at) for at, arg in enumerate(op_sample.sample.inputs) if arg.domain.startswith("index:")}
    replaced = {port.ref for port in graph.inputs_of("input") if port.target in zeros}
    return {ref: np.zeros_like(array) if ref in replaced else array for ref, array in arrays.items()}


def _differences(what: str, graph: Graph, got: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> Iterator[str]:
    for port, one, other in zip(graph.outputs, got, wanted, strict=True):
        try:
            assert_close(one, other, f"{what}: {port.ref}", tolerance=coarsest(graph))
        except AssertionError as wrong:
            yield f"{what}: {port.ref} is {one.dtype}{list(one.shape)} {one}, not {other}: {str(wrong)[:200]}"


def _attempt(what: str, run: Callable[[], list[np.ndarray]]) -> tuple[list[np.ndarray], str]:
    """What a function gives, or why it fails."""
    try:
        return run(), ""
    except Exception as wrong:  # whatever it raises, the type rule should have refused
        return [], f"{what} fails: {type(wrong).__name__}: {str(wrong)[:300]}"


def _compared(what: str, graph: Graph, arrays: list[np.ndarray]) -> Iterator[str]:
    """How the interpreter and torch differ in a graph."""
    wanted, failure = _attempt(f"{what}: the interpreter", lambda: interpret_graph(graph, arrays))
    got, other = _attempt(f"{what}: torch", lambda: run_torch(graph, arrays))
    if failure or other:
        yield from filter(None, (failure, other))
    else:
        yield from _differences(what, graph, got, wanted)


def wrong_forward(op_sample: OpSample) -> Iterator[str]:
    """What is wrong with the values of an admitted variant, and with what planners ask."""
    graph = sample_graph(op_sample)
    arrays = list(_with_valid_indices(op_sample, graph, random_inputs(graph)).values())
    yield from _compared("forward", graph, arrays)
    node = graph.nodes[0]
    cost = op_sample.op.cost(node)
    if not (0 <= cost.flops < float("inf") and 0 <= cost.bytes < float("inf")):
        yield f"the cost is {cost}"
    op_sample.op.axes(node)
    if op_sample.op.decompose is not None:
        parts = decomposition(node)
        got, failure = _attempt("the decomposition", lambda: interpret_graph(parts, arrays))
        yield from [failure] if failure else _differences("decomposition", parts, got, interpret_graph(graph, arrays))


def wrong_derivative(op_sample: OpSample) -> Iterator[str]:
    """What is wrong with the VJP of an admitted variant: in torch, and against torch's autograd."""
    graph = sample_graph(op_sample)
    try:
        after = vjp(Program({"forward": graph}))
    except DifferentiationError:
        return
    except Exception as wrong:
        yield f"the VJP fails: {type(wrong).__name__}: {str(wrong)[:300]}"
        return
    verify(after, REGISTRY)
    joint = join(after.forward, after.backward)
    drawn = {**random_inputs(joint), **random_direction(joint.inputs_of("cotangent"), seed=1)}
    given = _with_valid_indices(op_sample, graph, drawn)
    yield from _compared("backward", joint, [given[port.ref] for port in joint.inputs])
    if not has_true_derivative(op_sample):
        return
    inputs = {port.ref: given[port.ref] for port in graph.inputs}
    cotangents = {port.target: given[port.ref] for port in joint.inputs_of("cotangent")}
    wrt = [port.target for port in joint.outputs if port.kind == "grad"]
    try:
        found, used = torch_gradients(graph, inputs, cotangents, wrt) or ({}, {})
    except RuntimeError as wrong:
        if not any(message in str(wrong) for message in NO_EMPTY_AUTOGRAD):
            yield f"autograd fails: {str(wrong)[:300]}"
        return
    ours = interpret(after, {**inputs, **{f"cotangent:{ref}": array for ref, array in used.items()}}) if used else {}
    for ref in wrt if used else ():
        gradient = ours[f"grad:{ref}"]
        if ref in found:
            try:
                assert_close(gradient, found[ref], tolerance=coarsest(joint))
            except AssertionError as wrong:
                yield f"the gradient of {ref} is {gradient}, autograd's {found[ref]}: {str(wrong)[:200]}"
        elif gradient.any():
            yield f"the gradient of {ref} is {gradient}, autograd has none"


def _text(op_sample: OpSample) -> str:
    return f"{', '.join(str(arg.type) for arg in op_sample.sample.inputs)} {{{Attrs(op_sample.sample.attrs)}}}"


@pytest.mark.filterwarnings("ignore:.*degrees of freedom is <= 0", "ignore:Mean of empty slice")
@pytest.mark.parametrize("op", [REGISTRY[name] for name in sorted(REGISTRY)], ids=lambda op: op.name)
def test_empty_axes(op: OpDef):
    wrong: list[str] = []
    count = 0
    for op_sample in (OpSample(op, sample, index) for index, sample in enumerate(op.samples)):
        for number, variant in enumerate(empty_variants(op_sample)):
            count += 1
            found = list(wrong_forward(variant))
            narrow = with_dtype(variant, "f32")
            if narrow is not None and narrow.sample != variant.sample:
                found += wrong_forward(narrow)
            if number < DIFFERENTIATED and op.vjp is not NOT_DIFFERENTIABLE:
                found += wrong_derivative(variant)
            wrong += [f"{_text(variant)}: {fault}" for fault in found]
    assert not wrong, "\n".join(wrong)
    assert (count == 0) == (op.name in NEVER_EMPTY or not op.samples), f"{count} variants"


def test_exceptions_are_of_ops_that_are_there():
    assert set(NEVER_EMPTY) <= {op_sample.op.name for op_sample in op_samples()}


def test_refusals_say_what_is_required():
    """Each reason why an empty axis is refused is in the message, with the type that has it."""
    b = REGISTRY.builder("forward")
    empty = b.input(REGISTRY["amax"].samples[0].inputs[0].type.with_(shape=(0, 4)), "input", "0")
    with pytest.raises(DaggcError, match=r"axes that are not empty are required, got f64\[0,4\]"):
        b.emit("amax", empty, dims=(0,), keepdim=False)
