"""Orthogonal factors: QR, and Householder reflectors as LAPACK keeps them.

A product of k reflectors ``H_1 ... H_k``, ``H_i = I - tau_i v_i v_i^H``, is ``I - V (I + D S)^-1 D V^H`` with
``D = diag(tau)`` and S the strictly upper part of ``V^H V`` (the UT transform; Joffrain et al. 2006): a triangular
system in place of k steps, and differentiable as such.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from daggc.errors import DifferentiationError, located
from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import add, conj, neg, sub
from daggc.ops.matrices import (
    adjoint,
    batch_axes,
    columns_times,
    cubic_cost,
    eye,
    half_diagonal,
    lapack,
    left_columns,
    matmul,
    per_matrix,
    require_flags,
    require_matrices,
    rows_times,
    top_rows,
    total,
    triangle,
    widened,
    zeros,
)
from daggc.ops.opdef import AS_IT_IS, BY_DECOMPOSITION, NOT_DIFFERENTIABLE, Arg, OpDef, Sample, register, require, t
from daggc.ops.shape import Cotangents
from daggc.ops.slicing import pad_dim
from daggc.ops.solve import solve_triangular

# --- qr -----------------------------------------------------------------------------------------------


def _infer_qr(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,), mode = inputs, attrs["mode"]
    require_matrices(x)
    require(mode in ("reduced", "complete"), f"mode must be reduced or complete, got {mode!r}")
    *lead, rows, columns = x.shape
    inner = rows if mode == "complete" else min(rows, columns)
    return x.with_(shape=(*lead, rows, inner)), x.with_(shape=(*lead, inner, columns))


def _evaluate_qr(node: Node, x: np.ndarray) -> tuple[np.ndarray, ...]:
    q_type, r_type = (value.type for value in node.outputs)
    if not x.size:
        eye = np.eye(*q_type.shape[-2:], dtype=x.dtype)
        return np.broadcast_to(eye, q_type.shape).copy(), np.zeros(r_type.shape, x.dtype)
    q, r = np.linalg.qr(widened(x), mode=node.attrs["mode"])
    return q.astype(x.dtype), r.astype(x.dtype)


def _qr_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """Roberts and Roberts 2020; for a wide matrix Q comes from its left square part."""
    (q_ct, r_ct), (q, r) = cts, node.outputs
    rows, columns = q.type.shape[-2], r.type.shape[-1]
    if node.attrs["mode"] == "complete" and rows > columns:
        message = "the complete QR of a matrix of more rows than columns has no derivative: use mode='reduced'"
        raise DifferentiationError(located(message, node.path, node.source))
    from_r = None if r_ct is None else matmul(b, r_ct, adjoint(b, r))
    from_q = None if q_ct is None else neg(b, matmul(b, adjoint(b, q), q_ct))
    inner = total(b, (from_r, from_q))
    if inner is None:
        return (None,)
    if rows >= columns:
        inner = triangle(b, inner, True)
        inner = half_diagonal(b, add(b, inner, adjoint(b, inner)))
        right = total(b, (matmul(b, q, inner), q_ct))
        assert right is not None
        return (solve_triangular(b, adjoint(b, r), right, upper=False, left=False),)
    inner = triangle(b, sub(b, adjoint(b, inner), inner), False)
    inner = half_diagonal(b, inner) if inner.type.is_complex else inner  # of real matrices, it is zero
    square = left_columns(b, r, rows)
    result = solve_triangular(b, adjoint(b, square), matmul(b, q, inner), upper=False, left=False)
    result = pad_dim(b, result, r.type.rank - 1, 0, columns - rows)
    return (total(b, (result, None if r_ct is None else matmul(b, q, r_ct))),)


def _import_linalg_qr(b: Builder, x: Value, mode: str = "reduced") -> tuple[Value, ...]:
    """Mode ``r`` gives an empty Q."""
    if mode != "r":
        return b.emit_many("qr", x, mode=mode)
    return zeros(b, x.type, (0,)), b.emit_many("qr", x, mode="reduced")[1]


register(
    OpDef(
        name="qr",
        infer=_infer_qr,
        evaluate=_evaluate_qr,
        vjp=_qr_vjp,
        complex=AS_IT_IS,
        cost=cubic_cost(4),
        axes=batch_axes(2, 2, 2),
        lower=lambda node, args: f"torch.linalg.qr({args[0]}, mode={node.attrs['mode']!r})",
        aten={
            "linalg_qr.default": _import_linalg_qr,
            "qr.default": lambda b, x, some=True: _import_linalg_qr(b, x, "reduced" if some else "complete"),
        },
        samples=(
            Sample((Arg(t(2, 4, 2), "regular"),), {"mode": "reduced"}),
            Sample((Arg(t(2, 2, 3), "regular"),), {"mode": "complete"}),
        ),
    )
)

# --- geqrf --------------------------------------------------------------------------------------------


def _infer_geqrf(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require_matrices(x)
    require_flags(attrs)
    return x, x.with_(shape=(*x.shape[:-2], min(x.shape[-2:])))


register(
    OpDef(
        name="geqrf",
        infer=_infer_geqrf,
        evaluate=per_matrix(lambda node, x: lapack("geqrf", x)[:2]),
        vjp=NOT_DIFFERENTIABLE,
        cost=cubic_cost(2),
        axes=batch_axes(2, 2, 1),
        lower=lambda node, args: f"torch.geqrf({args[0]})",
        aten={"geqrf.default": lambda b, x: b.emit_many("geqrf", x)},
        samples=(Sample((Arg(t(2, 4, 3), "regular"),)),),
    )
)

# --- householder_product and ormqr --------------------------------------------------------------------


def _infer_householder(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, tau = inputs
    require_matrices(x)
    require_flags(attrs)
    _require_tau(x, tau)
    rows, columns = x.shape[-2:]
    require(rows >= columns >= tau.shape[-1], f"at least as many rows as columns as reflectors: got {x} and {tau}")
    return (x,)


def _require_tau(x: TensorType, tau: TensorType) -> None:
    require(tau.rank == x.rank - 1 and tau.dtype == x.dtype, f"tau of x's dtype, an axis less: got {tau} for {x}")
    require(tau.shape[:-1] == x.shape[:-2], f"tau of the batch axes {x.shape[:-2]} is required, got {tau}")
    require(tau.shape[-1] <= min(x.shape[-2:]), f"at most {min(x.shape[-2:])} reflectors are required, got {tau}")


def _reflectors(b: Builder, x: Value, tau: Value) -> tuple[Value, Value]:
    """V, of unit lower triangle, and ``D S``."""
    rows, count = x.type.shape[-2], tau.type.shape[-1]
    v = add(b, triangle(b, left_columns(b, x, count), False, -1), eye(b, x.type, rows, count))
    return v, rows_times(b, tau, triangle(b, matmul(b, adjoint(b, v), v), True, 1))


def _decompose_householder(b: Builder, node: Node, x: Value, tau: Value) -> tuple[Value, ...]:
    rows, columns = x.type.shape[-2:]
    v, ds = _reflectors(b, x, tau)
    right = rows_times(b, tau, adjoint(b, top_rows(b, v, columns)))
    right = solve_triangular(b, ds, right, upper=True, unitriangular=True)
    return (sub(b, eye(b, x.type, rows, columns), matmul(b, v, right)),)


def _evaluate_householder(node: Node, x: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """Reflectors applied from the last to the first."""
    wide, factors = widened(x), widened(tau)
    rows, columns = x.shape[-2:]
    result = np.broadcast_to(np.eye(rows, columns), x.shape).astype(wide.dtype)
    for index in reversed(range(tau.shape[-1])):
        v = np.where(np.arange(rows) > index, wide[..., index], np.arange(rows) == index)
        along = np.einsum("...i,...ij->...j", v.conj(), result)
        result = result - factors[..., index, None, None] * v[..., :, None] * along[..., None, :]
    return result.astype(x.dtype)


register(
    OpDef(
        name="householder_product",
        infer=_infer_householder,
        evaluate=_evaluate_householder,
        vjp=BY_DECOMPOSITION,
        cost=cubic_cost(2),
        axes=batch_axes(2, 1, 2),
        lower=lambda node, args: f"torch.linalg.householder_product({args[0]}, {args[1]})",
        aten={
            **dict.fromkeys(
                ("linalg_householder_product.default", "orgqr.default"),
                lambda b, x, tau: b.emit("householder_product", x, tau),
            )
        },
        samples=(Sample((Arg(t(2, 4, 3)), Arg(t(2, 2)))), Sample((Arg(t(3, 3)), Arg(t(3))))),
        decompose=_decompose_householder,
    )
)


def _infer_ormqr(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, tau, other = inputs
    require_matrices(x)
    require_flags(attrs, "left", "transpose")
    _require_tau(x, tau)
    require(other.rank == x.rank and other.dtype == x.dtype, f"one rank and dtype are required, got {x} and {other}")
    require(other.shape[:-2] == x.shape[:-2], f"equal batch axes are required, got {x} and {other}")
    size = other.shape[-2 if attrs["left"] else -1]
    require(x.shape[-2] == size and tau.shape[-1] == x.shape[-1], f"reflectors of size {size} are required, got {x}")
    return (other,)


def _decompose_ormqr(b: Builder, node: Node, x: Value, tau: Value, other: Value) -> tuple[Value, ...]:
    v, ds = _reflectors(b, x, tau)
    left, flipped = node.attrs["left"], node.attrs["transpose"]
    factor, tau = (adjoint(b, ds), conj(b, tau)) if flipped else (ds, tau)
    scaled = rows_times if left else lambda b, tau, inner: columns_times(b, inner, tau)
    inner = matmul(b, adjoint(b, v), other) if left else matmul(b, other, v)
    scale_first = left != flipped
    if scale_first:
        inner = scaled(b, tau, inner)
    inner = solve_triangular(b, factor, inner, upper=not flipped, left=left, unitriangular=True)
    if not scale_first:
        inner = scaled(b, tau, inner)
    return (sub(b, other, matmul(b, v, inner) if left else matmul(b, inner, adjoint(b, v))),)


register(
    OpDef(
        name="ormqr",
        infer=_infer_ormqr,
        evaluate=BY_DECOMPOSITION,
        vjp=BY_DECOMPOSITION,
        cost=cubic_cost(4),
        axes=batch_axes(2, 1, 2, 2),
        lower=lambda node, args: (
            f"torch.ormqr({', '.join(args)}, left={node.attrs['left']}, transpose={node.attrs['transpose']})"
        ),
        aten={
            "ormqr.default": lambda b, x, tau, other, left=True, transpose=False: b.emit(
                "ormqr", x, tau, other, left=left, transpose=transpose
            )
        },
        samples=(
            Sample((Arg(t(2, 4, 2)), Arg(t(2, 2)), Arg(t(2, 4, 3))), {"left": True, "transpose": True}),
            Sample((Arg(t(4, 2)), Arg(t(2)), Arg(t(3, 4))), {"left": False, "transpose": False}),
        ),
        decompose=_decompose_ormqr,
    )
)
