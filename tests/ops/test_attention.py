"""Attention with a mask of another dtype."""

from __future__ import annotations

import pytest

from daggc.interp import decomposition
from daggc.ops import REGISTRY
from daggc.ops.opdef import t


@pytest.mark.parametrize("dtype", ["f64", "bf16"])
def test_the_gradient_of_a_mask_has_its_dtype(dtype: str):
    b = REGISTRY.builder("one")
    operand, mask, attrs = t(2, 3, 4, dtype=dtype), t(2, 3, 3, dtype="f32"), {"causal": False, "scale": 0.5}
    values = [b.input(type_, "input", str(index)) for index, type_ in enumerate((*[operand] * 3, mask))]
    out, logsumexp = b.emit_many("attention", *values, has_mask=True, **attrs)
    b.emit("attention_mask_grad", out, *values, out, logsumexp, has_mask=True, **attrs)
    node = b.nodes[-1]
    assert [port.value.type for port in decomposition(node).outputs] == [node.output.type] == [mask]
