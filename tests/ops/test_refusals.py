"""What type rules refuse and admit, where no type near a sample shows it."""

from __future__ import annotations

from typing import Any

import pytest

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attrs
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.opdef import t

KEY = t(2, dtype="i64")
GRID = {"mode": "bilinear", "padding": "zeros", "align_corners": False}
DRAW = {"dtype": "f64", "shape": (2,)}

REFUSED: list[tuple[str, tuple[TensorType, ...], dict[str, Any], str]] = [  # and what the message says
    ("grid_sample", (t(2, 3, 4), t(2, 5, 1)), GRID, "2 or 3 spatial axes"),
    ("grid_sample", (t(2, 3, 4, 4, 4, 4), t(2, 5, 5, 5, 5, 4)), GRID, "2 or 3 spatial axes"),
    ("linear", (t(), t(2, 3)), {}, "needs an innermost axis"),
    (
        "rms_norm",
        (t(2, 3), t(3), t(3)),
        {"normalized_shape": (3,), "eps": 1e-5},
        "x, weight and bias",
    ),  # it has no bias
    ("uniform", (KEY,), {**DRAW, "stream": -1}, "stream"),
    ("uniform", (KEY,), {**DRAW, "stream": 0.5}, "stream"),
    ("searchsorted", (t(3, 4), t(3)), {"right": False}, "one sorted row"),
    ("searchsorted", (t(2, 4), t(2, 3, 5)), {"right": False}, "one sorted row"),
    ("searchsorted", (t(), t(3)), {"right": False}, "one sorted row"),
    ("nonzero_static", (t(3, dtype="bool"),), {"size": -1, "fill": 0}, "number of rows"),
]


@pytest.mark.parametrize(("op", "inputs", "attrs", "message"), REFUSED)
def test_types_that_an_op_refuses(op: str, inputs: tuple[TensorType, ...], attrs: dict[str, Any], message: str):
    with pytest.raises(TypeRuleError, match=message):
        REGISTRY.infer(op, inputs, Attrs(attrs))


ADMITTED: list[tuple[str, tuple[TensorType, ...], dict[str, Any]]] = [
    ("adaptive_avg_pool", (t(2, 3, 4, 5),), {"output_size": (1, 1)}),
    ("batch_norm_backward", (t(1, 1), t(1, 1), t(1), t(1)), {}),
    ("check", (t(2), t(2, dtype="bool")), {"expected": (0, 1)}),
]


@pytest.mark.parametrize(("op", "inputs", "attrs"), ADMITTED)
def test_types_that_an_op_admits(op: str, inputs: tuple[TensorType, ...], attrs: dict[str, Any]):
    assert REGISTRY.infer(op, inputs, Attrs(attrs))
