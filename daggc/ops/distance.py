"""Distances between the rows of two matrices, and what else is made of norms of differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import (
    add,
    broadcast,
    broadcast_shapes,
    broadcast_together,
    cast,
    full,
    mul,
    norm_dim,
    promote_dtypes,
    reshape,
    scale,
    sub,
    sum_dims,
    transpose,
    zeros_like,
)
from daggc.ops.concat import concat
from daggc.ops.matrices import REAL, batch_axes, constant_indices, widened
from daggc.ops.opdef import (
    BY_DECOMPOSITION,
    Arg,
    Cost,
    OpDef,
    Sample,
    node_bytes,
    register,
    require,
    sample,
    scalar,
    t,
)
from daggc.ops.shape import Cotangents
from daggc.ops.vector_norm import vector_norm

# --- cdist --------------------------------------------------------------------------------------------


def _distances_type(x: TensorType, y: TensorType, p: object) -> TensorType:
    require(x.dtype == y.dtype and x.dtype in REAL, f"one dtype of {', '.join(REAL)} is required, got {x} and {y}")
    require(x.rank == y.rank >= 2 and x.shape[:-2] == y.shape[:-2], f"equal batch axes are required: {x} and {y}")
    require(x.shape[-1] == y.shape[-1], f"rows of one size are required, got {x} and {y}")
    require(isinstance(p, float) and p >= 0, f"p must be a float of at least 0, got {p!r}")
    return x.with_(shape=(*x.shape[:-1], y.shape[-2]))


def _infer_cdist(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, y = inputs
    require(set(attrs) == {"p"}, "the attribute p is required")
    return (_distances_type(x, y, attrs["p"]),)


def _evaluate_cdist(node: Node, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    p = node.attrs["p"]
    gaps = np.abs(widened(x)[..., :, None, :] - widened(y)[..., None, :, :])
    if p == 0:
        result = (gaps != 0).sum(-1)
    elif p == math.inf:
        result = np.fmax.reduce(gaps, axis=-1, initial=0)  # torch's maximum passes over nan
    else:
        result = (gaps**p).sum(-1) ** (1 / p)
    return result.astype(x.dtype)


def _cdist_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    (ct,), (x, y), p = cts, node.inputs, node.attrs["p"]
    assert ct is not None
    if p == 0:
        return zeros_like(b, x), zeros_like(b, y)
    x_ct = b.emit("cdist_backward", ct, x, y, node.output, p=p)
    return x_ct, b.emit("cdist_backward", transpose(b, ct), y, x, transpose(b, node.output), p=p)


def _cdist_cost(node: Node) -> Cost:
    x, y = node.inputs[-3:-1] if len(node.inputs) == 4 else node.inputs
    return Cost(4 * x.type.numel * y.type.shape[-2], node_bytes(node), "reduction")


def cdist(b: Builder, x: Value, y: Value, p: float = 2.0, compute_mode: int | None = None) -> Value:
    """torch.cdist: Euclidean distances of many rows (or for mode 1) come from a product of matrices."""
    batch = broadcast_shapes(x.type.shape[:-2], y.type.shape[:-2])
    x = broadcast(b, x, (*batch, *x.type.shape[-2:]))
    y = broadcast(b, y, (*batch, *y.type.shape[-2:]))
    many = max(x.type.shape[-2], y.type.shape[-2]) > 25
    if p == 2 and (compute_mode == 1 or (many and compute_mode in (None, 0))) and x.type.numel and y.type.numel:
        return _euclidean(b, x, y)
    return b.emit("cdist", x, y, p=float(p))


def _euclidean(b: Builder, x: Value, y: Value) -> Value:
    """``sqrt(|x|^2 + |y|^2 - 2 x y^T)``, the sum being part of the product, as torch computes it."""
    last = x.type.rank - 1
    x_size, y_size = (sum_dims(b, mul(b, value, value), (last,), keepdim=True) for value in (x, y))
    left = concat(b, (scale(b, x, -2.0), x_size, full(b, 1.0, x_size.type.shape, x.type.dtype)), last)
    right = concat(b, (y, full(b, 1.0, y_size.type.shape, y.type.dtype), y_size), last)
    squares = b.emit("matmul", left, transpose(b, right))
    squares = b.emit("maximum_scalar", squares, value=0.0)
    apart = b.emit("ne_scalar", squares, value=0.0)  # elsewhere, the derivative is 0
    return b.emit("where_scalar", apart, b.emit("sqrt", b.emit("where_scalar", apart, squares, value=1.0)), value=0.0)


def _import_pdist(b: Builder, x: Value, p: float = 2.0) -> Value:
    """The upper triangle of the distances of all rows."""
    count = x.type.shape[0]
    rows, columns = np.triu_indices(count, 1)
    distances = reshape(b, cdist(b, x, x, p, compute_mode=2), (count * count,))
    return b.emit("index_select", distances, constant_indices(b, rows * count + columns), dim=0)


register(
    OpDef(
        name="cdist",
        infer=_infer_cdist,
        evaluate=_evaluate_cdist,
        vjp=_cdist_vjp,
        cost=_cdist_cost,
        axes=batch_axes(2, 2, 2),
        lower=lambda node, args: (
            f"torch.cdist({args[0]}, {args[1]}, {scalar(node.attrs['p'])}, 'donot_use_mm_for_euclid_dist')"
        ),
        aten={
            "cdist.default": cdist,
            "_cdist_forward.default": cdist,
            "_euclidean_dist.default": lambda b, x, y: cdist(b, x, y, 2.0, 1),
            **dict.fromkeys(("pdist.default", "_pdist_forward.default"), _import_pdist),
        },
        samples=tuple(sample((2, 3, 4), (2, 2, 4), p=p) for p in (2.0, 1.0, math.inf, 3.0)),
    )
)


def _infer_backward(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    ct, x, y, distances = inputs
    require(set(attrs) == {"p"} and attrs["p"] != 0, "a p other than 0 is required")
    wanted = _distances_type(x, y, attrs["p"])
    require(ct == distances == wanted, f"cotangent and distances of type {wanted} are required: {ct}, {distances}")
    return (x,)


def _decompose_backward(b: Builder, node: Node, ct: Value, x: Value, y: Value, distances: Value) -> tuple[Value, ...]:
    """``sum_j ct |x - y|^(p-1) sign(x - y) / distance^(p-1)``; zero where a distance is. All extrema of p=inf count."""
    p, rank = node.attrs["p"], x.type.rank
    lead, (rows, size), columns = x.type.shape[:-2], x.type.shape[-2:], y.type.shape[-2]
    shape = (*lead, rows, columns, size)
    left = broadcast(b, reshape(b, x, (*lead, rows, 1, size)), shape)
    gaps = sub(b, left, broadcast(b, reshape(b, y, (*lead, 1, columns, size)), shape))

    def spread(value: Value) -> Value:
        return broadcast(b, reshape(b, value, (*lead, rows, columns, 1)), shape)

    if p == 1:
        terms = _nan_where(b, gaps, mul(b, spread(ct), b.emit("sign", gaps)))
    elif p == math.inf:
        winners = b.emit("eq", b.emit("abs", gaps), spread(distances))
        terms = b.emit("where_scalar", winners, mul(b, spread(ct), b.emit("sign", gaps)), value=0.0)
        terms = _nan_where(b, sub(b, b.emit("abs", gaps), spread(distances)), terms)
    else:
        apart = b.emit("ne_scalar", distances, value=0.0)
        safe = b.emit("where_scalar", apart, distances, value=1.0)
        powers = safe if p == 2 else b.emit("pow_scalar", safe, value=p - 1)
        share = spread(b.emit("where_scalar", apart, b.emit("div", ct, powers), value=0.0))
        terms = mul(b, share, gaps if p == 2 else _signed_power(b, gaps, p - 1))
    return (sum_dims(b, terms, (rank - 1,)),)


def _nan_where(b: Builder, x: Value, terms: Value) -> Value:
    """nan where x is nan, whose sign is 0, as in torch."""
    return b.emit("where_scalar", b.emit("logical_not", b.emit("isnan", x)), terms, value=math.nan)


def _signed_power(b: Builder, x: Value, power: float) -> Value:
    """``sign(x) |x|^power``, with derivative 0 at 0."""
    size = b.emit("where_scalar", b.emit("ne_scalar", x, value=0.0), b.emit("abs", x), value=1.0)
    return mul(b, b.emit("sign", x), b.emit("pow_scalar", size, value=power))


register(
    OpDef(
        name="cdist_backward",
        infer=_infer_backward,
        evaluate=BY_DECOMPOSITION,
        vjp=BY_DECOMPOSITION,
        cost=_cdist_cost,
        axes=batch_axes(2, 2, 2, 2, 2),
        lower=lambda node, args: f"kernels.cdist_backward({', '.join(args)}, {scalar(node.attrs['p'])})",
        aten={
            "_cdist_backward.default": lambda b, ct, x, y, p, distances: b.emit(
                "cdist_backward", ct, x, y, distances, p=float(p)
            )
        },
        samples=tuple(
            Sample((Arg(t(2, 3, 2)), Arg(t(2, 3, 4)), Arg(t(2, 2, 4)), Arg(t(2, 3, 2), "positive")), {"p": p})
            for p in (2.0, 1.0, 3.0)
        ),
        decompose=_decompose_backward,
    )
)

# --- of pairs of vectors: importers -------------------------------------------------------------------


def promoted(b: Builder, x: Value, y: Value) -> tuple[Value, ...]:
    """Two tensors of one dtype and shape."""
    dtype = promote_dtypes(x.type.dtype, y.type.dtype)
    return broadcast_together(b, cast(b, x, dtype), cast(b, y, dtype))


def import_cosine_similarity(b: Builder, x: Value, y: Value, dim: int = 1, eps: float = 1e-8) -> Value:
    """Norms are at least eps, of which the derivative takes no notice, as in torch."""
    x, y = promoted(b, x, y)
    dim = norm_dim(dim, x.type.rank)
    units = []
    for value in (x, y):
        norm = vector_norm(b, value, 2, (dim,), keepdim=True)
        lift = b.emit("stop_gradient", sub(b, b.emit("maximum_scalar", norm, value=float(eps)), norm))
        units.append(b.emit("div", value, broadcast(b, add(b, norm, lift), value.type.shape)))
    return sum_dims(b, mul(b, *units), (dim,))


def import_renorm(b: Builder, x: Value, p: float, dim: int, maxnorm: float) -> Value:
    """Each slice along ``dim`` of a norm above ``maxnorm`` is scaled down to it."""
    dim = norm_dim(dim, x.type.rank)
    norm = vector_norm(b, x, p, [axis for axis in range(x.type.rank) if axis != dim], keepdim=True)
    factor = b.emit("rdiv_scalar", b.emit("add_scalar", norm, value=1e-7), value=float(maxnorm))
    factor = b.emit("where_scalar", b.emit("gt_scalar", norm, value=float(maxnorm)), factor, value=1.0)
    return mul(b, x, broadcast(b, factor, x.type.shape))
