"""Losses on classes: ``nll_loss`` as an op, cross entropy as log_softmax and ``nll_loss``.

The mean is written as ``div(sum of losses, count)``, where the count is computed from the target (and the
class weights) alone, so that a batch cut into microbatches can divide by the count of the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import broadcast, cast, full, mul, neg, permute, reshape, scale, sum_dims
from daggc.ops.indexing import require_room
from daggc.ops.opdef import (
    Arg,
    Axes,
    OpDef,
    Sample,
    reduction_cost,
    register,
    require,
    t,
    upcast,
)
from daggc.ops.softmax import log_softmax

NONE, MEAN, SUM = 0, 1, 2  # ATen's numbers of reductions
_HALF = ("f16", "bf16")


# --- nll_loss and its adjoint -------------------------------------------------------------------------


def _check_target(target: TensorType, weights: Sequence[TensorType], dtype: str, classes: int, attrs: Attrs) -> None:
    require(target.dtype in ("i64", "u8") and target.rank == 1, f"a target i64[N] is required, got {target}")
    require_room(target, classes)
    require(len(weights) <= 1, "at most one tensor of class weights is required")
    for weight in weights:
        require(weight == TensorType(dtype, (classes,)), f"class weights {dtype}[{classes}] are required, got {weight}")
    require(attrs["reduction"] in ("none", "sum"), f"reduction is none or sum, got {attrs['reduction']!r}")
    require(type(attrs["ignore_index"]) is int, "ignore_index is an int")


def _result(logp: TensorType, target: TensorType, attrs: Attrs) -> TensorType:
    return logp.with_(shape=target.shape if attrs["reduction"] == "none" else ())


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    logp, target, *weights = inputs
    require(logp.is_float and logp.rank == 2, f"log probabilities [N, C] are required, got {logp}")
    require(target.shape == logp.shape[:1], f"a target for each of {logp.shape[0]} rows is required, got {target}")
    _check_target(target, weights, logp.dtype, logp.shape[1], attrs)
    return (_result(logp, target, attrs),)


def _infer_backward(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    ct, target, *weights = inputs
    require(ct.is_float, f"a float cotangent is required, got {ct}")
    _check_target(target, weights, ct.dtype, attrs["classes"], attrs)
    logp = ct.with_(shape=(*target.shape, attrs["classes"]))
    require(ct == _result(logp, target, attrs), f"a cotangent of the loss is required, got {ct}")
    return (logp,)


def _picked(node: Node, target: np.ndarray, dtype: np.dtype, weights: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """(which rows count; their class, 0 where ignored; its weight)."""
    kept = target != node.attrs["ignore_index"]
    classes = np.where(kept, target, 0).astype(np.int64)
    return kept, classes, weights[0][classes] if weights else np.ones(target.shape, dtype)


def _evaluate(node: Node, logp: np.ndarray, target: np.ndarray, *weights: np.ndarray) -> np.ndarray:
    kept, classes, weight = _picked(node, target, logp.dtype, weights)
    losses = np.where(kept, -logp[np.arange(len(classes)), classes] * weight, 0)
    return losses.sum() if node.attrs["reduction"] == "sum" else losses


def _evaluate_backward(node: Node, ct: np.ndarray, target: np.ndarray, *weights: np.ndarray) -> np.ndarray:
    kept, classes, weight = _picked(node, target, ct.dtype, weights)
    result = np.zeros(node.output.type.shape, ct.dtype)
    result[np.arange(len(classes)), classes] = np.where(kept, -ct * weight, 0)
    return result


def _vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,), (logp, target, *weights) = cts, node.inputs
    assert ct is not None
    attrs = {**node.attrs, "classes": logp.type.shape[1]}
    ct_logp = b.emit("nll_loss_backward", ct, target, *weights, **attrs)
    return (ct_logp, None, *(_weight_cotangent(b, ct, target, logp, attrs) for _ in weights))


def _vjp_backward(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    """The loss is linear in log probabilities, so the backward's adjoint is the loss itself."""
    (ct,), (ct_loss, target, *weights) = cts, node.inputs
    assert ct is not None
    attrs = {name: value for name, value in node.attrs.items() if name != "classes"}
    adjoint = b.emit("nll_loss", ct, target, *weights, **attrs)
    return (adjoint, None, *(_weight_cotangent(b, ct_loss, target, ct, node.attrs) for _ in weights))


def _weight_cotangent(b: Builder, ct: Value, target: Value, logp: Value, attrs: Mapping[str, Attr]) -> Value:
    """The cotangent of the class weights [C]; torch has none, and it is dead where nothing asks for it."""
    unweighted = b.emit("nll_loss_backward", ct, target, **attrs)
    return sum_dims(b, mul(b, unweighted, logp), (0,))


def _axes(node: Node) -> Axes:
    """Rows are independent; ``sum`` adds them up."""
    each = node.attrs["reduction"] == "none"
    weights = ((None,),) * (len(node.inputs) - 2)
    return Axes((("n", None), ("n",), *weights), (("n",) if each else (),), {} if each else {"n": "sum"})


def _axes_backward(node: Node) -> Axes:
    weights = ((None,),) * (len(node.inputs) - 2)
    ct = ("n",) if node.attrs["reduction"] == "none" else ()
    return Axes((ct, ("n",), *weights), (("n", None),))


def _lower(node: Node, args: Sequence[str]) -> str:
    logp, target, weight = (*args, "None")[:3]
    attrs = node.attrs
    return (
        f"torch.nn.functional.nll_loss({logp}, {target}, {weight}, "
        f'ignore_index={attrs["ignore_index"]}, reduction="{attrs["reduction"]}")'
    )


def _lower_backward(node: Node, args: Sequence[str]) -> str:
    ct, target, weight = (*args, "None")[:3]
    attrs = node.attrs
    reduction = SUM if attrs["reduction"] == "sum" else NONE
    return (
        f"kernels.nll_loss_backward({ct}, {target}, {weight}, {attrs['classes']}, {reduction}, {attrs['ignore_index']})"
    )


# --- importers ----------------------------------------------------------------------------------------


def _rows(b: Builder, x: Value) -> Value:
    """[C], [N, C] or [N, C, d1, ...] as [rows, C]."""
    if x.type.rank == 1:
        return reshape(b, x, (1, *x.type.shape))
    x = permute(b, x, (0, *range(2, x.type.rank), 1))
    classes = x.type.shape[-1]
    return reshape(b, x, (x.type.numel // max(classes, 1), classes))


def _count(b: Builder, target: Value, weight: Value | None, ignore_index: int, dtype: str) -> Value:
    """The number of rows that count, or the sum of their class weights; from the target [N] alone."""
    kept = b.emit("ne_scalar", target, value=ignore_index)
    if weight is None:
        return sum_dims(b, cast(b, kept, dtype), (0,))
    picked = _class_weights(b, target, weight, kept, dtype)
    return sum_dims(b, b.emit("where_scalar", kept, picked, value=0.0), (0,))


def _class_weights(b: Builder, target: Value, weight: Value, kept: Value, dtype: str) -> Value:
    """The weight of each row's class."""
    classes = b.emit("where_scalar", kept, cast(b, target, "i64"), value=0)
    return b.emit("gather", cast(b, weight, dtype), classes, dim=0)


def _nll(
    b: Builder, logp: Value, target: Value, weight: Value | None, reduction: int, ignore_index: int
) -> tuple[Value, Value]:
    """(loss, total weight) of log probabilities with classes along axis 1."""
    shape, dtype = target.type.shape, logp.type.dtype
    if logp.type.shape[:1] + logp.type.shape[2:] != shape and not (logp.type.rank == 1 and shape == ()):
        raise TypeRuleError(f"a target of the shape of {logp.type} without its class axis is required, got {shape}")
    rows, target = _rows(b, logp), reshape(b, target, (target.type.numel,))
    constants = (target,) if weight is None else (target, weight)
    # 16-bit losses are added and counted in f32: a count above 256 is not exact in bf16.
    wide = "f32" if dtype in _HALF else dtype
    one_kernel = reduction != NONE and wide == dtype
    loss = b.emit("nll_loss", rows, *constants, reduction="sum" if one_kernel else "none", ignore_index=ignore_index)
    if reduction == NONE:
        return reshape(b, loss, shape), full(b, 0.0, (), dtype)
    count = _count(b, target, weight, ignore_index, wide)
    loss = loss if one_kernel else sum_dims(b, cast(b, loss, wide), (0,))
    return cast(b, b.emit("div", loss, count) if reduction == MEAN else loss, dtype), cast(b, count, dtype)


def _import_nll(
    b: Builder,
    logp: Value,
    target: Value,
    weight: Value | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
) -> Value:
    return _nll(b, logp, target, weight, reduction, ignore_index)[0]


def _import_cross_entropy(
    b: Builder,
    x: Value,
    target: Value,
    weight: Value | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    **_: Any,
) -> Value:
    """``cross_entropy_loss`` of scores [C], [N, C] or [N, C, d1, ...], and classes or probabilities."""
    axis = min(1, x.type.rank - 1)
    logp = log_softmax(b, x, axis)
    if target.type.is_float:
        if target.type.shape != x.type.shape:
            raise TypeRuleError(f"probabilities of the shape of the scores, {x.type}, are required, got {target.type}")
        return _soft_targets(b, logp, target, weight, axis, reduction, label_smoothing)
    loss = _import_nll(b, logp, target, weight, reduction, ignore_index)
    if label_smoothing == 0:
        return loss
    smooth = _smooth_loss(b, logp, target, weight, axis, reduction, ignore_index)
    smooth = scale(b, smooth, label_smoothing / x.type.shape[axis])
    return b.emit("add", smooth, scale(b, loss, 1 - label_smoothing))


def _smooth_loss(
    b: Builder, logp: Value, target: Value, weight: Value | None, axis: int, reduction: int, ignore_index: int
) -> Value:
    """The loss under equal probabilities: minus the sum of all classes' log probabilities."""
    dtype = logp.type.dtype
    losses = neg(b, sum_dims(b, _weighted(b, logp, weight, axis), (axis,)))
    losses = b.emit("where_scalar", b.emit("ne_scalar", target, value=ignore_index), losses, value=0.0)
    if reduction == NONE:
        return losses
    wide = "f32" if dtype in _HALF else dtype
    total = sum_dims(b, cast(b, losses, wide), tuple(range(losses.type.rank)))
    if reduction == MEAN:
        rows = reshape(b, target, (target.type.numel,))
        total = b.emit("div", total, _count(b, rows, weight, ignore_index, wide))
    return cast(b, total, dtype)


def _soft_targets(
    b: Builder,
    logp: Value,
    target: Value,
    weight: Value | None,
    axis: int,
    reduction: int,
    label_smoothing: float,
) -> Value:
    """Targets that are probabilities; the mean is over samples, whatever the class weights."""
    if label_smoothing:
        smoothed = scale(b, target, 1 - label_smoothing)
        target = b.emit("add_scalar", smoothed, value=label_smoothing / logp.type.shape[axis])
    products = _weighted(b, mul(b, logp, cast(b, target, logp.type.dtype)), weight, axis)
    return reduce_loss(b, neg(b, sum_dims(b, products, (axis,))), reduction)


def _weighted(b: Builder, x: Value, weight: Value | None, axis: int) -> Value:
    """``x`` times the weight of each class."""
    if weight is None:
        return x
    shape = tuple(size if dim == axis else 1 for dim, size in enumerate(x.type.shape))
    return mul(b, x, broadcast(b, reshape(b, cast(b, weight, x.type.dtype), shape), x.type.shape))


def reduce_loss(b: Builder, losses: Value, reduction: int) -> Value:
    """The mean or sum of all elements, or the losses themselves."""
    if reduction == NONE or losses.type.rank == 0:
        return losses
    name = "mean" if reduction == MEAN else "sum"
    return b.emit(name, losses, dims=tuple(range(losses.type.rank)), keepdim=False)


def _samples(backward: bool) -> tuple[Sample, ...]:
    samples = []
    for reduction in ("sum", "none"):
        for weighted in (False, True):
            args = [Arg(t(4, dtype="i64"), "index:3"), *([Arg(t(3), "positive")] if weighted else [])]
            attrs = {"reduction": reduction, "ignore_index": 1 if weighted else -100}
            if backward:
                args.insert(0, Arg(t() if reduction == "sum" else t(4)))
                attrs["classes"] = 3
            else:
                args.insert(0, Arg(t(4, 3)))
            samples.append(Sample(tuple(args), attrs))
    return tuple(samples)


register(
    OpDef(
        name="nll_loss",
        infer=_infer,
        evaluate=upcast(_evaluate),
        vjp=_vjp,
        cost=reduction_cost(1),
        axes=_axes,
        lower=_lower,
        aten={
            "nll_loss.default": _import_nll,
            "nll_loss_nd.default": _import_nll,
            "nll_loss2d.default": _import_nll,
            "nll_loss_forward.default": _nll,
            "nll_loss2d_forward.default": _nll,
            "cross_entropy_loss.default": _import_cross_entropy,
        },
        samples=_samples(backward=False),
    )
)
register(
    OpDef(
        name="nll_loss_backward",
        infer=_infer_backward,
        evaluate=upcast(_evaluate_backward),
        vjp=_vjp_backward,
        cost=reduction_cost(1),
        axes=_axes_backward,
        lower=_lower_backward,
        aten={},
        samples=_samples(backward=True),
    )
)
