"""Vector norms, with torch's derivatives where an element or the norm is zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ops.build import broadcast_together, cast, mul, promote_dtypes, scale, sub
from daggc.ops.opdef import sample, scalar, upcast
from daggc.ops.reduce import Dims, dim_args, reduce, reduction, spread


def _vector_norm(node: Node, x: np.ndarray) -> np.ndarray:
    order, size = node.attrs["ord"], np.abs(x)
    options = {"axis": node.attrs["dims"], "keepdims": node.attrs["keepdim"]}
    if order == math.inf:
        return np.max(size, **options)
    if order == -math.inf:
        return np.min(size, **options)
    if order == 0:
        return np.sum(size != 0, **options)
    return np.sum(size**order, **options) ** (1 / order)


def _vector_norm_vjp(b: Builder, node: Node, ct: Value) -> Value:
    """``ct x |x|**(p-2) / norm**(p-1)``, zero wherever x or the norm is; the extrema share among ties."""
    (x,), norm, order = node.inputs, node.output, node.attrs["ord"]
    if order == 0:
        return scale(b, x, 0.0)
    if order == 1:
        return mul(b, spread(b, node, ct), b.emit("sign", x))
    if math.isinf(order):
        size = b.emit("abs", x)
        winners = b.emit("eq", size, spread(b, node, norm))
        count = reduce(b, "sum", cast(b, winners, ct.type.dtype), node.attrs["dims"], node.attrs["keepdim"])
        share = b.emit("where_scalar", winners, spread(b, node, b.emit("div", ct, count)), value=0.0)
        return mul(b, share, b.emit("sign", x))
    occupied = b.emit("ne_scalar", norm, value=0)
    safe = b.emit("where_scalar", occupied, norm, value=1.0)
    powers = safe if order == 2 else b.emit("pow_scalar", safe, value=order - 1)
    share = spread(b, node, b.emit("where_scalar", occupied, b.emit("div", ct, powers), value=0.0))
    if order == 2:
        return mul(b, share, x)
    nonzero = b.emit("ne_scalar", x, value=0)
    size = b.emit("where_scalar", nonzero, b.emit("abs", x), value=1.0)
    slope = mul(b, b.emit("sign", x), b.emit("pow_scalar", size, value=order - 1))
    return mul(b, share, slope)


def _lower_vector_norm(node: Node, args: Sequence[str]) -> str:
    return f"torch.linalg.vector_norm({args[0]}, ord={scalar(node.attrs['ord'])}, {dim_args(node)})"


def vector_norm(
    b: Builder, x: Value, order: float | None = 2, dim: Dims = None, keepdim: bool = False, dtype: str | None = None
) -> Value:
    """The p-norm over some axes, or of all elements."""
    order = 2.0 if order is None else float(order)
    x = cast(b, x, dtype or x.type.dtype)
    return reduce(b, "vector_norm", b.emit("abs", x) if x.type.is_complex else x, dim, keepdim, ord=order)


def _import_vector_norm(
    b: Builder,
    x: Value,
    ord: float | None = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: str | None = None,
    **_: Any,
) -> Value:
    return vector_norm(b, x, ord, dim, keepdim, dtype)


def _import_dist(b: Builder, x: Value, y: Value, p: float = 2) -> Value:
    dtype = promote_dtypes(x.type.dtype, y.type.dtype)
    return vector_norm(b, sub(b, *broadcast_together(b, cast(b, x, dtype), cast(b, y, dtype))), p)


_NORM_OVERLOADS = ("norm.Scalar", "norm.ScalarOpt_dim", "norm.ScalarOpt_dim_dtype", "norm.ScalarOpt_dtype")
reduction(
    "vector_norm",
    upcast(_vector_norm),
    _vector_norm_vjp,
    {
        **dict.fromkeys(("linalg_vector_norm.default", *_NORM_OVERLOADS), _import_vector_norm),
        "frobenius_norm.dim": lambda b, x, dim, keepdim=False: vector_norm(b, x, 2, dim, keepdim),
        "dist.default": _import_dist,
    },
    lower=_lower_vector_norm,
    kinds="f",
    flops=2,
    samples=tuple(
        sample((3, 4), domain="nonzero", dims=dims, keepdim=keepdim, ord=order)
        for order, dims, keepdim in (
            (2.0, (1,), False),
            (2.0, (0, 1), False),
            (1.0, (1,), True),
            (3.0, (0,), False),
            (0.5, (1,), False),
            (math.inf, (1,), False),
        )
    ),
)
