"""The Bunch-Kaufman factors of symmetric matrices, packed as LAPACK's ``sytrf`` leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.matrices import (
    REAL,
    batch_axes,
    broadcast_batches,
    check,
    cubic_cost,
    info_type,
    lapack,
    per_matrix,
    require_flags,
    require_matrices,
    require_system,
)
from daggc.ops.opdef import NOT_DIFFERENTIABLE, Arg, OpDef, Sample, register, require, t


def _infer_factor(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require_matrices(x, square=True, dtypes=REAL)
    require_flags(attrs, "check_errors")
    return x, TensorType("i32", x.shape[:-1]), info_type(x)


def _factor_one(node: Node, x: np.ndarray) -> tuple[Any, ...]:
    factors, pivots, info = lapack("sytrf", x, lower=1)
    check(node, info, "singular")
    return np.tril(factors), pivots, info


def _import_factor_ex(
    b: Builder, x: Value, *, hermitian: bool = False, check_errors: bool = False
) -> tuple[Value, ...]:
    """Of real matrices, hermitian or not is one."""
    return b.emit_many("ldl_factor", x, check_errors=check_errors)


register(
    OpDef(
        name="ldl_factor",
        infer=_infer_factor,
        evaluate=per_matrix(_factor_one),
        vjp=NOT_DIFFERENTIABLE,
        cost=cubic_cost(1 / 3),
        axes=batch_axes(2, 2, 1, 0),
        lower=lambda node, args: f"torch.linalg.ldl_factor_ex({args[0]}, check_errors={node.attrs['check_errors']})",
        aten={
            "linalg_ldl_factor_ex.default": _import_factor_ex,
            "linalg_ldl_factor.default": lambda b, x, *, hermitian=False: _import_factor_ex(b, x, check_errors=True)[
                :2
            ],
        },
        samples=(Sample((Arg(t(2, 3, 3), "hermitian"),), {"check_errors": False}),),
    )
)


def _infer_solve(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    factors, pivots, b = inputs
    require_matrices(factors, dtypes=REAL)
    require_system(factors, b)
    require_flags(attrs)
    wanted = TensorType("i32", factors.shape[:-1])
    require(pivots == wanted, f"pivots of type {wanted} are required, got {pivots}")
    return (b,)


def _solve_one(node: Node, factors: np.ndarray, pivots: np.ndarray, b: np.ndarray) -> tuple[Any]:
    """``L D L^T x = b``, with blocks of 2 in D where two neighbouring pivots are negative; Golub and Van Loan 4.4."""
    size = len(factors)
    x, blocks, row = b.copy(), [], 0
    while row < size:
        width = 2 if pivots[row] < 0 and row + 1 < size else 1
        first = row + width - 1
        swap = int(np.clip(abs(pivots[first]), first + 1, size)) - 1
        blocks.append((row, width, swap))
        x[[first, swap]] = x[[swap, first]]
        x[row + width :] -= factors[row + width :, row : row + width] @ x[row : row + width]
        row += width
    for row, width, _ in blocks:
        block = np.tril(factors[row : row + width, row : row + width])
        x[row : row + width] = np.linalg.solve(block + np.tril(block, -1).T, x[row : row + width])
    for row, width, swap in reversed(blocks):
        x[row : row + width] -= factors[row + width :, row : row + width].T @ x[row + width :]
        first = row + width - 1
        x[[first, swap]] = x[[swap, first]]
    return (x,)


def _import_solve(b: Builder, factors: Value, pivots: Value, right: Value, *, hermitian: bool = False) -> Value:
    factors, right = broadcast_batches(b, factors, right)
    wide = b.emit("broadcast", pivots, shape=factors.type.shape[:-1]) if factors.type.rank > 2 else pivots
    return b.emit("ldl_solve", factors, wide, right)


register(
    OpDef(
        name="ldl_solve",
        infer=_infer_solve,
        evaluate=per_matrix(_solve_one),
        vjp=NOT_DIFFERENTIABLE,
        cost=cubic_cost(2),
        axes=batch_axes(2, 1, 2, 2),
        lower=lambda node, args: f"kernels.ldl_solve({', '.join(args)})",
        aten={"linalg_ldl_solve.default": _import_solve},
        samples=(Sample((Arg(t(2, 3, 3), "hermitian"), Arg(t(2, 3, dtype="i32"), "count"), Arg(t(2, 3, 2)))),),
    )
)
