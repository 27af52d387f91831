"""Scaled dot product attention as one op, so that fused kernels do it, and its backward.

    scores = q k^T scale (+ mask) (-inf above the diagonal if causal)     [.., T, S]
    logsumexp = log sum_s exp(scores)                                     [.., T], 0 for a row that is all -inf
    weights = exp(scores - logsumexp);  out = weights v                   [.., T, Dv]

The backward needs out and logsumexp of the forward, not the weights (FlashAttention, arXiv:2205.14135, section
3.1). A row whose scores are all -inf has no weights: its output and its cotangents are zero, as in torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import (
    broadcast,
    broadcast_shapes,
    cast,
    full,
    kind,
    mul,
    reshape,
    scale,
    sub,
    sum_dims,
    transpose,
)
from daggc.ops.opdef import (
    BY_DECOMPOSITION,
    Arg,
    Axes,
    Cost,
    OpDef,
    Sample,
    node_bytes,
    register,
    require,
    scalar,
    t,
    whole,
)
from daggc.ops.random import dropout

# --- type rules ---------------------------------------------------------------------------------------


def _statistics_dtype(q: TensorType) -> str:
    return "f64" if q.dtype == "f64" else "f32"


def _check(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, TensorType]:
    """Types of (out, logsumexp) for inputs (q, k, v[, mask])."""
    require(type(attrs["scale"]) is float and type(attrs["causal"]) is bool, "scale is a float and causal a bool")
    require(len(inputs) == 3 + attrs["has_mask"], "q, k, v and, if has_mask, a mask are required")
    q, k, v = inputs[:3]
    require(q.is_float and q.dtype == k.dtype == v.dtype, "q, k and v of one float dtype are required")
    require(q.rank >= 2 and q.rank == k.rank == v.rank, "q, k and v of one rank, at least 2, are required")
    require(q.shape[:-2] == k.shape[:-2] == v.shape[:-2], "q, k and v with the same leading axes are required")
    require(q.shape[-1] == k.shape[-1], f"q and k of one last axis are required, got {q.shape[-1]}, {k.shape[-1]}")
    require(k.shape[-2] == v.shape[-2], f"as many keys as values are required, got {k.shape[-2]}, {v.shape[-2]}")
    if attrs["has_mask"]:
        mask = inputs[3]
        require(mask.dtype in (q.dtype, "f32"), f"a mask of dtype {q.dtype} or f32 is required, got {mask.dtype}")
        scores = (*q.shape[:-1], k.shape[-2])
        fits = mask.rank == q.rank and all(m in (1, s) for m, s in zip(mask.shape, scores, strict=True))
        require(fits, f"a mask whose axes are those of the scores, {scores}, or 1 is required, got {mask.shape}")
    out = q.with_(shape=(*q.shape[:-1], v.shape[-1]))
    return out, TensorType(_statistics_dtype(q), q.shape[:-1])


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    return _check(inputs, attrs)


def _check_backward(inputs: Sequence[TensorType], attrs: Attrs) -> None:
    """Inputs are (ct of out, q, k, v[, mask], out, logsumexp)."""
    ct, *operands, out, logsumexp = inputs
    require((out, logsumexp) == _check(operands, attrs) and ct == out, "out, logsumexp and a cotangent of out")


def _infer_backward(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    _check_backward(inputs, attrs)
    return tuple(inputs[1:4])


def _infer_mask_grad(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    _check_backward(inputs, attrs)
    require(attrs["has_mask"], "a mask is required")
    q, k, mask = inputs[1], inputs[2], inputs[4]
    return (mask.with_(shape=(*q.shape[:-1], k.shape[-2])),)


def _axes(node: Node) -> Axes:
    """Leading axes pass through, and so does that of the queries unless causality ties it to the keys."""
    q = node.inputs[0].type
    lead: list[str | None] = [f"d{axis}" for axis in range(q.rank - 2)]
    rows = [None if node.attrs["causal"] else "t"]
    keys: list[str | None] = [None, None]
    labels = [(*lead, *rows, None), (*lead, *keys), (*lead, *keys)]
    if node.attrs["has_mask"]:
        sizes = zip(node.inputs[3].type.shape, (*lead, *rows), q.shape, strict=False)
        labels.append((*(label if size == own else None for size, label, own in sizes), None))
    return Axes(tuple(labels), ((*lead, *rows, None), (*lead, *rows)))


def _cost(products: int):
    """``products`` matrix products of [T, D] by [D, S] or [T, S] by [S, D]; a causal mask skips half of them."""

    def cost(node: Node) -> Cost:
        first = 0 if node.op == "attention" else 1
        q, k = node.inputs[first].type, node.inputs[first + 1].type
        flops = 2.0 * products * q.numel * k.shape[-2] * (0.5 if node.attrs["causal"] else 1)
        return Cost(flops, node_bytes(node), "attention")

    return cost


# --- meaning in NumPy ---------------------------------------------------------------------------------


def _widen(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == np.float64 else array.astype(np.float32)


def _scores(node: Node, q: np.ndarray, k: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    scores = (q @ k.swapaxes(-1, -2)) * q.dtype.type(node.attrs["scale"])
    if mask is not None:
        scores = scores + mask.astype(scores.dtype)
    if node.attrs["causal"]:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, scores.dtype.type(-np.inf))
    return scores


def _evaluate(node: Node, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    q, k, v, *masks = map(_widen, arrays)
    scores = _scores(node, q, k, masks[0] if masks else None)
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0, top)
    exponentials = np.exp(scores - top)
    total = exponentials.sum(axis=-1, keepdims=True)
    total = np.where(total == 0, 1, total)
    out = (exponentials / total) @ v
    logsumexp = (np.log(total) + top)[..., 0]
    return tuple(
        array.astype(value.type.numpy_dtype) for array, value in zip((out, logsumexp), node.outputs, strict=True)
    )


def _score_cotangent(node: Node, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """(cotangent of scores, weights, ct, q, k), all wide."""
    ct, q, k, v, *masks, out, logsumexp = map(_widen, arrays)
    weights = np.exp(_scores(node, q, k, masks[0] if masks else None) - logsumexp[..., None])
    delta = (ct * out).sum(axis=-1, keepdims=True)
    return weights * (ct @ v.swapaxes(-1, -2) - delta), weights, ct, q, k


def _evaluate_backward(node: Node, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    ct_scores, weights, ct, q, k = _score_cotangent(node, *arrays)
    ct_products = ct_scores * q.dtype.type(node.attrs["scale"])
    cts = (ct_products @ k, ct_products.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ ct)
    return tuple(array.astype(value.type.numpy_dtype) for array, value in zip(cts, node.outputs, strict=True))


def _evaluate_mask_grad(node: Node, *arrays: np.ndarray) -> np.ndarray:
    return _score_cotangent(node, *arrays)[0].astype(node.output.type.numpy_dtype)


# --- meaning as IR, and derivatives -------------------------------------------------------------------


def _scores_ir(b: Builder, attrs: Attrs, q: Value, k: Value, mask: Value | None) -> Value:
    scores = scale(b, b.emit("matmul", q, transpose(b, k)), attrs["scale"])
    if mask is not None:
        scores = b.emit("add", scores, broadcast(b, cast(b, mask, scores.type.dtype), scores.type.shape))
    return _causal_ir(b, scores) if attrs["causal"] else scores


def _causal_ir(b: Builder, scores: Value) -> Value:
    """-inf where the key comes after the query."""
    rows, columns = scores.type.shape[-2:]
    row = b.emit("iota", start=0, step=1, size=rows, dtype="i64")
    column = b.emit("iota", start=0, step=1, size=columns, dtype="i64")
    keep = b.emit(
        "ge", broadcast(b, reshape(b, row, (rows, 1)), (rows, columns)), broadcast(b, column, (rows, columns))
    )
    return b.emit("where_scalar", broadcast(b, keep, scores.type.shape), scores, value=-math.inf)


def _masked_softmax(b: Builder, scores: Value) -> tuple[Value, Value, Value]:
    """softmax along the last axis, 0 for rows that are all -inf; which rows are not; and each row's maximum."""
    last = scores.type.rank - 1
    if not scores.type.shape[last]:
        row = (*scores.type.shape[:last], 1)
        return scores, full(b, False, row, "bool"), full(b, 0.0, row, scores.type.dtype)
    top = b.emit("stop_gradient", b.emit("amax", scores, dims=(last,), keepdim=True))
    alive = b.emit("ne_scalar", top, value=-math.inf)
    kept = broadcast(b, alive, scores.type.shape)
    # Rows without a score become zeros first: the derivative of softmax at -inf would be nan.
    weights = b.emit("softmax", b.emit("where_scalar", kept, scores, value=0.0), dim=last)
    return b.emit("where_scalar", kept, weights, value=0.0), alive, b.emit("where_scalar", alive, top, value=0.0)


def _decompose(b: Builder, node: Node, *inputs: Value) -> tuple[Value, ...]:
    q, k, v, *masks = (cast(b, value, node.outputs[1].type.dtype) for value in inputs)
    scores = _scores_ir(b, node.attrs, q, k, masks[0] if masks else None)
    weights, alive, top = _masked_softmax(b, scores)
    out = b.emit("matmul", weights, v)
    exponentials = b.emit("exp", sub(b, scores, broadcast(b, top, scores.type.shape)))
    total = sum_dims(b, exponentials, (scores.type.rank - 1,), keepdim=True)
    total = b.emit("where", alive, total, full(b, 1.0, total.type.shape, total.type.dtype))
    logsumexp = b.emit("add", b.emit("log", total), top)
    return cast(b, out, inputs[0].type.dtype), reshape(b, logsumexp, node.outputs[1].type.shape)


def _score_cotangent_ir(b: Builder, attrs: Attrs, inputs: Sequence[Value], ct_logsumexp: Value | None = None):
    """(cotangent of scores, weights, ct, q, k) as IR, all of logsumexp's dtype.

    out and logsumexp are inputs like others here: what depends on q, k, v and the mask through them is added
    where their own node is differentiated.
    """
    ct, q, k, v, *masks, out, logsumexp = (cast(b, value, inputs[-1].type.dtype) for value in inputs)
    scores = _scores_ir(b, attrs, q, k, masks[0] if masks else None)

    def spread(x: Value) -> Value:
        return broadcast(b, reshape(b, x, (*logsumexp.type.shape, 1)), scores.type.shape)

    weights = b.emit("exp", sub(b, scores, spread(logsumexp)))
    # Where logsumexp is that of the scores up to its rounding, softmax has more digits: rows add up to 1.
    last = scores.type.rank - 1
    off = b.emit("abs", sub(b, b.emit("logsumexp", scores, dims=(last,), keepdim=False), logsumexp))
    rounding = 1e-10 if logsumexp.type.dtype == "f64" else 1e-5
    bound = b.emit("add_scalar", scale(b, b.emit("abs", logsumexp), rounding), value=rounding)
    weights = b.emit("where", spread(b.emit("le", off, bound)), _masked_softmax(b, scores)[0], weights)
    delta = sum_dims(b, mul(b, ct, out), (ct.type.rank - 1,))
    if ct_logsumexp is not None:
        delta = sub(b, delta, ct_logsumexp)
    ct_weights = b.emit("matmul", ct, transpose(b, v))
    return mul(b, weights, sub(b, ct_weights, spread(delta))), weights, ct, q, k


def _decompose_backward(b: Builder, node: Node, *inputs: Value, ct_logsumexp: Value | None = None) -> tuple[Value, ...]:
    ct_scores, weights, ct, q, k = _score_cotangent_ir(b, node.attrs, inputs, ct_logsumexp)
    ct_products = scale(b, ct_scores, node.attrs["scale"])
    cts = (
        b.emit("matmul", ct_products, k),
        b.emit("matmul", transpose(b, ct_products), q),
        b.emit("matmul", transpose(b, weights), ct),
    )
    return tuple(cast(b, value, inputs[1].type.dtype) for value in cts)


def _decompose_mask_grad(
    b: Builder, node: Node, *inputs: Value, ct_logsumexp: Value | None = None
) -> tuple[Value, ...]:
    ct_scores = _score_cotangent_ir(b, node.attrs, inputs, ct_logsumexp)[0]
    return (cast(b, ct_scores, inputs[4].type.dtype),)


def _vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    """The fused backward; the explicit one where logsumexp itself is differentiated (second derivatives)."""
    out, logsumexp = node.outputs
    ct, ct_logsumexp = cts
    if ct is None:
        ct = full(b, 0.0, out.type.shape, out.type.dtype)
    operands = (ct, *node.inputs, out, logsumexp)
    if ct_logsumexp is None:
        grads = b.emit_many("attention_backward", *operands, **node.attrs)
    else:
        grads = _decompose_backward(b, node, *operands, ct_logsumexp=ct_logsumexp)
    if not node.attrs["has_mask"]:
        return grads
    mask = node.inputs[3].type
    if ct_logsumexp is None:
        ct_mask = b.emit("attention_mask_grad", *operands, **node.attrs)  # dead, and removed, if the mask needs none
    else:
        (ct_mask,) = _decompose_mask_grad(b, node, *operands, ct_logsumexp=ct_logsumexp)
    spread = [axis for axis in range(mask.rank) if mask.shape[axis] != ct_mask.type.shape[axis]]
    return (*grads, sum_dims(b, ct_mask, spread, keepdim=True))


# --- importer -----------------------------------------------------------------------------------------


def _repeat_heads(b: Builder, x: Value, times: int) -> Value:
    """Each head ``times`` times in a row (``repeat_interleave`` along the third axis from the right)."""
    *lead, heads, length, depth = x.type.shape
    x = reshape(b, x, (*lead, heads, 1, length, depth))
    x = broadcast(b, x, (*lead, heads, times, length, depth))
    return reshape(b, x, (*lead, heads * times, length, depth))


def _additive(b: Builder, mask: Value, dtype: str, rank: int) -> Value:
    """A float mask of ``rank`` axes; False becomes -inf, True becomes 0."""
    mask = reshape(b, mask, (1,) * (rank - mask.type.rank) + mask.type.shape)
    if kind(mask.type.dtype) != "b":
        return mask
    return b.emit("where_scalar", mask, full(b, 0.0, mask.type.shape, dtype), value=-math.inf)


def _import_attention(
    b: Builder,
    q: Value,
    k: Value,
    v: Value,
    attn_mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """``scaled_dot_product_attention``; with dropout it is composed, because fused kernels draw their own noise."""
    factor = 1 / math.sqrt(q.type.shape[-1]) if scale is None else float(scale)
    if enable_gqa and q.type.rank > 2:
        heads = q.type.shape[-3]
        for name, x in (("key", k), ("value", v)):
            if heads % x.type.shape[-3]:
                raise TypeRuleError(f"{heads} query heads are no multiple of the {x.type.shape[-3]} heads of {name}")
        k, v = (x if x.type.shape[-3] == heads else _repeat_heads(b, x, heads // x.type.shape[-3]) for x in (k, v))
    masks = [] if attn_mask is None else [_additive(b, attn_mask, q.type.dtype, max(q.type.rank, attn_mask.type.rank))]
    lead = broadcast_shapes(*(x.type.shape[:-2] for x in (q, k, v, *masks)))
    q, k, v = (broadcast(b, x, (*lead, *x.type.shape[-2:])) for x in (q, k, v))
    masks = [reshape(b, m, (1,) * (len(lead) + 2 - m.type.rank) + m.type.shape) for m in masks]
    if dropout_p == 0:
        attrs = {"scale": factor, "causal": is_causal, "has_mask": bool(masks)}
        return b.emit_many("attention", q, k, v, *masks, **attrs)[0]
    attrs = Attrs({"scale": factor, "causal": is_causal})
    weights, _, _ = _masked_softmax(b, _scores_ir(b, attrs, q, k, masks[0] if masks else None))
    return b.emit("matmul", dropout(b, weights, dropout_p)[0], v)


# --- the ops ------------------------------------------------------------------------------------------


def _lower(node: Node, args: Sequence[str]) -> str:
    """``kernels.attention(q, k, v, mask or None, scale, causal)`` and the like."""
    attrs = node.attrs
    given = list(args)
    if not attrs["has_mask"]:
        given.insert(3 if node.op == "attention" else 4, "None")
    return f"kernels.{node.op}({', '.join(given)}, scale={scalar(attrs['scale'])}, causal={attrs['causal']})"


_CASES: tuple[tuple[tuple[tuple[int, ...], ...], bool], ...] = (
    (((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 5)), False),
    (((2, 3, 4, 5), (2, 3, 4, 5), (2, 3, 4, 5)), True),
    (((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 5), (2, 1, 4, 6)), False),
    (((2, 4, 5), (2, 6, 5), (2, 6, 3), (1, 4, 6)), False),
)


def _samples(backward: bool, masked_only: bool = False) -> tuple[Sample, ...]:
    samples = []
    for shapes, causal in _CASES:
        has_mask = len(shapes) == 4
        attrs = {"scale": 0.4, "causal": causal, "has_mask": has_mask}
        if masked_only and not has_mask:
            continue
        args = [Arg(t(*shape)) for shape in shapes]
        if backward:
            out = t(*shapes[0][:-1], shapes[2][-1])
            args = [Arg(out), *args, Arg(out), Arg(t(*shapes[0][:-1]), "positive")]
        samples.append(Sample(tuple(args), attrs))
    return tuple(samples)


register(
    OpDef(
        name="attention",
        infer=_infer,
        evaluate=_evaluate,
        vjp=_vjp,
        cost=_cost(2),
        axes=_axes,
        lower=_lower,
        aten={"scaled_dot_product_attention.default": _import_attention},
        samples=_samples(backward=False),
        decompose=_decompose,
    )
)
register(
    OpDef(
        name="attention_backward",
        infer=_infer_backward,
        evaluate=_evaluate_backward,
        vjp=BY_DECOMPOSITION,
        cost=_cost(5),
        axes=whole,
        lower=_lower,
        aten={},
        samples=_samples(backward=True),
        decompose=_decompose_backward,
    )
)
register(
    OpDef(
        name="attention_mask_grad",
        infer=_infer_mask_grad,
        evaluate=_evaluate_mask_grad,
        vjp=BY_DECOMPOSITION,
        cost=_cost(2),
        axes=whole,
        lower=_lower,
        aten={},
        samples=_samples(backward=True, masked_only=True),
        decompose=_decompose_mask_grad,
    )
)
