"""Constants that are part of the program's text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from daggc.ir.attrs import Attrs, Dense
from daggc.ir.types import TensorType
from daggc.ops.opdef import (
    NOT_DIFFERENTIABLE,
    Axes,
    Cost,
    OpDef,
    Sample,
    letters,
    register,
    require,
)


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    value = attrs["value"]
    require(not inputs and isinstance(value, Dense), "no input and a dense value are required")
    require(value.type.device is None, "a constant has no device")
    return (value.type,)


register(
    OpDef(
        name="constant",
        infer=_infer,
        evaluate=lambda node: node.attrs["value"].numpy(),
        vjp=NOT_DIFFERENTIABLE,
        cost=lambda node: Cost(0, node.output.type.nbytes, "elementwise"),
        axes=lambda node: Axes((), (letters(node.output.type.rank),)),
        lower=lambda node, args: (
            f"kernels.constant({node.attrs['value'].data.hex()!r}, {node.output.type.dtype!r}, "
            f"{node.output.type.shape}, device)"
        ),
        aten={},
        samples=(
            Sample((), {"value": Dense.of(np.array([1.5, -2.0, 0.25]))}),
            Sample((), {"value": Dense.of(np.array([[1, 2], [3, 4]], np.int64))}),
        ),
    )
)
