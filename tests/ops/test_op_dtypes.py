"""Every dtype that a type rule admits: the interpreter and torch agree, in integers and bools bit for bit.

Each sample is tried with every dtype in place of its f64, and with other integers in place of its i64. What the type
rule refuses is not tested; what it admits must work. A dtype that torch has no CPU kernel for is listed below.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import isfinite

import numpy as np
import pytest
from helpers import TOLERANCES, coarsest, run_torch

from daggc.errors import DifferentiationError, RunError, TypeRuleError
from daggc.interp import interpret, interpret_graph
from daggc.ir.attrs import Attr, Attrs
from daggc.ir.graph import Graph, Program
from daggc.ir.types import DTYPES
from daggc.ir.verifier import verify
from daggc.ops import REGISTRY
from daggc.ops.opdef import NOT_DIFFERENTIABLE, Sample
from daggc.passes.split import join
from daggc.passes.vjp import vjp
from daggc.testing import OpSample, op_samples, random_direction, random_inputs, sample_graph

# op -> dtypes that its type rule admits because CUDA has a kernel, where torch has no CPU kernel
NO_CPU_KERNEL: dict[str, tuple[str, ...]] = {
    "avg_pool": ("f16", "bf16"),  # of three axes
    "avg_pool_backward": ("f16", "bf16"),
    "interpolate": ("f16", "bf16"),  # antialiased
    "interpolate_backward": ("f16", "bf16"),
}
# op -> why torch and NumPy may differ by more than rounding in some dtype
LOOSER: dict[str, tuple[dict[str, float], str]] = {}

INTEGERS = ("i32", "i16", "i8", "u8")


def variants(op_sample: OpSample) -> Iterator[tuple[str, OpSample]]:
    """The sample in every combination of dtypes: one in place of f64, one in place of i64."""
    seen: set[tuple] = set()
    for real in DTYPES:
        for integer in ("i64", *INTEGERS):
            if integer != "i64" and real not in ("f64", "i64"):
                continue
            for attrs in _attrs(op_sample.sample, real, integer):
                inputs = tuple(
                    replace(
                        arg,
                        type=arg.type.with_(dtype={"f64": real, "i64": integer}.get(arg.type.dtype, arg.type.dtype)),
                    )
                    for arg in op_sample.sample.inputs
                )
                key = (inputs, str(Attrs(attrs)))
                if key not in seen and _admitted(op_sample.op.name, inputs, attrs):
                    seen.add(key)
                    yield f"{real} {integer}", replace(op_sample, sample=Sample(inputs, attrs))


def _attrs(sample: Sample, real: str, integer: str) -> Iterator[dict[str, Attr]]:
    """Attributes that name dtypes, renamed; numbers as they are, and of the kind of the dtype."""
    renamed = {
        name: {"f64": real, "i64": integer}.get(value, value) if isinstance(value, str) else value
        for name, value in sample.attrs.items()
    }
    yield renamed
    if DTYPES[real].kind in "ib":
        kind = int if DTYPES[real].kind == "i" else bool
        yield {name: kind(v) if isinstance(v, float) and isfinite(v) else v for name, v in renamed.items()}


def _admitted(op: str, inputs: tuple, attrs: dict[str, Attr]) -> bool:
    try:
        REGISTRY.infer(op, [arg.type for arg in inputs], Attrs(attrs))
    except TypeRuleError:
        return False
    return True


def disagreements(op_sample: OpSample) -> Iterator[str]:
    """What differs between the interpreter and torch, of all dtypes of a sample."""
    name = op_sample.op.name
    for dtypes, variant in variants(op_sample):
        graph = sample_graph(variant)
        arrays = list(random_inputs(graph).values())
        try:
            wanted = interpret_graph(graph, arrays)
        except Exception as wrong:  # whatever it raises, the type rule should have refused
            yield f"{dtypes}: the interpreter fails: {type(wrong).__name__}: {str(wrong)[:200]}"
            continue
        try:
            results = run_torch(graph, arrays)
        except RunError as wrong:
            if dtypes.split()[0] not in NO_CPU_KERNEL.get(name, ()):
                yield f"{dtypes}: torch fails: {str(wrong)[:200]}"
            continue
        for index, (got, want) in enumerate(zip(results, wanted, strict=True)):
            difference = _difference(name, graph, got, want)
            if difference:
                yield f"{dtypes}: output {index} {difference}"


def _difference(op: str, graph: Graph, got: np.ndarray, wanted: np.ndarray) -> str:
    if (got.dtype, got.shape) != (wanted.dtype, wanted.shape):
        return f"is {got.dtype}{got.shape} in torch, {wanted.dtype}{wanted.shape} in the interpreter"
    if wanted.dtype.kind in "biu":
        return "" if np.array_equal(got, wanted) else f"is {got} in torch, {wanted} in the interpreter"
    tolerance = coarsest(graph) or 0.0
    tolerance = max([tolerance, *(LOOSER[op][0].get(dtype, 0.0) for dtype in TOLERANCES if op in LOOSER)])
    wide = np.complex128 if wanted.dtype.kind == "c" else np.float64
    got, wanted = got.astype(wide), wanted.astype(wide)
    finite = np.abs(wanted[np.isfinite(wanted)])
    scale = max(1.0, float(finite.max())) if finite.size else 1.0
    same = np.allclose(got, wanted, rtol=0, atol=tolerance * scale, equal_nan=True)
    return "" if same else f"is {got} in torch, {wanted} in the interpreter"


@pytest.mark.parametrize("op_sample", list(op_samples()), ids=str)
def test_what_the_type_rule_admits_works(op_sample: OpSample):
    found = list(disagreements(op_sample))
    assert not found, "\n".join(found)


def wrong_derivatives(op_sample: OpSample) -> Iterator[str]:
    """Where the VJP rule does not hold in a float dtype that the type rule admits."""
    name = op_sample.op.name
    for dtypes, variant in variants(op_sample):
        if dtypes.split()[0] not in ("f32", "f16", "bf16", "c64"):
            continue
        program = Program({"forward": sample_graph(variant)})
        try:
            after = vjp(program)
        except DifferentiationError:
            continue
        except TypeRuleError as wrong:
            yield f"{dtypes}: the VJP emits what is not well typed: {str(wrong)[:200]}"
            continue
        verify(after, REGISTRY)
        joint = join(after.forward, after.backward)
        given = {**random_inputs(joint), **random_direction(joint.inputs_of("cotangent"), seed=1)}
        arrays = [given[port.ref] for port in joint.inputs]
        interpret(after, given)
        try:
            results = run_torch(joint, arrays)
        except RunError as wrong:
            if dtypes.split()[0] not in NO_CPU_KERNEL.get(name, ()):
                yield f"{dtypes}: torch fails: {str(wrong)[:200]}"
            continue
        for port, got, want in zip(joint.outputs, results, interpret_graph(joint, arrays), strict=True):
            difference = _difference(name, joint, got, want)
            if difference:
                yield f"{dtypes}: {port.ref} {difference}"


@pytest.mark.parametrize("op_sample", [s for s in op_samples() if s.op.vjp is not NOT_DIFFERENTIABLE], ids=str)
def test_vjp_rules_hold_in_every_float_dtype(op_sample: OpSample):
    found = list(wrong_derivatives(op_sample))
    assert not found, "\n".join(found)
