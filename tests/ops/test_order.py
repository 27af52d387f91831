"""The order of 16-bit floats, which NumPy does not have: NaN is the largest number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import assert_same_bits, run_torch

from daggc.interp import interpret_graph
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY

SORT = {"dim": 0, "descending": False, "stable": True}


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("op", "attrs"),
    [("sort", SORT), ("sort", {**SORT, "descending": True}), ("argmax", {"dim": 0, "keepdim": False}), ("median", {})],
)
def test_nan_among_short_floats(op: str, attrs: dict[str, Any], dtype: str):
    b = REGISTRY.builder("one")
    type_ = TensorType(dtype, (6,))
    for index, value in enumerate(b.emit_many(op, b.input(type_, "input", "0"), **attrs)):
        b.output(value, "output", str(index))
    graph = b.build()
    arrays = [np.array([1, np.nan, 3, -2, np.nan, 0.5]).astype(type_.numpy_dtype)]
    for got, wanted in zip(run_torch(graph, arrays), interpret_graph(graph, arrays), strict=True):
        assert_same_bits(got, wanted)
