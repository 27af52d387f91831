"""Attention with a mask: of another dtype, or one that leaves a query no keys."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import assert_close

from daggc.interp import decomposition, interpret
from daggc.ir.graph import Program
from daggc.ops import REGISTRY
from daggc.ops.opdef import t
from daggc.passes.vjp import vjp
from daggc.testing import random_direction, random_inputs

ATTRS = {"causal": False, "scale": 0.5, "has_mask": True}


@pytest.mark.parametrize("dtype", ["f64", "bf16"])
def test_the_gradient_of_a_mask_has_its_dtype(dtype: str):
    b = REGISTRY.builder("one")
    operand, mask = t(2, 3, 4, dtype=dtype), t(2, 3, 3, dtype="f32")
    values = [b.input(type_, "input", str(index)) for index, type_ in enumerate((*[operand] * 3, mask))]
    out, logsumexp = b.emit_many("attention", *values, **ATTRS)
    b.emit("attention_mask_grad", out, *values, out, logsumexp, **ATTRS)
    node = b.nodes[-1]
    assert [port.value.type for port in decomposition(node).outputs] == [node.output.type] == [mask]


def test_a_query_without_keys_has_no_output_and_no_derivatives():
    """In the op, in its decomposition, and in second derivatives, which mix both."""
    b = REGISTRY.builder("forward")
    values = [b.input(type_, "input", str(index)) for index, type_ in enumerate((*[t(2, 3, 4)] * 3, t(2, 3, 3)))]
    for index, value in enumerate(b.emit_many("attention", *values, **ATTRS)):
        b.output(value, "output", str(index))
    fused = b.build()
    inputs = random_inputs(fused)
    inputs["input:3"][:, 1] = -math.inf
    results = []
    for graph in (fused, decomposition(fused.nodes[0])):
        first = vjp(Program({"forward": graph}))
        second = vjp(first)
        ports = {p.ref: p for program in (first, second) for p in program.backward.inputs_of("cotangent")}
        results.append(interpret(second, {**inputs, **random_direction(list(ports.values()), seed=1)}))
    for ref, array in results[0].items():
        assert_close(array, results[1][ref], ref)
        if ref.strip("'") not in ("grad:input:1", "grad:input:2"):  # keys and values are those of other queries too
            np.testing.assert_array_equal(array[:, 1], 0.0, ref)
