"""Systems of linear equations: general, triangular, and with a Cholesky factor; inverses.

Vectors on the right-hand side, systems ``x @ a = b`` and batch axes that broadcast are made explicit by importers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import add, neg, reshape, transpose
from daggc.ops.matrices import (
    adjoint,
    batch_axes,
    broadcast_batches,
    check,
    cubic_cost,
    eye,
    info_type,
    lapack,
    matmul,
    per_matrix,
    require_flags,
    require_matrices,
    require_system,
    triangle,
)
from daggc.ops.opdef import AS_IT_IS, Arg, OpDef, Sample, register, t
from daggc.ops.shape import Cotangents, movedim

# --- solve --------------------------------------------------------------------------------------------


def _infer_solve(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    a, b = inputs
    require_system(a, b)
    require_flags(attrs, "check_errors")
    return b, info_type(a)


def _solve_one(node: Node, a: np.ndarray, b: np.ndarray) -> tuple[Any, int]:
    lu, pivots, info = lapack("getrf", a)
    check(node, info, "singular")
    with np.errstate(all="ignore"):
        return lapack("getrs", lu, pivots, b)[0], info


def _solve_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """``b_ct`` solves the adjoint system; ``a_ct = -b_ct x^H``."""
    if cts[0] is None:
        return None, None
    b_ct = b.emit_many("solve", adjoint(b, node.inputs[0]), cts[0], check_errors=False)[0]
    return neg(b, matmul(b, b_ct, adjoint(b, node.outputs[0]))), b_ct


def solve(b: Builder, a: Value, right: Value, left: bool = True, check_errors: bool = False) -> tuple[Value, Value]:
    """torch.linalg.solve_ex: the solution and LAPACK's info. A right-hand side may be a batch of vectors."""
    require_matrices(a.type, square=True)
    vectors = right.type.rank == 1 or (
        right.type.rank == a.type.rank - 1 and right.type.shape == a.type.shape[:-1]  # torch's way to tell
    )
    if vectors:
        if not left:
            raise TypeRuleError("vectors on the right-hand side need left=True")
        solution, info = solve(b, a, reshape(b, right, (*right.type.shape, 1)), True, check_errors)
        return reshape(b, solution, solution.type.shape[:-1]), info
    if not left:
        solution, info = solve(b, transpose(b, a), transpose(b, right), True, check_errors)
        return transpose(b, solution), info
    a, right = broadcast_batches(b, a, right)
    solution, info = b.emit_many("solve", a, right, check_errors=check_errors)
    return solution, info


def _import_solve(b: Builder, a: Value, right: Value, *, left: bool = True) -> Value:
    return solve(b, a, right, left, True)[0]


def _import_solve_ex(
    b: Builder, a: Value, right: Value, *, left: bool = True, check_errors: bool = False
) -> tuple[Value, Value]:
    return solve(b, a, right, left, check_errors)


def _import_tensorsolve(b: Builder, a: Value, right: Value, dims: Sequence[int] | None = None) -> Value:
    """``a`` as a square matrix from its trailing axes to those of ``right``."""
    if dims is not None:
        a = movedim(b, a, dims, range(a.type.rank - len(dims), a.type.rank))
    size = right.type.numel
    solution, _ = solve(b, reshape(b, a, (size, size)), reshape(b, right, (size,)), check_errors=True)
    return reshape(b, solution, a.type.shape[right.type.rank :])


register(
    OpDef(
        name="solve",
        infer=_infer_solve,
        evaluate=per_matrix(_solve_one),
        vjp=_solve_vjp,
        complex=AS_IT_IS,
        cost=cubic_cost(1),
        axes=batch_axes(2, 2, 2, 0),
        lower=lambda node, args: (
            f"torch.linalg.solve_ex({args[0]}, {args[1]}, check_errors={node.attrs['check_errors']})"
        ),
        aten={
            "linalg_solve.default": _import_solve,
            "linalg_solve_ex.default": _import_solve_ex,
            "linalg_tensorsolve.default": _import_tensorsolve,
        },
        samples=(Sample((Arg(t(2, 3, 3), "regular"), Arg(t(2, 3, 2))), {"check_errors": False}),),
    )
)

# --- inverse ------------------------------------------------------------------------------------------


def _infer_inverse(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require_matrices(x, square=True)
    require_flags(attrs, "check_errors")
    return x, info_type(x)


def _inverse_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """``-y^H ct y^H``."""
    if cts[0] is None:
        return (None,)
    y = adjoint(b, node.outputs[0])
    return (neg(b, matmul(b, y, matmul(b, cts[0], y))),)


def inverse(b: Builder, x: Value) -> Value:
    """The inverse; a singular matrix is an error."""
    return b.emit_many("inverse", x, check_errors=True)[0]


def _import_inverse_ex(b: Builder, x: Value, *, check_errors: bool = False) -> tuple[Value, ...]:
    return b.emit_many("inverse", x, check_errors=check_errors)


def _import_tensorinv(b: Builder, x: Value, ind: int = 2) -> Value:
    """The inverse of x as a square matrix of its first ``ind`` axes by the others."""
    first, last = x.type.shape[:ind], x.type.shape[ind:]
    size = math.prod(first)
    return reshape(b, inverse(b, reshape(b, x, (size, math.prod(last)))), (*last, *first))


def _import_matrix_power(b: Builder, x: Value, n: int) -> Value:
    """By repeated squaring; the inverse first for a negative power."""
    require_square(x.type)
    if n == 0:  # as a function of x: its derivative is zero, and not absent
        nothing = b.emit("full", value=False, shape=x.type.shape, dtype="bool")
        return add(b, b.emit("where_scalar", nothing, x, value=0.0), eye(b, x.type, x.type.shape[-1]))
    if n < 0:
        return _import_matrix_power(b, inverse(b, x), -n)
    if n == 1:
        return x
    if n == 3:
        return matmul(b, x, x, x)
    result: Value | None = None
    while n:
        if n % 2:
            result = x if result is None else matmul(b, result, x)
        n //= 2
        x = matmul(b, x, x) if n else x
    assert result is not None
    return result


def require_square(x: TensorType) -> None:
    if x.rank < 2 or x.shape[-1] != x.shape[-2]:
        raise TypeRuleError(f"square matrices are required, got {x}")


register(
    OpDef(
        name="inverse",
        infer=_infer_inverse,
        evaluate=per_matrix(lambda node, x: _solve_one(node, x, np.eye(len(x), dtype=x.dtype))),
        vjp=_inverse_vjp,
        complex=AS_IT_IS,
        cost=cubic_cost(3),
        axes=batch_axes(2, 2, 0),
        lower=lambda node, args: f"torch.linalg.inv_ex({args[0]}, check_errors={node.attrs['check_errors']})",
        aten={
            **dict.fromkeys(("linalg_inv.default", "inverse.default"), inverse),
            "linalg_inv_ex.default": _import_inverse_ex,
            "linalg_tensorinv.default": _import_tensorinv,
            **dict.fromkeys(("linalg_matrix_power.default", "matrix_power.default"), _import_matrix_power),
        },
        samples=(Sample((Arg(t(2, 3, 3), "regular"),), {"check_errors": False}),),
    )
)

# --- solve_triangular ---------------------------------------------------------------------------------


def _infer_triangular(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    require_flags(attrs, "upper", "left", "unitriangular")
    a, b = inputs
    require_system(a, b, attrs["left"])
    return (b,)


def _evaluate_triangular(node: Node, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Substitution, in f64: a zero on the diagonal divides, as in BLAS."""
    upper, left, unit = (node.attrs[name] for name in ("upper", "left", "unitriangular"))
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    a, x = a.astype(wide), b.astype(wide)
    if not left:
        a, x, upper = a.swapaxes(-1, -2), x.swapaxes(-1, -2), not upper
    size = a.shape[-1]
    x = x.copy()
    with np.errstate(all="ignore"):
        for row in reversed(range(size)) if upper else range(size):
            if not unit:
                x[..., row, :] /= a[..., row, row, None]
            rest = slice(0, row) if upper else slice(row + 1, size)
            x[..., rest, :] -= a[..., rest, row, None] * x[..., None, row, :]
    return (x if left else x.swapaxes(-1, -2)).astype(b.dtype)


def _triangular_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    (ct,), a, x = cts, node.inputs[0], node.output
    assert ct is not None
    upper, left, unit = (node.attrs[name] for name in ("upper", "left", "unitriangular"))
    b_ct = solve_triangular(b, adjoint(b, a), ct, upper=not upper, left=left, unitriangular=unit)
    a_ct = matmul(b, b_ct, adjoint(b, x)) if left else matmul(b, adjoint(b, x), b_ct)
    return triangle(b, neg(b, a_ct), upper, (1 if upper else -1) if unit else 0), b_ct


def solve_triangular(
    b: Builder, a: Value, right: Value, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Value:
    """``a^-1 right`` (``right a^-1`` unless ``left``) with one triangle of a, the other is not read."""
    a, right = broadcast_batches(b, a, right)
    return b.emit("solve_triangular", a, right, upper=upper, left=left, unitriangular=unitriangular)


def _import_triangular_solve(
    b: Builder, right: Value, a: Value, upper: bool = True, transposed: bool = False, unitriangular: bool = False
) -> tuple[Value, Value]:
    """The older function, which also gives a back."""
    a, right = broadcast_batches(b, a, right)
    used = transpose(b, a) if transposed else a
    return solve_triangular(b, used, right, upper=upper != transposed, unitriangular=unitriangular), a


register(
    OpDef(
        name="solve_triangular",
        infer=_infer_triangular,
        evaluate=_evaluate_triangular,
        vjp=_triangular_vjp,
        complex=AS_IT_IS,
        cost=cubic_cost(1),
        axes=batch_axes(2, 2, 2),
        lower=lambda node, args: (
            f"torch.linalg.solve_triangular({args[0]}, {args[1]}, "
            + ", ".join(f"{name}={node.attrs[name]}" for name in ("upper", "left", "unitriangular"))
            + ")"
        ),
        aten={
            "linalg_solve_triangular.default": solve_triangular,
            "triangular_solve.default": _import_triangular_solve,
        },
        samples=(
            Sample(
                (Arg(t(2, 3, 3), "triangular"), Arg(t(2, 3, 2))), {"upper": False, "left": True, "unitriangular": False}
            ),
            Sample(
                (Arg(t(2, 3, 3), "hermitian"), Arg(t(2, 2, 3))), {"upper": True, "left": False, "unitriangular": False}
            ),
            Sample(
                (Arg(t(2, 3, 3), "hermitian"), Arg(t(2, 3, 1))), {"upper": True, "left": True, "unitriangular": True}
            ),
        ),
    )
)

# --- cholesky_solve -----------------------------------------------------------------------------------


def _infer_cholesky_solve(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    b, factor = inputs
    require_system(factor, b)
    require_flags(attrs)
    return (b,)


def _cholesky_solve_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """As torch has it: the factor's cotangent is not cut to its triangle, though only that is read."""
    (ct,), factor = cts, node.inputs[1]
    assert ct is not None
    b_ct = b.emit("cholesky_solve", ct, factor)
    common = matmul(b, b_ct, adjoint(b, node.output))
    return b_ct, neg(b, matmul(b, add(b, common, adjoint(b, common)), factor))


def cholesky_solve(b: Builder, right: Value, factor: Value, upper: bool = False) -> Value:
    """``(L L^H)^-1 right``; an upper factor is ``L^H``."""
    factor, right = broadcast_batches(b, adjoint(b, factor) if upper else factor, right)
    return b.emit("cholesky_solve", right, factor)


def _import_cholesky_inverse(b: Builder, factor: Value, upper: bool = False) -> Value:
    require_matrices(factor.type, square=True)
    return cholesky_solve(b, eye(b, factor.type, factor.type.shape[-1]), factor, upper)


register(
    OpDef(
        name="cholesky_solve",
        infer=_infer_cholesky_solve,
        evaluate=per_matrix(lambda node, b, factor: lapack("potrs", factor, b, lower=1)[:1]),
        vjp=_cholesky_solve_vjp,
        complex=AS_IT_IS,
        cost=cubic_cost(2),
        axes=batch_axes(2, 2, 2),
        lower=lambda node, args: f"torch.cholesky_solve({args[0]}, {args[1]})",
        aten={
            "cholesky_solve.default": cholesky_solve,
            "cholesky_inverse.default": _import_cholesky_inverse,
        },
        samples=(Sample((Arg(t(2, 3, 2)), Arg(t(2, 3, 3), "triangular"))),),
    )
)
