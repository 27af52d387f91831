"""Least squares: ``torch.linalg.lstsq``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.linalg

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import broadcast, mul, reshape, sub, sum_dims
from daggc.ops.eigen import pinv, pinv_pullback
from daggc.ops.matrices import (
    EPS,
    REAL,
    adjoint,
    batch_axes,
    broadcast_batches,
    cubic_cost,
    matmul,
    per_matrix,
    require_matrices,
    zeros,
)
from daggc.ops.opdef import Arg, Axes, OpDef, Sample, register, require, scalar, t
from daggc.ops.shape import Cotangents
from daggc.ops.slicing import slice_dim

_DRIVERS = {"gels": 1, "gelsy": 2, "gelsd": 3, "gelss": 3}  # and how much they tell: solution, rank, singular values


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (a, b), driver, rcond = inputs, attrs["driver"], attrs["rcond"]
    require_matrices(a, dtypes=REAL)
    require(len(attrs) == 2 and driver in _DRIVERS, f"driver must be one of {', '.join(_DRIVERS)}, got {driver!r}")
    require(isinstance(rcond, float), f"rcond must be a float, got {rcond!r}")
    require(a.dtype == b.dtype and a.rank == b.rank, f"one dtype and rank are required, got {a} and {b}")
    require(a.shape[:-1] == b.shape[:-1], f"as many equations on both sides are required, got {a} and {b}")
    lead, rows, columns = a.shape[:-2], *a.shape[-2:]
    solution = b.with_(shape=(*lead, columns, b.shape[-1]))
    outputs = solution, TensorType("i64", lead), a.with_(shape=(*lead, min(rows, columns)))
    return outputs[: _DRIVERS[driver]]


def _one(node: Node, a: np.ndarray, b: np.ndarray) -> tuple[Any, ...]:
    driver = node.attrs["driver"] if node.attrs["driver"] != "gels" else "gelsd"
    result: Any = scipy.linalg.lstsq(a, b, cond=node.attrs["rcond"], lapack_driver=driver)
    return (result[0], *result[2:])[: len(node.outputs)]


def _vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """By the pseudo-inverse, for matrices of full rank; the singular values come without a derivative, as in torch."""
    ct, (a, right) = cts[0], node.inputs
    if ct is None:
        return None, None
    inverse = pinv(b, a)
    return pinv_pullback(b, a, inverse, matmul(b, ct, adjoint(b, right))), matmul(b, adjoint(b, inverse), ct)


def _axes(node: Node) -> Axes:
    return batch_axes(2, 2, *(2, 0, 1)[: len(node.outputs)])(node)


def _import(
    b: Builder, a: Value, right: Value, rcond: float | None = None, *, driver: str | None = None
) -> tuple[Value, ...]:
    """Residuals where the system is overdetermined and the driver gives them: NaN for a matrix of lower rank.

    (Eager gives an empty tensor then: a shape that depends on data.)
    """
    driver = driver or "gelsy"
    vectors = right.type.rank == a.type.rank - 1
    columns = reshape(b, right, (*right.type.shape, 1)) if vectors else right
    a, columns = broadcast_batches(b, a, columns)
    rows, size = a.type.shape[-2:]
    rcond = EPS[a.type.dtype] * max(rows, size) if rcond is None else float(rcond)
    solution, *rest = b.emit_many("lstsq", a, columns, driver=driver, rcond=rcond)
    residuals = slice_dim(b, reshape(b, a, (a.type.numel,)), 0, 0, 0)  # empty, and as in eager a function of a
    if rows > size and driver != "gelsy":
        gap = sub(b, matmul(b, a, solution), columns)
        residuals = sum_dims(b, mul(b, gap, gap), (gap.type.rank - 2,))
        if rest:
            full = b.emit("eq_scalar", rest[0], value=size)
            mask = broadcast(b, reshape(b, full, (*full.type.shape, 1)), residuals.type.shape)
            residuals = b.emit("where_scalar", mask, residuals, value=float("nan"))
    if vectors:
        solution = reshape(b, solution, solution.type.shape[:-1])
    rank = rest[0] if rest else b.emit("full", value=0, shape=(0,), dtype="i64")
    sizes = b.emit("stop_gradient", rest[1]) if len(rest) > 1 else zeros(b, a.type, (0,))
    return solution, residuals, rank, sizes


register(
    OpDef(
        name="lstsq",
        infer=_infer,
        evaluate=per_matrix(_one),
        vjp=_vjp,
        cost=cubic_cost(4),
        axes=_axes,
        lower=lambda node, args: (
            f"kernels.lstsq({', '.join(args)}, {scalar(node.attrs['rcond'])}, {node.attrs['driver']!r})"
        ),
        aten={"lstsq.default": _import},
        samples=(
            Sample((Arg(t(2, 4, 2), "regular"), Arg(t(2, 4, 3))), {"driver": "gelsy", "rcond": 1e-6}),
            Sample((Arg(t(2, 2, 3), "regular"), Arg(t(2, 2, 1))), {"driver": "gels", "rcond": 1e-6}),
        ),
    )
)
