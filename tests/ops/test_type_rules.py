"""Type rules near the samples: what a rule admits, the interpreter and torch can do, with the types it says.

Each sample is changed a little in many ways: an axis longer, shorter or gone, all axes of one size together, numbers
in attributes one more or less, flags turned. Most of that is refused; what is not must work. Axes of size 0 are left
to test_empty_axes.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from helpers import coarsest, run_torch

from daggc.errors import RunError, TypeRuleError
from daggc.interp import interpret_graph
from daggc.ir.attrs import Attr, Attrs
from daggc.ir.graph import Graph
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.opdef import Arg, Sample
from daggc.testing import OpSample, op_samples, random_inputs, sample_graph

LARGE = 5000  # elements: more is not tried
# Attributes that are not changed, and why.
FIXED = {
    "stream": "any number of it is good",
    "generator": "any number of it is good",
}
# Op -> why torch and NumPy may differ in what its type rule admits.
UNEQUAL: dict[str, str] = {
    "check": "its numbers must be those that it expects",
    "svd": "vectors that belong to no singular value are any base of their space",
}

Shape = tuple[int, ...]


def near_shapes(shape: Shape) -> Iterator[Shape]:
    """Shapes one step away."""
    for axis, size in enumerate(shape):
        for other in sorted({size + 1, size - 1, 1} - {size, 0, -1}):
            yield (*shape[:axis], other, *shape[axis + 1 :])
    yield (2, *shape)
    yield (*shape, 2)
    if shape:
        yield shape[1:]
        yield shape[:-1]


def near_values(value: Attr) -> Iterator[Attr]:
    """Attributes one step away."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1, -1, 0.5, None)
    elif isinstance(value, float):
        yield from (value / 2, None, "nonsense")
    elif isinstance(value, str) or value is None:
        yield from ("nonsense", 0.5)
    elif isinstance(value, tuple):
        for at, item in enumerate(value):
            for other in near_values(item):
                yield (*value[:at], other, *value[at + 1 :])
        yield value[:-1]
        if value:
            yield (*value, value[-1])


def near(sample: Sample) -> Iterator[Sample]:
    """Samples one step away; not all of them are well typed."""
    inputs, attrs = sample.inputs, dict(sample.attrs)
    for at, arg in enumerate(inputs):
        for shape in near_shapes(arg.type.shape):
            yield Sample((*inputs[:at], _with_shape(arg, shape), *inputs[at + 1 :]), attrs)
    for size in sorted({size for arg in inputs for size in arg.type.shape}):
        for other in (size + 1, size - 1 or 2):
            renamed = [_with_shape(arg, tuple(other if s == size else s for s in arg.type.shape)) for arg in inputs]
            yield Sample(tuple(renamed), attrs)
            shapes = {
                name: tuple(other if s == size else s for s in value) if _is_shape(name, value) else value
                for name, value in attrs.items()
            }
            yield Sample(tuple(renamed), shapes)
    if len({arg.type.shape for arg in inputs}) == 1 and len(inputs) > 1:
        for shape in near_shapes(inputs[0].type.shape):
            yield Sample(tuple(_with_shape(arg, shape) for arg in inputs), attrs)
    yield Sample(inputs[:-1], attrs)
    for name, value in attrs.items():
        if name not in FIXED:
            for other in near_values(value):
                yield Sample(inputs, {**attrs, name: other})


def _with_shape(arg: Arg, shape: Shape) -> Arg:
    return replace(arg, type=arg.type.with_(shape=shape))


def _is_shape(name: str, value: Attr) -> bool:
    return "shape" in name and isinstance(value, tuple) and all(type(item) is int for item in value)


def admitted(op_sample: OpSample) -> Iterator[OpSample]:
    """What is near a sample and well typed."""
    seen: set[tuple] = set()
    for sample in near(op_sample.sample):
        key = (tuple(arg.type for arg in sample.inputs), str(Attrs(sample.attrs)))
        if key in seen:
            continue
        seen.add(key)
        types = [arg.type for arg in sample.inputs]
        try:
            outputs = REGISTRY.infer(op_sample.op.name, types, Attrs(sample.attrs))
        except TypeRuleError:
            continue
        if max((type_.numel for type_ in (*types, *outputs)), default=0) <= LARGE:
            yield replace(op_sample, sample=sample)


def arrays_for(op_sample: OpSample, graph: Graph) -> list[np.ndarray]:
    """Numbers of the arguments' domains; indices are 0, which is one of any size but 0."""
    arrays = list(random_inputs(graph).values())
    domains = [arg.domain for arg in op_sample.sample.inputs]
    return [
        np.zeros_like(array) if domain.startswith("index:") else array
        for array, domain in zip(arrays, domains, strict=True)
    ]


def faults(op_sample: OpSample) -> Iterator[str]:
    """What is wrong with what the type rule admits near a sample."""
    for near_one in admitted(op_sample):
        graph = sample_graph(near_one)
        arrays = arrays_for(near_one, graph)
        text = f"{', '.join(str(arg.type) for arg in near_one.sample.inputs)} {{{Attrs(near_one.sample.attrs)}}}"
        try:
            wanted = interpret_graph(graph, arrays)
        except RunError as wrong:
            if "indices must be" not in str(wrong):  # of an axis of size 0
                yield f"{text}: the interpreter fails: {str(wrong)[:200]}"
            continue
        except Exception as wrong:
            yield f"{text}: the interpreter fails: {type(wrong).__name__}: {str(wrong)[:200]}"
            continue
        try:
            results = run_torch(graph, arrays)
        except Exception as wrong:
            yield f"{text}: torch fails: {str(wrong)[:200]}"
            continue
        for index, (port, got, want) in enumerate(zip(graph.outputs, results, wanted, strict=True)):
            found = _difference(graph, port.value.type, got, want)
            if found:
                yield f"{text}: output {index} {found}"


def _difference(graph: Graph, type_: TensorType, got: np.ndarray, wanted: np.ndarray) -> str:
    if (got.dtype, got.shape) != (type_.numpy_dtype, type_.shape):
        return f"is {got.dtype}{list(got.shape)} in torch, {type_} by the type rule"
    if wanted.dtype.kind in "biu":
        return "" if np.array_equal(got, wanted) else f"is {got} in torch, {wanted} in the interpreter"
    wide = np.complex128 if wanted.dtype.kind == "c" else np.float64
    got, wanted = got.astype(wide), wanted.astype(wide)
    finite = np.abs(wanted[np.isfinite(wanted)])
    scale = max(1.0, float(finite.max())) if finite.size else 1.0
    same = np.allclose(got, wanted, rtol=0, atol=(coarsest(graph) or 0.0) * scale, equal_nan=True)
    return "" if same else f"is {got} in torch, {wanted} in the interpreter"


@pytest.mark.parametrize("op_sample", [s for s in op_samples() if s.op.name not in UNEQUAL], ids=str)
def test_what_is_admitted_near_a_sample_works(op_sample: OpSample):
    found = list(faults(op_sample))
    assert not found, "\n".join(found)
