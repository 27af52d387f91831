"""Losses of each element by itself, reduced by ``mean`` or ``sum``: squared, absolute, Huber, cross entropy, ...

The binary cross entropies are ops, because composed from logarithms their derivatives would be nan at
probabilities of 0 and 1, or lose all digits at large scores. The others are composed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import broadcast_together, cast, full, mul, neg, result_dtype, scale, sub
from daggc.ops.distance_loss import (
    import_cosine_embedding,
    import_multilabel_margin,
    import_triplet,
    pairwise_distance,
)
from daggc.ops.loss import MEAN, reduce_loss
from daggc.ops.opdef import (
    BY_DECOMPOSITION,
    Arg,
    OpDef,
    Sample,
    elementwise_cost,
    register,
    require,
    same_axes,
    t,
    upcast,
)


def _infer(*counts: int) -> Callable[[Sequence[TensorType], Attrs], tuple[TensorType, ...]]:
    def infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        require(len(inputs) in counts, f"{' or '.join(map(str, counts))} inputs are required, got {len(inputs)}")
        require(len(set(inputs)) == 1 and inputs[0].is_float, "inputs of one float type are required")
        return (inputs[0],)

    return infer


def _plus(b: Builder, x: Value, value: float) -> Value:
    return b.emit("add_scalar", x, value=value)


def _one_minus(b: Builder, x: Value) -> Value:
    return _plus(b, neg(b, x), 1.0)


# --- binary cross entropy -----------------------------------------------------------------------------


def _bce(node: Node, x: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Logarithms are at least -100, as in torch."""
    with np.errstate(divide="ignore"):
        return (target - 1) * np.maximum(np.log1p(-x), -100) - target * np.maximum(np.log(x), -100)


def _bce_backward(node: Node, ct: np.ndarray, x: np.ndarray, target: np.ndarray) -> np.ndarray:
    return ct * (x - target) / np.maximum((1 - x) * x, x.dtype.type(1e-12))


def _decompose_bce_backward(b: Builder, node: Node, ct: Value, x: Value, target: Value) -> tuple[Value, ...]:
    variance = b.emit("maximum_scalar", mul(b, _one_minus(b, x), x), value=1e-12)
    return (b.emit("div", mul(b, ct, sub(b, x, target)), variance),)


def _bce_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,), (x, target) = cts, node.inputs
    assert ct is not None
    log_odds = sub(b, b.emit("log", _one_minus(b, x)), b.emit("log", x))
    return b.emit("binary_cross_entropy_backward", ct, x, target), mul(b, ct, log_odds)


def _bce_logits(node: Node, x: np.ndarray, target: np.ndarray, *weights: np.ndarray) -> np.ndarray:
    log_sigmoid = -np.logaddexp(0, -x)
    if weights:
        log_sigmoid = log_sigmoid * ((weights[0] - 1) * target + 1)
    return (1 - target) * x - log_sigmoid


def _bce_logits_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    """In closed form: sigmoid(x) - target keeps its digits where log_sigmoid's slope would lose them."""
    (ct,), (x, target, *weights) = cts, node.inputs
    assert ct is not None
    sigmoid, log_sigmoid = b.emit("sigmoid", x), b.emit("log_sigmoid", x)
    if not weights:
        return mul(b, ct, sub(b, sigmoid, target)), neg(b, mul(b, ct, x))
    (weight,) = weights
    positive = mul(b, weight, target)
    slope = sub(b, mul(b, sub(b, _plus(b, positive, 1.0), target), sigmoid), positive)
    ct_target = neg(b, mul(b, ct, b.emit("add", x, mul(b, _plus(b, weight, -1.0), log_sigmoid))))
    return mul(b, ct, slope), ct_target, neg(b, mul(b, ct, mul(b, target, log_sigmoid)))


def _lower_bce_logits(node: Node, args: Sequence[str]) -> str:
    x, target, weight = (*args, "None")[:3]
    return f"torch.ops.aten.binary_cross_entropy_with_logits({x}, {target}, None, {weight}, 0)"


def _import_bce(b: Builder, x: Value, target: Value, weight: Value | None = None, reduction: int = MEAN) -> Value:
    x, target = broadcast_together(b, x, cast(b, target, x.type.dtype))
    return _finish(b, b.emit("binary_cross_entropy", x, target), weight, reduction)


def _import_bce_logits(
    b: Builder,
    x: Value,
    target: Value,
    weight: Value | None = None,
    pos_weight: Value | None = None,
    reduction: int = MEAN,
) -> Value:
    weights = [] if pos_weight is None else [cast(b, pos_weight, x.type.dtype)]
    operands = broadcast_together(b, x, cast(b, target, x.type.dtype), *weights)
    return _finish(b, b.emit("binary_cross_entropy_with_logits", *operands), weight, reduction)


def _finish(b: Builder, losses: Value, weight: Value | None, reduction: int) -> Value:
    if weight is not None:
        losses = mul(b, *broadcast_together(b, losses, cast(b, weight, losses.type.dtype)))
    return reduce_loss(b, losses, reduction)


# --- composed losses ----------------------------------------------------------------------------------


def _operands(b: Builder, *values: Value) -> tuple[Value, ...]:
    dtype = result_dtype(*values)
    return broadcast_together(b, *(cast(b, value, dtype) for value in values))


def _import_mse(b: Builder, x: Value, target: Value, reduction: int = MEAN) -> Value:
    return reduce_loss(b, b.emit("square", sub(b, *_operands(b, x, target))), reduction)


def _import_l1(b: Builder, x: Value, target: Value, reduction: int = MEAN) -> Value:
    return reduce_loss(b, b.emit("abs", sub(b, *_operands(b, x, target))), reduction)


def _import_smooth_l1(b: Builder, x: Value, target: Value, reduction: int = MEAN, beta: float = 1.0) -> Value:
    if beta == 0:
        return _import_l1(b, x, target, reduction)
    distance = b.emit("abs", sub(b, *_operands(b, x, target)))
    near = b.emit("div_scalar", scale(b, b.emit("square", distance), 0.5), value=float(beta))
    far = _plus(b, distance, -0.5 * beta)
    return reduce_loss(b, b.emit("where", b.emit("lt_scalar", distance, value=float(beta)), near, far), reduction)


def _import_huber(b: Builder, x: Value, target: Value, reduction: int = MEAN, delta: float = 1.0) -> Value:
    distance = b.emit("abs", sub(b, *_operands(b, x, target)))
    near = scale(b, b.emit("square", distance), 0.5)
    far = scale(b, _plus(b, distance, -0.5 * delta), float(delta))
    return reduce_loss(b, b.emit("where", b.emit("le_scalar", distance, value=float(delta)), near, far), reduction)


def _import_kl_div(b: Builder, x: Value, target: Value, reduction: int = MEAN, *, log_target: bool = False) -> Value:
    """``target (log target - x)``, where ``x`` and, with ``log_target``, the target are logarithms."""
    x, target = _operands(b, x, target)
    if log_target:
        losses = mul(b, b.emit("exp", target), sub(b, target, x))
    else:
        ones = full(b, 1.0, target.type.shape, target.type.dtype)
        positive = b.emit("where", b.emit("eq_scalar", target, value=0.0), ones, target)  # 0 log 0 is 0
        losses = sub(b, mul(b, target, b.emit("log", positive)), mul(b, target, x))
    return reduce_loss(b, losses, reduction)


def _import_poisson(
    b: Builder, x: Value, target: Value, log_input: bool, full: bool, eps: float, reduction: int
) -> Value:
    x, target = _operands(b, x, target)
    if log_input:
        losses = sub(b, b.emit("exp", x), mul(b, target, x))
    else:
        losses = sub(b, x, mul(b, target, b.emit("log", _plus(b, x, eps))))
    if full:  # Stirling's approximation of log target!, for targets above 1
        entropy = sub(b, mul(b, target, b.emit("log", target)), target)
        stirling = b.emit("add", entropy, scale(b, b.emit("log", scale(b, target, 2 * np.pi)), 0.5))
        large = b.emit("gt_scalar", target, value=1.0)
        losses = b.emit("add", losses, b.emit("where_scalar", large, stirling, value=0.0))
    return reduce_loss(b, losses, reduction)


def _import_soft_margin(b: Builder, x: Value, target: Value, reduction: int = MEAN) -> Value:
    """``log(1 + exp(u))`` with u = -target x, as ``max(u, 0) + log(1 + exp(-|u|))``: both derivatives keep digits."""
    u = neg(b, mul(b, *_operands(b, x, target)))
    below = b.emit("where", b.emit("gt_scalar", u, value=0.0), neg(b, u), u)
    losses = b.emit("add", b.emit("relu", u), b.emit("log1p", b.emit("exp", below)))
    return reduce_loss(b, losses, reduction)


def _import_hinge(b: Builder, x: Value, target: Value, margin: float = 1.0, reduction: int = MEAN) -> Value:
    x, target = _operands(b, x, target)
    near = b.emit("maximum_scalar", _plus(b, neg(b, x), float(margin)), value=0.0)
    negative = b.emit("where_scalar", b.emit("ne_scalar", target, value=1.0), near, value=0.0)
    positive = b.emit("where_scalar", b.emit("ne_scalar", target, value=-1.0), x, value=0.0)
    return reduce_loss(b, b.emit("add", negative, positive), reduction)


def _import_margin_ranking(
    b: Builder, first: Value, second: Value, target: Value, margin: float = 0.0, reduction: int = MEAN
) -> Value:
    first, second, target = _operands(b, first, second, target)
    losses = mul(b, neg(b, target), sub(b, first, second))
    losses = losses if margin == 0 else _plus(b, losses, float(margin))
    return reduce_loss(b, b.emit("maximum_scalar", losses, value=0.0), reduction)


_COMPOSED: dict[str, Callable[..., Any]] = {
    "mse_loss.default": _import_mse,
    "l1_loss.default": _import_l1,
    "smooth_l1_loss.default": _import_smooth_l1,
    "huber_loss.default": _import_huber,
    "kl_div.default": _import_kl_div,
    "poisson_nll_loss.default": _import_poisson,
    "soft_margin_loss.default": _import_soft_margin,
    "hinge_embedding_loss.default": _import_hinge,
    "margin_ranking_loss.default": _import_margin_ranking,
    "pairwise_distance.default": pairwise_distance,
    "triplet_margin_loss.default": import_triplet,
    "cosine_embedding_loss.default": import_cosine_embedding,
    "multilabel_margin_loss.default": import_multilabel_margin,
}


# --- the ops ------------------------------------------------------------------------------------------

_UNIT, _REAL = Arg(t(3, 4), "unit"), Arg(t(3, 4))

register(
    OpDef(
        name="binary_cross_entropy",
        infer=_infer(2),
        evaluate=upcast(_bce),
        vjp=_bce_vjp,
        cost=elementwise_cost(20),
        axes=same_axes,
        lower=lambda node, args: f"torch.ops.aten.binary_cross_entropy({', '.join(args)}, None, 0)",
        aten={"binary_cross_entropy.default": _import_bce, **_COMPOSED},
        samples=(Sample((_UNIT, _UNIT)),),
    )
)
register(
    OpDef(
        name="binary_cross_entropy_backward",
        infer=_infer(3),
        evaluate=upcast(_bce_backward),
        vjp=BY_DECOMPOSITION,
        cost=elementwise_cost(6),
        axes=same_axes,
        lower=lambda node, args: f"torch.ops.aten.binary_cross_entropy_backward({', '.join(args)}, None, 0)",
        aten={},
        samples=(Sample((_REAL, _UNIT, _UNIT)),),
        decompose=_decompose_bce_backward,
    )
)
register(
    OpDef(
        name="binary_cross_entropy_with_logits",
        infer=_infer(2, 3),
        evaluate=upcast(_bce_logits),
        vjp=_bce_logits_vjp,
        cost=elementwise_cost(20),
        axes=same_axes,
        lower=_lower_bce_logits,
        aten={"binary_cross_entropy_with_logits.default": _import_bce_logits},
        samples=(Sample((_REAL, _UNIT)), Sample((_REAL, _UNIT, Arg(t(3, 4), "positive")))),
    )
)
