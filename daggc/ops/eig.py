"""Eigenvalues of general matrices: complex numbers, also of real matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node
from daggc.ir.types import TensorType
from daggc.ops.build import add, conj, sub
from daggc.ops.complex_numbers import make_complex, real
from daggc.ops.matrices import (
    REAL,
    adjoint,
    batch_axes,
    columns_times,
    cubic_cost,
    diagonal_matrix,
    diagonal_of,
    differences,
    matmul,
    off_diagonal,
    require_flags,
    require_matrices,
    rows_times,
)
from daggc.ops.opdef import AS_IT_IS, Arg, OpDef, Sample, register, t
from daggc.ops.shape import Cotangents

_COMPLEX = {"f32": "c64", "f64": "c128"}


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require_matrices(x, square=True, dtypes=REAL)  # eigenvectors of complex matrices have a phase of their own
    require_flags(attrs)
    vectors = x.with_(dtype=_COMPLEX.get(x.dtype, x.dtype))
    return vectors.with_(shape=x.shape[:-1]), vectors


def _evaluate(node: Node, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """LAPACK's ``geev``. Signs and phases of eigenvectors are its choice; libraries differ in them."""
    values, vectors = np.linalg.eig(x)
    return tuple(
        part.astype(value.type.numpy_dtype) for part, value in zip((values, vectors), node.outputs, strict=True)
    )


def _vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """Boeddeker et al. 2019, eq. 4.77: ``V^-H (diag(values_ct) + (V^H V_ct - V^H V diag(re V^H V_ct)) / E^*) V^H``.

    Eigenvectors have norm 1; a function of their phases has no derivative.
    """
    (values_ct, vectors_ct), (values, v), (x,) = cts, node.outputs, node.inputs
    flipped = adjoint(b, v)
    if vectors_ct is None:
        if values_ct is None:
            return (None,)
        right = rows_times(b, values_ct, flipped)
    else:
        inner = matmul(b, flipped, vectors_ct)
        lengths = make_complex(b, real(b, diagonal_of(b, inner)))
        inner = sub(b, inner, matmul(b, flipped, columns_times(b, v, lengths)))
        gaps = off_diagonal(b, differences(b, conj(b, values)), 1.0)
        inner = off_diagonal(b, b.emit("div", inner, gaps), 0.0)
        if values_ct is not None:
            inner = add(b, inner, diagonal_matrix(b, values_ct))
        right = matmul(b, inner, flipped)
    x_ct = b.emit_many("solve", flipped, right, check_errors=False)[0]
    return (x_ct if x.type.is_complex else real(b, x_ct),)


register(
    OpDef(
        name="eig",
        infer=_infer,
        evaluate=_evaluate,
        vjp=_vjp,
        complex=AS_IT_IS,
        cost=cubic_cost(25),
        axes=batch_axes(2, 1, 2),
        lower=lambda node, args: f"torch.linalg.eig({args[0]})",
        aten={
            "linalg_eig.default": lambda b, x: b.emit_many("eig", x),
            "linalg_eigvals.default": lambda b, x: b.emit_many("eig", x)[0],
        },
        samples=(Sample((Arg(t(2, 2, 2), "hermitian"),)),),
    )
)
