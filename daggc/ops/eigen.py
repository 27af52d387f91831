"""Eigenvalues of symmetric matrices, singular values, and what is made of them: pseudo-inverse, rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import add, broadcast, cast, full, mul, neg, reshape, scale, sub, sum_dims
from daggc.ops.matrices import (
    EPS,
    REAL,
    adjoint,
    batch_axes,
    columns_over,
    columns_times,
    cubic_cost,
    diagonal_matrix,
    differences,
    left_columns,
    matmul,
    off_diagonal,
    require_flags,
    require_matrices,
    rows_over,
    rows_times,
    top_rows,
    total,
    widened,
    zeros,
)
from daggc.ops.matrix_norm import import_cond, import_linalg_norm, import_matrix_norm, import_nuclear_norm
from daggc.ops.opdef import AS_IT_IS, Arg, OpDef, Sample, register, require, t
from daggc.ops.shape import Cotangents

# --- eigh ---------------------------------------------------------------------------------------------


def _infer_eigh(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require_matrices(x, square=True, dtypes=REAL)
    require_flags(attrs)
    return x.with_(shape=x.shape[:-1]), x


def _evaluate_eigh(node: Node, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """LAPACK's ``syevd`` on the lower triangle, as torch calls. Signs of eigenvectors are its choice."""
    values, vectors = np.linalg.eigh(x, UPLO="L")
    return values.astype(x.dtype), vectors.astype(x.dtype)


def _eigh_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """Giles 2008, 3.1: ``V (diag(values_ct) + skew(V^H V_ct) / E) V^H``: the derivative among symmetric matrices."""
    (values_ct, vectors_ct), (values, v) = cts, node.outputs
    flipped = adjoint(b, v)
    if vectors_ct is None:
        return (None if values_ct is None else matmul(b, columns_times(b, v, values_ct), flipped),)
    inner = matmul(b, flipped, vectors_ct)
    inner = scale(b, sub(b, inner, adjoint(b, inner)), 0.5)
    inner = b.emit("div", inner, off_diagonal(b, differences(b, values), 1.0))
    if values_ct is not None:
        inner = add(b, inner, diagonal_matrix(b, values_ct))
    return (matmul(b, v, matmul(b, inner, flipped)),)


def eigh(b: Builder, x: Value, uplo: str = "L", **_: Any) -> tuple[Value, Value]:
    """Eigenvalues, ascending, and eigenvectors, of the matrices whose lower or upper triangle is given."""
    values, vectors = b.emit_many("eigh", x if uplo.upper() == "L" else adjoint(b, x))
    return values, vectors


register(
    OpDef(
        name="eigh",
        infer=_infer_eigh,
        evaluate=_evaluate_eigh,
        vjp=_eigh_vjp,
        cost=cubic_cost(9),
        axes=batch_axes(2, 1, 2),
        lower=lambda node, args: f"torch.linalg.eigh({args[0]})",
        aten={
            "linalg_eigh.default": lambda b, x, UPLO="L": eigh(b, x, UPLO),
            "_linalg_eigh.default": lambda b, x, UPLO="L", compute_v=True: eigh(b, x, UPLO),
            "linalg_eigvalsh.default": lambda b, x, UPLO="L": eigh(b, x, UPLO)[0],
        },
        samples=(Sample((Arg(t(2, 2, 2), "hermitian"),)),),  # of size 2, all LAPACKs choose the same signs
    )
)

# --- svd ----------------------------------------------------------------------------------------------


def _infer_svd(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require_matrices(x, dtypes=REAL)
    require_flags(attrs, "full_matrices")
    *lead, rows, columns = x.shape
    size = min(rows, columns)
    left, right = (rows, columns) if attrs["full_matrices"] else (size, size)
    return x.with_(shape=(*lead, rows, left)), x.with_(shape=(*lead, size)), x.with_(shape=(*lead, right, columns))


def _evaluate_svd(node: Node, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """LAPACK's ``gesdd``, as torch calls on the CPU.

    Signs of singular vectors are its choice; libraries differ in them where one side is much longer than the other.
    """
    if not x.size:
        u, s, vh = (value.type.shape for value in node.outputs)
        eyes = [np.broadcast_to(np.eye(*shape[-2:], dtype=x.dtype), shape).copy() for shape in (u, vh)]
        return eyes[0], np.zeros(s, x.dtype), eyes[1]
    parts = np.linalg.svd(x, full_matrices=node.attrs["full_matrices"])
    return tuple(part.astype(x.dtype) for part in parts)


def _svd_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """Townsend 2016, as torch arranges it; of full matrices, only the reduced part has cotangents, as in torch."""
    (u_ct, s_ct, vh_ct), (u, s, vh) = cts, node.outputs
    rows, columns, size = u.type.shape[-2], vh.type.shape[-1], s.type.shape[-1]
    u, vh = left_columns(b, u, size), top_rows(b, vh, size)
    if u_ct is None and vh_ct is None:
        return (None if s_ct is None else matmul(b, columns_times(b, u, s_ct), vh),)
    uh, v = adjoint(b, u), adjoint(b, vh)
    gaps = off_diagonal(b, differences(b, mul(b, s, s)), 1.0)
    terms: list[Value | None] = []
    if u_ct is not None:
        u_ct = left_columns(b, u_ct, size)
        terms.append(columns_times(b, _skew(b, matmul(b, uh, u_ct)), s))
    if vh_ct is not None:
        vh_ct = top_rows(b, vh_ct, size)
        terms.append(rows_times(b, s, _skew(b, matmul(b, vh, adjoint(b, vh_ct)))))
    inner = total(b, terms)
    assert inner is not None
    inner = b.emit("div", inner, gaps)
    if s_ct is not None:
        inner = add(b, inner, diagonal_matrix(b, s_ct))
    if rows > columns and u_ct is not None:
        outside = columns_over(b, u_ct, s)
        outside = sub(b, outside, matmul(b, u, matmul(b, uh, outside)))
        return (matmul(b, add(b, matmul(b, u, inner), outside), vh),)
    if rows < columns and vh_ct is not None:
        outside = rows_over(b, vh_ct, s)
        outside = sub(b, outside, matmul(b, matmul(b, outside, v), vh))
        return (matmul(b, u, add(b, matmul(b, inner, vh), outside)),)
    return (matmul(b, u, matmul(b, inner, vh)),)


def _skew(b: Builder, x: Value) -> Value:
    return sub(b, x, adjoint(b, x))


def _import_svd(b: Builder, x: Value, full_matrices: bool = True, **_: Any) -> tuple[Value, ...]:
    return b.emit_many("svd", x, full_matrices=full_matrices)


def _import_inner_svd(
    b: Builder, x: Value, full_matrices: bool = False, compute_uv: bool = True, **_: Any
) -> tuple[Value, ...]:
    u, s, vh = b.emit_many("svd", x, full_matrices=full_matrices and compute_uv)
    empty = zeros(b, x.type, (0,))
    return (u, s, vh) if compute_uv else (empty, s, empty)


def _import_torch_svd(b: Builder, x: Value, some: bool = True, compute_uv: bool = True) -> tuple[Value, ...]:
    """The older function gives V, and zeros for singular vectors that are not asked for."""
    if compute_uv:
        u, s, vh = b.emit_many("svd", x, full_matrices=not some)
        return u, s, adjoint(b, vh)
    *lead, rows, columns = x.type.shape
    return zeros(b, x.type, (*lead, rows, rows)), svdvals(b, x), zeros(b, x.type, (*lead, columns, columns))


def svdvals(b: Builder, x: Value, **_: Any) -> Value:
    """Singular values, descending."""
    return b.emit_many("svd", x, full_matrices=False)[1]


def _import_matrix_rank(
    b: Builder,
    x: Value,
    *,
    atol: Value | float | None = None,
    rtol: Value | float | None = None,
    hermitian: bool = False,
) -> Value:
    """How many singular values are above ``max(atol, rtol * the largest)``."""
    require_matrices(x.type)
    lead = x.type.shape[:-2]
    if not x.type.numel:
        return full(b, 0, lead, "i64")
    sizes = b.emit("abs", eigh(b, x)[0]) if hermitian else svdvals(b, x)
    wide = cast(b, sizes, "f64")
    low, relative = _tolerances(b, x.type, atol, rtol)
    largest = b.emit("amax", wide, dims=(wide.type.rank - 1,), keepdim=False)
    least = b.emit("maximum", low, mul(b, relative, largest))
    least = broadcast(b, reshape(b, least, (*lead, 1)), wide.type.shape)
    return sum_dims(b, cast(b, b.emit("gt", wide, least), "i64"), (wide.type.rank - 1,))


def _tolerances(
    b: Builder, x: TensorType, atol: Value | float | None, rtol: Value | float | None
) -> tuple[Value, Value]:
    """Both as f64 of the batch's shape. The relative one is eps times the longer side, 0 if only atol is given."""
    lead = x.shape[:-2]
    default = EPS[x.dtype] * max(x.shape[-2:])

    def batch(value: Value | float) -> Value:
        if not isinstance(value, Value):
            return full(b, float(value), lead, "f64")
        return broadcast(b, cast(b, value, "f64"), lead)

    low = batch(0.0 if atol is None else atol)
    if rtol is not None:
        return low, batch(rtol)
    if not isinstance(atol, Value):
        return low, batch(0.0 if atol is not None and atol > 0 else default)
    return low, b.emit("where_scalar", b.emit("le_scalar", low, value=0.0), batch(default), value=0.0)


def _rank_by_tolerance(b: Builder, x: Value, tol: Value | float, hermitian: bool = False) -> Value:
    """The older form, of an absolute tolerance."""
    return _import_matrix_rank(b, x, atol=tol, rtol=0.0, hermitian=hermitian)


register(
    OpDef(
        name="svd",
        infer=_infer_svd,
        evaluate=_evaluate_svd,
        vjp=_svd_vjp,
        cost=cubic_cost(20),
        axes=batch_axes(2, 2, 1, 2),
        lower=lambda node, args: f"torch.linalg.svd({args[0]}, full_matrices={node.attrs['full_matrices']})",
        aten={
            "linalg_svd.default": _import_svd,
            "_linalg_svd.default": _import_inner_svd,
            "svd.default": _import_torch_svd,
            "linalg_svdvals.default": svdvals,
            **dict.fromkeys(
                ("linalg_matrix_rank.atol_rtol_tensor", "linalg_matrix_rank.atol_rtol_float"), _import_matrix_rank
            ),
            **dict.fromkeys(("linalg_matrix_rank.default", "linalg_matrix_rank.tol_tensor"), _rank_by_tolerance),
            **dict.fromkeys(("linalg_matrix_norm.default", "linalg_matrix_norm.str_ord"), import_matrix_norm),
            **dict.fromkeys(("linalg_norm.default", "linalg_norm.ord_str"), import_linalg_norm),
            **dict.fromkeys(("linalg_cond.default", "linalg_cond.p_str"), import_cond),
            **dict.fromkeys(("nuclear_norm.default", "nuclear_norm.dim"), import_nuclear_norm),
        },
        samples=(
            Sample((Arg(t(2, 4, 2), "regular"),), {"full_matrices": False}),
            Sample((Arg(t(2, 3, 4), "regular"),), {"full_matrices": False}),
            Sample((Arg(t(2, 2, 2), "regular"),), {"full_matrices": True}),
        ),
    )
)

# --- pinv ---------------------------------------------------------------------------------------------


def _infer_pinv(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, atol, rtol = inputs
    require_flags(attrs, "hermitian")
    require_matrices(x, square=attrs["hermitian"])
    wanted = TensorType("f64", x.shape[:-2])
    require(atol == rtol == wanted, f"tolerances of type {wanted} are required, got {atol} and {rtol}")
    return (x.with_(shape=(*x.shape[:-2], x.shape[-1], x.shape[-2])),)


def _evaluate_pinv(node: Node, x: np.ndarray, atol: np.ndarray, rtol: np.ndarray) -> np.ndarray:
    if not x.size:
        return np.zeros(node.output.type.shape, x.dtype)
    if node.attrs["hermitian"]:
        values, u = np.linalg.eigh(widened(x), UPLO="L")
        vh = u.swapaxes(-1, -2).conj()
    else:
        u, values, vh = np.linalg.svd(widened(x), full_matrices=False)
    sizes = np.abs(values)
    least = np.maximum(atol, rtol * sizes.max(-1))[..., None]
    with np.errstate(divide="ignore"):
        factors = np.where(sizes > least, 1 / values, 0)
    result = (vh.swapaxes(-1, -2).conj() * factors[..., None, :]) @ u.swapaxes(-1, -2).conj()
    return result.astype(x.dtype)


def pinv_pullback(b: Builder, x: Value, y: Value, ct: Value) -> Value:
    """Golub and Pereyra 1973, for matrices of constant rank, from the cotangent of the pseudo-inverse y of x."""
    ct, yh = adjoint(b, ct), adjoint(b, y)
    rows, columns = x.type.shape[-2:]
    if rows <= columns:
        k = matmul(b, ct, y)
        outside = matmul(b, k, yh)
        result = sub(b, outside, adjoint(b, matmul(b, y, k)))
        result = sub(b, result, matmul(b, x, y, outside))
        return add(b, result, matmul(b, matmul(b, yh, y), sub(b, ct, matmul(b, k, x))))
    k = matmul(b, y, ct)
    outside = matmul(b, yh, k)
    result = add(b, neg(b, adjoint(b, matmul(b, k, y))), matmul(b, sub(b, ct, matmul(b, x, k)), y, yh))
    return sub(b, add(b, result, outside), matmul(b, outside, y, x))


def _pinv_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    assert cts[0] is not None
    return pinv_pullback(b, node.inputs[0], node.output, cts[0]), None, None


def pinv(
    b: Builder,
    x: Value,
    *,
    atol: Value | float | None = None,
    rtol: Value | float | None = None,
    hermitian: bool = False,
) -> Value:
    """torch.linalg.pinv."""
    require_matrices(x.type, square=hermitian)
    return b.emit("pinv", x, *_tolerances(b, x.type, atol, rtol), hermitian=hermitian)


def _pinv_by_tolerance(b: Builder, x: Value, rcond: Value | float = 1e-15, hermitian: bool = False) -> Value:
    return pinv(b, x, atol=0.0, rtol=rcond, hermitian=hermitian)


register(
    OpDef(
        name="pinv",
        infer=_infer_pinv,
        evaluate=_evaluate_pinv,
        vjp=_pinv_vjp,
        complex=AS_IT_IS,
        cost=cubic_cost(22),
        axes=batch_axes(2, 0, 0, 2),
        lower=lambda node, args: (
            f"torch.linalg.pinv({args[0]}, atol={args[1]}, rtol={args[2]}, hermitian={node.attrs['hermitian']})"
        ),
        aten={
            **dict.fromkeys(("linalg_pinv.atol_rtol_tensor", "linalg_pinv.atol_rtol_float"), pinv),
            **dict.fromkeys(
                ("linalg_pinv.default", "linalg_pinv.rcond_tensor", "pinverse.default"), _pinv_by_tolerance
            ),
        },
        samples=(
            Sample((Arg(t(2, 4, 2), "regular"), Arg(t(2), "unit"), Arg(t(2), "unit")), {"hermitian": False}),
            Sample((Arg(t(2, 2, 3), "regular"), Arg(t(2), "unit"), Arg(t(2), "unit")), {"hermitian": False}),
        ),
    )
)
