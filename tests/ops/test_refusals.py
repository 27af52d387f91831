"""What type rules refuse and admit, where no type near a sample shows it."""

from __future__ import annotations

from typing import Any

import pytest

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attrs
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.opdef import t

KEY, MASK = t(2, dtype="i64"), t(2, dtype="bool")
GRID = {"mode": "bilinear", "padding": "zeros", "align_corners": False}
RESIZED = {"filter": "linear", "scales": None, "align_corners": False, "antialias": False}
LAYER = (t(5, 2, 3), t(2, 4), t(12, 3), t(12, 4))
GRU = {"cell": "gru", "bias": False, "projected": False, "reverse": False}
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
    ("cholesky_solve", (t(3, 2, dtype="f32"), t(3, 3)), {}, "one dtype and rank"),
    ("cholesky_solve", (t(3), t(3, 3)), {}, "one dtype and rank"),
    ("lstsq", (t(2, 3, 2), t(3, 1)), {"driver": "gels", "rcond": 0.0}, "one dtype and rank"),
    ("lstsq", (t(3, 2), t(3, 1, dtype="f32")), {"driver": "gels", "rcond": 0.0}, "one dtype and rank"),
    ("lstsq", (t(3, 2), t(3, 1)), {"driver": "gesv", "rcond": 0.0}, "driver must be"),
    *(
        ("interpolate", (t(2, 3, 4, 4),), {**RESIZED, "output_size": (8, 8), flag: 0}, "two bools")
        for flag in ("align_corners", "antialias")
    ),
    ("interpolate", (t(2, 3),), {**RESIZED, "output_size": ()}, "1 to 3 spatial axes"),
    ("interpolate", (t(2, 3, 4, 4, 4, 4),), {**RESIZED, "output_size": (2, 2, 2, 2)}, "1 to 3 spatial axes"),
    ("where_scalar", (MASK, t(2)), {"value": 1j}, "a number that"),
    ("where_scalar", (MASK, t(2, dtype="c64")), {"value": "1j"}, "a number that"),
    ("where_scalar", (MASK, MASK), {"value": 1}, "would change the dtype"),
    *(("recurrent_layer", LAYER, {**GRU, flag: 0}, "are bools") for flag in ("bias", "projected", "reverse")),
]


@pytest.mark.parametrize(("op", "inputs", "attrs", "message"), REFUSED)
def test_types_that_an_op_refuses(op: str, inputs: tuple[TensorType, ...], attrs: dict[str, Any], message: str):
    with pytest.raises(TypeRuleError, match=message):
        REGISTRY.infer(op, inputs, Attrs(attrs))


ADMITTED: list[tuple[str, tuple[TensorType, ...], dict[str, Any]]] = [
    ("adaptive_avg_pool", (t(2, 3, 4, 5),), {"output_size": (1, 1)}),
    ("batch_norm_backward", (t(1, 1), t(1, 1), t(1), t(1)), {}),
    ("check", (t(2), t(2, dtype="bool")), {"expected": (0, 1)}),
    ("recurrent_layer", LAYER, GRU),
    ("where_scalar", (MASK, t(2, dtype="c64")), {"value": 1j}),
    ("where_scalar", (MASK, t(2, dtype="i64")), {"value": 2}),
    ("where_scalar", (MASK, MASK), {"value": True}),
]


@pytest.mark.parametrize(("op", "inputs", "attrs"), ADMITTED)
def test_types_that_an_op_admits(op: str, inputs: tuple[TensorType, ...], attrs: dict[str, Any]):
    assert REGISTRY.infer(op, inputs, Attrs(attrs))
