"""What type rules refuse, where no type near a sample shows it."""

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

REFUSED: list[tuple[str, tuple[TensorType, ...], dict[str, Any]]] = [
    ("grid_sample", (t(2, 3, 4), t(2, 5, 1)), GRID),  # of one axis
    ("grid_sample", (t(2, 3, 4, 4, 4, 4), t(2, 5, 5, 5, 5, 4)), GRID),  # of four axes
    ("linear", (t(), t(2, 3)), {}),
    ("rms_norm", (t(2, 3), t(3), t(3)), {"axes": 1, "eps": 1e-5}),  # it has no bias
    ("uniform", (KEY,), {**DRAW, "low": 0.0, "high": 1.0, "stream": -1}),
    ("uniform", (KEY,), {**DRAW, "low": 0.0, "high": 1.0, "stream": 0.5}),
    ("searchsorted", (t(3, 4), t(3)), {"right": False}),
    ("searchsorted", (t(2, 4), t(2, 3, 5)), {"right": False}),
    ("searchsorted", (t(), t(3)), {"right": False}),
    ("nonzero_static", (t(3, dtype="bool"),), {"size": -1, "fill": 0}),
]


@pytest.mark.parametrize(("op", "inputs", "attrs"), REFUSED)
def test_types_that_an_op_refuses(op: str, inputs: tuple[TensorType, ...], attrs: dict[str, Any]):
    with pytest.raises(TypeRuleError):
        REGISTRY.infer(op, inputs, Attrs(attrs))
