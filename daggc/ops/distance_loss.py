"""Losses of distances between vectors and of margins between classes, composed of simpler ops."""

from __future__ import annotations

from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ops.build import (
    add,
    broadcast,
    broadcast_together,
    cast,
    full,
    mul,
    neg,
    reshape,
    result_dtype,
    sub,
    sum_dims,
)
from daggc.ops.loss import MEAN, reduce_loss
from daggc.ops.vector_norm import vector_norm


def _operands(b: Builder, *values: Value) -> tuple[Value, ...]:
    dtype = result_dtype(*values)
    return broadcast_together(b, *(cast(b, value, dtype) for value in values))


def _plus(b: Builder, x: Value, value: float) -> Value:
    return x if value == 0 else b.emit("add_scalar", x, value=float(value))


def pairwise_distance(b: Builder, x: Value, y: Value, p: float = 2, eps: float = 1e-6, keepdim: bool = False) -> Value:
    """``|x - y + eps|`` along the last axis."""
    return vector_norm(b, _plus(b, sub(b, *_operands(b, x, y)), eps), p, -1, keepdim)


def import_triplet(
    b: Builder,
    anchor: Value,
    positive: Value,
    negative: Value,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    reduction: int = MEAN,
) -> Value:
    near = pairwise_distance(b, anchor, positive, p, eps)
    far = pairwise_distance(b, anchor, negative, p, eps)
    if swap:
        far = b.emit("minimum", *broadcast_together(b, far, pairwise_distance(b, positive, negative, p, eps)))
    losses = sub(b, *broadcast_together(b, _plus(b, near, margin), far))
    return reduce_loss(b, b.emit("maximum_scalar", losses, value=0.0), reduction)


def import_cosine_embedding(
    b: Builder, first: Value, second: Value, target: Value, margin: float = 0.0, reduction: int = MEAN
) -> Value:
    """1 - cos where the target is 1, max(0, cos - margin) where it is -1, else 0."""
    first, second = _operands(b, first, second)
    axis = (first.type.rank - 1,)
    squares = [_plus(b, sum_dims(b, mul(b, x, x), axis), 1e-12) for x in (first, second)]
    cosine = b.emit("div", sum_dims(b, mul(b, first, second), axis), b.emit("sqrt", mul(b, *squares)))
    away = b.emit("maximum_scalar", _plus(b, cosine, -margin), value=0.0)
    cosine, away, target = broadcast_together(b, cosine, away, target)
    together, apart = (_equals(b, target, label) for label in (1, -1))
    near = b.emit("where_scalar", together, _plus(b, neg(b, cosine), 1.0), value=0.0)
    return reduce_loss(b, add(b, near, b.emit("where_scalar", apart, away, value=0.0)), reduction)


def _equals(b: Builder, x: Value, value: int) -> Value:
    return b.emit("eq_scalar", x, value=float(value) if x.type.is_float else value)


def import_multilabel_margin(b: Builder, x: Value, target: Value, reduction: int = MEAN) -> Value:
    """``sum of max(0, 1 - (x_y - x_i)) / C`` over labels y (those before the first -1) and classes i that are none."""
    lead = x.type.shape[:-1]
    x, target = (reshape(b, value, (1, 1, *value.type.shape)[-2:]) for value in (x, target))
    (rows, classes), dtype = x.type.shape, x.type.dtype
    ended = b.emit("cumsum", cast(b, b.emit("lt_scalar", target, value=0), "i64"), dim=1)
    valid = b.emit("eq_scalar", ended, value=0)
    labels = b.emit("where_scalar", valid, target, value=0)
    counts = b.emit("scatter_add", full(b, 0.0, x.type.shape, dtype), labels, cast(b, valid, dtype), dim=1)
    others = b.emit("eq_scalar", counts, value=0.0)
    cube = (rows, classes, classes)  # of row, label, class

    def along(value: Value, axis: int) -> Value:
        return broadcast(b, reshape(b, value, (rows, classes, 1) if axis == 1 else (rows, 1, classes)), cube)

    chosen = b.emit("gather", x, labels, dim=1)
    losses = b.emit("relu", add(b, _plus(b, neg(b, along(chosen, 1)), 1.0), along(x, 2)))
    counted = b.emit("logical_and", along(valid, 1), along(others, 2))
    losses = sum_dims(b, b.emit("where_scalar", counted, losses, value=0.0), (1, 2))
    losses = b.emit("div_scalar", losses, value=float(classes))
    return reduce_loss(b, reshape(b, losses, lead), reduction)
