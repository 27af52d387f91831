"""Loss scaling for f16: which steps must be skipped, and the scale of the next step.

Small gradients vanish in f16. So the loss is multiplied by a scale before the backward, and its gradients by the
inverse after it. A step whose gradients overflowed is skipped, and the scale made smaller; after enough steps that did
not, it is made larger. The meaning is that of ``torch.amp.GradScaler``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import cast, zeros_like
from daggc.ops.opdef import (
    NOT_DIFFERENTIABLE,
    Arg,
    Cost,
    OpDef,
    Sample,
    node_bytes,
    register,
    require,
    t,
    whole,
)

FLAG = TensorType("bool", ())
LOSS_SCALE, GROWTH = TensorType("f32", ()), TensorType("i32", ())


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    require(len(inputs) == 1, f"one input is required, got {len(inputs)}")
    require(inputs[0].is_float, f"real numbers are required, got {inputs[0]}")
    return (FLAG,)


def _evaluate(node: Node, x: np.ndarray) -> np.ndarray:
    return np.asarray(np.isfinite(x.astype(np.float64)).all())


def _lower(node: Node, args: Sequence[str]) -> str:
    """Of the least and the largest element, which one pass finds: NaN wins over both."""
    if not node.inputs[0].type.numel:
        return "torch.ones((), dtype=torch.bool, device=device)"
    return f"torch.isfinite(torch.stack(torch.aminmax({args[0]}))).all()"


register(
    OpDef(
        name="all_finite",
        infer=_infer,
        evaluate=_evaluate,
        vjp=NOT_DIFFERENTIABLE,
        cost=lambda node: Cost(2.0 * node.inputs[0].type.numel, node_bytes(node), "reduction"),
        axes=whole,
        lower=_lower,
        aten={},
        samples=(Sample((Arg(t(3, 4)),)), Sample((Arg(t(7, dtype="f32")),))),
    )
)


def inverse_scale(b: Builder, scale: Value) -> Value:
    """What gradients of the scaled loss are multiplied by, f32[]."""
    return cast(b, b.emit("reciprocal", cast(b, scale, "f64")), "f32")


def next_scale(
    b: Builder,
    scale: Value,
    growth: Value,
    finite: Value,
    *,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
) -> tuple[Value, Value]:
    """The scale of the next step, and the steps since it last changed.

    Args:
        scale: f32[].
        growth: i32[], steps since the scale last changed.
        finite: bool[], whether this step's gradients are finite.
    """
    count = b.emit("add_scalar", growth, value=1)
    due = b.emit("ge_scalar", count, value=growth_interval)
    larger = b.emit("mul_scalar", scale, value=float(growth_factor))
    grows = b.emit("logical_and", due, b.emit("all_finite", larger))
    kept = b.emit("where", grows, larger, scale)
    smaller = b.emit("mul_scalar", scale, value=float(backoff_factor))
    counts = b.emit("logical_and", finite, b.emit("logical_not", due))
    return b.emit("where", finite, kept, smaller), b.emit("where", counts, count, zeros_like(b, growth))
