"""The exponential of matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node
from daggc.ir.types import TensorType
from daggc.ops.build import zeros_like
from daggc.ops.concat import concat
from daggc.ops.matrices import (
    adjoint,
    batch_axes,
    cubic_cost,
    require_flags,
    require_matrices,
    right_columns,
    top_rows,
    widened,
)
from daggc.ops.opdef import AS_IT_IS, Arg, OpDef, Sample, register, t
from daggc.ops.shape import Cotangents

_NEAR = 0.5  # the norm of a matrix that the polynomial is good for
_TERMS = 18  # 0.5 ** 18 / 18! is no rounding any more


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require_matrices(x, square=True)
    require_flags(attrs)
    return (x,)


def _evaluate(node: Node, x: np.ndarray) -> np.ndarray:
    return _exponential(widened(x)).astype(x.dtype) if x.size else x


def _exponential(x: np.ndarray) -> np.ndarray:
    """Scaling and squaring of a Taylor polynomial, as torch has it.

    That is good to tens of roundings; SciPy's ``expm`` is off by thousands where entries are almost alike.
    """
    if x.shape[-1] == 1:
        return np.exp(x)
    size = np.abs(x).sum(-2).max(-1)
    halvings = np.ceil(np.log2(np.maximum(np.where(np.isfinite(size), size, 0.0) / _NEAR, 1.0)))[..., None, None]
    scaled = x * 2.0**-halvings
    identity = np.eye(x.shape[-1], dtype=x.dtype)
    result = identity + scaled / _TERMS
    for term in range(_TERMS - 1, 0, -1):
        result = identity + scaled @ result / term
    for done in range(int(halvings.max())):
        result = np.where(done < halvings, result @ result, result)
    return np.where(np.isfinite(size)[..., None, None], result, np.nan)


def _vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """The upper right block of ``exp([[x^H, ct], [0, x^H]])`` (Mathias 1996)."""
    (ct,), (x,) = cts, node.inputs
    assert ct is not None
    rank, size = x.type.rank, x.type.shape[-1]
    flipped = adjoint(b, x)
    upper = concat(b, (flipped, ct), rank - 1)
    lower = concat(b, (zeros_like(b, x), flipped), rank - 1)
    result = b.emit("matrix_exp", concat(b, (upper, lower), rank - 2))
    return (right_columns(b, top_rows(b, result, size), size),)


register(
    OpDef(
        name="matrix_exp",
        infer=_infer,
        evaluate=_evaluate,
        vjp=_vjp,
        complex=AS_IT_IS,
        cost=cubic_cost(20),
        axes=batch_axes(2, 2),
        lower=lambda node, args: f"torch.linalg.matrix_exp({args[0]})",
        aten=dict.fromkeys(("matrix_exp.default", "linalg_matrix_exp.default"), lambda b, x: b.emit("matrix_exp", x)),
        samples=(Sample((Arg(t(2, 2, 2)),)), Sample((Arg(t(3, 3), "regular"),))),
    )
)
