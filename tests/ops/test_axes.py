"""Axes that an op leaves alone are declared so: a batch can be cut along them.

That axes which are declared can be cut, the tests of the op table show; that none is missing, only a table can say.
"""

from __future__ import annotations

from typing import Any

import pytest

from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.opdef import t

ALONG = {"dims": (2,), "keepdim": False}
RESIZED = {"filter": "linear", "output_size": (6, 8), "scales": None, "align_corners": False, "antialias": False}

FREE: list[tuple[str, tuple[TensorType, ...], dict[str, Any], int]] = [  # and how many axes can be cut
    *((op, (t(2, 3, 4),), ALONG, 2) for op in ("amax", "amin", "prod", "logsumexp", "sum", "mean")),
    *((op, (t(2, 3, 4, dtype="bool"),), ALONG, 2) for op in ("all", "any")),
    ("vector_norm", (t(2, 3, 4),), {**ALONG, "ord": 2.0}, 2),
    ("searchsorted", (t(2, 3, 4), t(2, 3, 5)), {"right": False}, 2),
    ("searchsorted", (t(4), t(2, 3, 5)), {"right": False}, 3),
    ("interpolate", (t(2, 3, 4, 4),), RESIZED, 2),
    ("interpolate_backward", (t(2, 3, 6, 8),), {**RESIZED, "input_shape": (2, 3, 4, 4)}, 2),
]


@pytest.mark.parametrize(("op", "inputs", "attrs", "count"), FREE)
def test_axes_that_an_op_leaves_alone_can_be_cut(
    op: str, inputs: tuple[TensorType, ...], attrs: dict[str, Any], count: int
):
    b = REGISTRY.builder("one")
    b.emit_many(op, *(b.input(type_, "input", str(index)) for index, type_ in enumerate(inputs)), **attrs)
    axes = REGISTRY[op].axes(b.nodes[-1])
    assert axes is not None
    (given,) = axes.outputs
    labels = given[:count]
    assert None not in labels and len(set(labels)) == count
    assert axes.inputs[-1][:count] == labels
    assert all(own[:count] == labels for own, type_ in zip(axes.inputs, inputs, strict=True) if type_.rank > count)
