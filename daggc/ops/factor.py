"""Triangular factors: LU with partial pivoting, Cholesky. Determinants, which are read off LU.

Pivots are as in LAPACK and torch: counted from 1, row i was swapped with row ``pivots[i]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import add, broadcast, conj, mul, reshape, sub, transpose
from daggc.ops.concat import concat
from daggc.ops.matrices import (
    EPS,
    LAPACK,
    REAL,
    adjoint,
    batch_axes,
    bottom_rows,
    broadcast_batches,
    check,
    cubic_cost,
    diagonal_matrix,
    diagonal_of,
    eye,
    info_type,
    lapack,
    left_columns,
    matmul,
    per_matrix,
    require_flags,
    require_matrices,
    right_columns,
    top_rows,
    triangle,
    widened,
    zeros,
)
from daggc.ops.opdef import (
    AS_IT_IS,
    NOT_DIFFERENTIABLE,
    Arg,
    OpDef,
    Sample,
    copy_cost,
    register,
    require,
    t,
    torch_dtype,
)
from daggc.ops.shape import Cotangents
from daggc.ops.solve import solve_triangular

# --- permutation --------------------------------------------------------------------------------------


def _infer_permutation(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (pivots,), size, dtype = inputs, attrs["size"], attrs["dtype"]
    require(pivots.dtype == "i32" and pivots.rank >= 1, f"pivots i32[..., k] are required, got {pivots}")
    require(dtype in LAPACK, f"dtype must be one of {', '.join(LAPACK)}, got {dtype!r}")
    require(pivots.shape[-1] <= size, f"a size of at least {pivots.shape[-1]} is required, got {size}")
    return (TensorType(dtype, (*pivots.shape[:-1], size, size)),)


def _evaluate_permutation(node: Node, pivots: np.ndarray) -> np.ndarray:
    size = node.attrs["size"]
    result = np.zeros(node.output.type.shape, node.output.type.numpy_dtype)
    for index in np.ndindex(pivots.shape[:-1]):
        order = np.arange(size)
        for row, pivot in enumerate(np.clip(pivots[index], 1, max(size, 1)) - 1):
            order[[row, pivot]] = order[[pivot, row]]
        result[index][order, np.arange(size)] = 1
    return result


def permutation(b: Builder, pivots: Value, size: int, dtype: str) -> Value:
    """P of ``A = P L U``."""
    return b.emit("permutation", pivots, size=size, dtype=dtype)


register(
    OpDef(
        name="permutation",
        infer=_infer_permutation,
        evaluate=_evaluate_permutation,
        vjp=NOT_DIFFERENTIABLE,
        cost=copy_cost,
        axes=batch_axes(1, 2),
        lower=lambda node, args: (
            f"kernels.permutation({args[0]}, {node.attrs['size']}, {torch_dtype(node.attrs['dtype'])})"
        ),
        aten={},
        samples=(Sample((Arg(t(2, 3, dtype="i32"), "count"),), {"size": 4, "dtype": "f64"}),),
    )
)

# --- lu_factor ----------------------------------------------------------------------------------------


def _infer_lu(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require_matrices(x)
    require_flags(attrs, "check_errors")
    return x, TensorType("i32", (*x.shape[:-2], min(x.shape[-2:]))), info_type(x)


def _lu_one(node: Node, x: np.ndarray) -> tuple[Any, ...]:
    lu, pivots, info = lapack("getrf", x)
    check(node, info, "singular")
    return lu, pivots + 1, info


def _lu_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """``P L^-H (tril(L^H L_ct, -1) + triu(U_ct U^H)) U^-H``, with terms for what stands out of the square part.

    L and U are read from the packed factors; a unit triangle is solved without its diagonal.
    """
    (ct, *_), (lu, pivots, _) = cts, node.outputs
    if ct is None:
        return (None,)
    rows, columns = lu.type.shape[-2:]
    size = min(rows, columns)
    square = left_columns(b, top_rows(b, lu, size), size)
    lower_adjoint, upper_adjoint = adjoint(b, square), adjoint(b, triangle(b, square, True))
    square_ct = left_columns(b, top_rows(b, ct, size), size)
    unit_lower_adjoint = add(b, triangle(b, lower_adjoint, True, 1), eye(b, lu.type, size))
    from_lower = matmul(b, unit_lower_adjoint, triangle(b, square_ct, False, -1))
    from_upper = matmul(b, triangle(b, square_ct, True), upper_adjoint)
    rest = None
    if columns > size:
        right_ct = right_columns(b, ct, size)
        from_lower = sub(b, from_lower, matmul(b, right_ct, adjoint(b, right_columns(b, lu, size))))
        rest = solve_triangular(b, lower_adjoint, right_ct, upper=True, unitriangular=True)
    if rows > size:
        bottom_ct = bottom_rows(b, ct, size)
        from_upper = sub(b, from_upper, matmul(b, adjoint(b, bottom_rows(b, lu, size)), bottom_ct))
        rest = solve_triangular(b, upper_adjoint, bottom_ct, upper=False, left=False)
    inner = add(b, triangle(b, from_lower, False, -1), triangle(b, from_upper, True))
    inner = solve_triangular(b, lower_adjoint, inner, upper=True, unitriangular=True)
    result = solve_triangular(b, upper_adjoint, inner, upper=False, left=False)
    if rest is not None:
        result = concat(b, (result, rest), lu.type.rank - (1 if columns > size else 2))
    return (matmul(b, permutation(b, pivots, rows, lu.type.dtype), result),)


def lu_factor(b: Builder, x: Value, *, check_errors: bool = False) -> tuple[Value, ...]:
    """LU packed into one matrix, pivots, LAPACK's info."""
    return b.emit_many("lu_factor", x, check_errors=check_errors)


def _require_pivot(pivot: bool) -> None:
    if not pivot:
        raise NotImplementedError("LU without pivoting is torch's on CUDA only")


def _import_lu_factor(b: Builder, x: Value, *, pivot: bool = True) -> tuple[Value, ...]:
    _require_pivot(pivot)
    return lu_factor(b, x, check_errors=True)[:2]


def _import_lu_factor_ex(b: Builder, x: Value, *, pivot: bool = True, check_errors: bool = False) -> tuple[Value, ...]:
    _require_pivot(pivot)
    return lu_factor(b, x, check_errors=check_errors)


def _import_lu_with_info(b: Builder, x: Value, pivot: bool = True, check_errors: bool = True) -> tuple[Value, ...]:
    return _import_lu_factor_ex(b, x, pivot=pivot, check_errors=check_errors)


def _import_lu(b: Builder, x: Value, *, pivot: bool = True) -> tuple[Value, ...]:
    _require_pivot(pivot)
    lu, pivots, _ = lu_factor(b, x)
    return lu_unpack(b, lu, pivots)


def lu_unpack(
    b: Builder, lu: Value, pivots: Value, unpack_data: bool = True, unpack_pivots: bool = True
) -> tuple[Value, ...]:
    """P, L and U; what was not asked for is empty."""
    require_matrices(lu.type)
    rows, columns = lu.type.shape[-2:]
    size = min(rows, columns)
    empty = zeros(b, lu.type, (0,))
    order = permutation(b, pivots, rows, lu.type.dtype) if unpack_pivots else empty
    if not unpack_data:
        return order, empty, empty
    lower = add(b, triangle(b, left_columns(b, lu, size), False, -1), eye(b, lu.type, rows, size))
    return order, lower, triangle(b, top_rows(b, lu, size), True)


_adjoint = adjoint  # lu_solve has a parameter of the name


def lu_solve(b: Builder, lu: Value, pivots: Value, right: Value, *, left: bool = True, adjoint: bool = False) -> Value:
    """``A^-1 right`` of ``A = P L U`` by two triangular systems; ``right A^-1`` unless ``left``; A^H if ``adjoint``."""
    if not left:
        return _adjoint(b, lu_solve(b, lu, pivots, _adjoint(b, right), adjoint=not adjoint))
    require_matrices(lu.type, square=True)
    order = permutation(b, pivots, lu.type.shape[-1], lu.type.dtype)
    if adjoint:
        flipped = _adjoint(b, lu)
        x = solve_triangular(b, flipped, right, upper=False)
        x = solve_triangular(b, flipped, x, upper=True, unitriangular=True)
        return matmul(b, *broadcast_batches(b, order, x))
    x = matmul(b, *broadcast_batches(b, transpose(b, order), right))
    x = solve_triangular(b, lu, x, upper=False, unitriangular=True)
    return solve_triangular(b, lu, x, upper=True)


register(
    OpDef(
        name="lu_factor",
        infer=_infer_lu,
        evaluate=per_matrix(_lu_one),
        vjp=_lu_vjp,
        complex=AS_IT_IS,
        cost=cubic_cost(1),
        axes=batch_axes(2, 2, 1, 0),
        lower=lambda node, args: f"torch.linalg.lu_factor_ex({args[0]}, check_errors={node.attrs['check_errors']})",
        aten={
            "linalg_lu_factor.default": _import_lu_factor,
            "linalg_lu_factor_ex.default": _import_lu_factor_ex,
            "_lu_with_info.default": _import_lu_with_info,
            "linalg_lu.default": _import_lu,
            "lu_unpack.default": lu_unpack,
            "linalg_lu_solve.default": lu_solve,
            "lu_solve.default": lambda b, right, lu, pivots: lu_solve(b, lu, pivots, right),
        },
        samples=tuple(
            Sample((Arg(t(*shape), "regular"),), {"check_errors": False}) for shape in ((2, 3, 3), (2, 2, 4), (2, 4, 2))
        ),
    )
)

# --- cholesky -----------------------------------------------------------------------------------------


def _infer_cholesky(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require_matrices(x, square=True)
    require_flags(attrs, "check_errors")
    return x, info_type(x)


def _cholesky_one(node: Node, x: np.ndarray) -> tuple[Any, int]:
    factor, info = lapack("potrf", x, lower=1, clean=1)
    check(node, info, "not positive-definite")
    return factor, info


def _cholesky_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """Murray 2016, eq. 9; symmetrized as in torch: the derivative among symmetric matrices."""
    ct, factor = cts[0], node.outputs[0]
    if ct is None:
        return (None,)
    flipped = adjoint(b, factor)
    inner = triangle(b, matmul(b, flipped, ct), False)
    inner = add(b, inner, adjoint(b, triangle(b, inner, False, -1)))
    inner = solve_triangular(b, flipped, inner, upper=True)
    return (b.emit("mul_scalar", solve_triangular(b, factor, inner, upper=False, left=False), value=0.5),)


def _import_cholesky_ex(
    b: Builder, x: Value, *, upper: bool = False, check_errors: bool = False
) -> tuple[Value, Value]:
    """The upper factor is read from, and the adjoint of, the upper triangle."""
    factor, info = b.emit_many("cholesky", adjoint(b, x) if upper else x, check_errors=check_errors)
    return adjoint(b, factor) if upper else factor, info


def _import_cholesky(b: Builder, x: Value, upper: bool = False) -> Value:
    return _import_cholesky_ex(b, x, upper=upper, check_errors=True)[0]


register(
    OpDef(
        name="cholesky",
        infer=_infer_cholesky,
        evaluate=per_matrix(_cholesky_one),
        vjp=_cholesky_vjp,
        complex=AS_IT_IS,
        cost=cubic_cost(1 / 3),
        axes=batch_axes(2, 2, 0),
        lower=lambda node, args: f"torch.linalg.cholesky_ex({args[0]}, check_errors={node.attrs['check_errors']})",
        aten={
            "linalg_cholesky_ex.default": _import_cholesky_ex,
            "linalg_cholesky.default": lambda b, x, *, upper=False: _import_cholesky(b, x, upper),
            "cholesky.default": _import_cholesky,
        },
        samples=(Sample((Arg(t(2, 3, 3), "hermitian"),), {"check_errors": False}),),
    )
)

# --- determinants -------------------------------------------------------------------------------------


def _infer_det(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require_matrices(x, square=True)
    require_flags(attrs)
    return (x.with_(shape=x.shape[:-2]),)


def _over_matrix(b: Builder, factor: Value, like: Value) -> Value:
    """A number for each matrix, times the identity."""
    lead, size = like.type.shape[:-2], like.type.shape[-1]
    return diagonal_matrix(b, broadcast(b, reshape(b, factor, (*lead, 1)), (*lead, size)))


def _det_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """The solution of ``x^H x_ct = ct det I``; a zero pivot is moved off zero, as in torch's first derivative."""
    (ct,), (x,) = cts, node.inputs
    assert ct is not None
    if not x.type.numel:
        return (None,)
    lu, pivots, _ = lu_factor(b, x)
    pivot = diagonal_of(b, lu)
    nudge = b.emit("where_scalar", b.emit("eq_scalar", pivot, value=0.0), _like(b, pivot, EPS[x.type.dtype]), value=0.0)
    return (
        lu_solve(
            b,
            add(b, lu, diagonal_matrix(b, nudge)),
            pivots,
            _over_matrix(b, mul(b, ct, conj(b, node.output)), x),
            adjoint=True,
        ),
    )


def _like(b: Builder, x: Value, value: float) -> Value:
    return b.emit("full", value=value, shape=x.type.shape, dtype=x.type.dtype)


def _det(node: Node, x: np.ndarray) -> np.ndarray:
    return np.linalg.det(widened(x)).astype(x.dtype)


register(
    OpDef(
        name="det",
        infer=_infer_det,
        evaluate=_det,
        vjp=_det_vjp,
        complex=AS_IT_IS,
        cost=cubic_cost(1),
        axes=batch_axes(2, 0),
        lower=lambda node, args: f"torch.linalg.det({args[0]})",
        aten={
            **dict.fromkeys(("linalg_det.default", "det.default"), lambda b, x: b.emit("det", x)),
            "_linalg_det.default": lambda b, x: (b.emit("det", x), None, None),  # torch factors x or its transpose
        },
        samples=(Sample((Arg(t(2, 3, 3), "regular"),)),),
    )
)


def _infer_slogdet(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    require_matrices(inputs[0], dtypes=REAL)
    return _infer_det(inputs, attrs) * 2


def _slogdet(node: Node, x: np.ndarray) -> tuple[np.ndarray, ...]:
    with np.errstate(divide="ignore"):
        return tuple(part.astype(x.dtype) for part in np.linalg.slogdet(x.astype(np.float64)))


def _slogdet_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """The adjoint of the inverse, times the cotangent of the logarithm; the sign is constant."""
    ct, (x,) = cts[1], node.inputs
    if ct is None:
        return (None,)
    return (b.emit_many("solve", adjoint(b, x), _over_matrix(b, ct, x), check_errors=False)[0],)


def _import_logdet(b: Builder, x: Value) -> Value:
    """NaN where the determinant is negative."""
    sign, log = b.emit_many("slogdet", x)
    return b.emit("where_scalar", b.emit("ne_scalar", sign, value=-1.0), log, value=float("nan"))


def _import_slogdet(b: Builder, x: Value) -> tuple[Value, ...]:
    return b.emit_many("slogdet", x)


register(
    OpDef(
        name="slogdet",
        infer=_infer_slogdet,
        evaluate=_slogdet,
        vjp=_slogdet_vjp,
        cost=cubic_cost(1),
        axes=batch_axes(2, 0, 0),
        lower=lambda node, args: f"torch.linalg.slogdet({args[0]})",
        aten={
            **dict.fromkeys(("linalg_slogdet.default", "slogdet.default"), _import_slogdet),
            "_linalg_slogdet.default": lambda b, x: (*b.emit_many("slogdet", x), None, None),  # likewise
            "logdet.default": _import_logdet,
        },
        samples=(Sample((Arg(t(2, 3, 3), "regular"),)),),
    )
)
