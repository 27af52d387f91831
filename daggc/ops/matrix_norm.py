"""``torch.linalg.norm``, ``matrix_norm`` and ``cond`` by vector norms, extrema and singular values."""

from __future__ import annotations

import math
from collections.abc import Sequence

from daggc.errors import TypeRuleError
from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ops.build import cast, full, mul, norm_dim, permute, reshape, sum_dims
from daggc.ops.reduce import Dims
from daggc.ops.vector_norm import vector_norm

Order = float | str | None


def matrix_norm(
    b: Builder, x: Value, ord: float | str, dim: Sequence[int], keepdim: bool = False, dtype: str | None = None
) -> Value:
    """A norm of matrices over two axes: fro, nuc, 2 and -2 (singular values), 1, -1, inf and -inf (sums)."""
    if dtype is not None:
        x = cast(b, x, dtype)
    first, second = (norm_dim(axis, x.type.rank) for axis in dim)
    if first == second or not x.type.differentiable:
        raise TypeRuleError(f"floats and two different axes are required, got {x.type} and {tuple(dim)}")
    if ord == "fro":
        return vector_norm(b, x, 2, (first, second), keepdim)
    if ord == "nuc" or abs(float(ord)) == 2:
        return _of_singular_values(b, x, ord, first, second, keepdim)
    if abs(float(ord)) not in (1, math.inf):
        raise TypeRuleError(f"a matrix norm of order {ord} is not one of torch's")
    if abs(float(ord)) == math.inf:
        first, second = second, first
    sums = vector_norm(b, x, 1, first, keepdim=True)
    extreme = b.emit("amax" if float(ord) > 0 else "amin", sums, dims=(second,), keepdim=True)
    return extreme if keepdim else _drop(b, extreme, first, second)


def _of_singular_values(b: Builder, x: Value, ord: float | str, first: int, second: int, keepdim: bool) -> Value:
    others = [axis for axis in range(x.type.rank) if axis not in (first, second)]
    lead = [x.type.shape[axis] for axis in others]
    s = b.emit_many("svd", permute(b, x, [*others, first, second]), full_matrices=False)[1]
    last = (s.type.rank - 1,)
    if ord == "nuc":
        result = sum_dims(b, s, last)
    elif not s.type.shape[-1]:
        raise NotImplementedError("an extreme singular value of a matrix without elements")
    else:
        result = b.emit("amax" if float(ord) > 0 else "amin", s, dims=last, keepdim=False)
    if not keepdim:
        return result
    places = iter(lead)
    return reshape(b, result, [1 if axis in (first, second) else next(places) for axis in range(x.type.rank)])


def _drop(b: Builder, x: Value, first: int, second: int) -> Value:
    return reshape(b, x, [size for axis, size in enumerate(x.type.shape) if axis not in (first, second)])


def import_matrix_norm(
    b: Builder,
    x: Value,
    ord: float | str = "fro",
    dim: Sequence[int] = (-2, -1),
    keepdim: bool = False,
    *,
    dtype: str | None = None,
) -> Value:
    return matrix_norm(b, x, ord, dim, keepdim, dtype)


def import_nuclear_norm(b: Builder, x: Value, dim: Sequence[int] | bool = (-2, -1), keepdim: bool = False) -> Value:
    """``nuclear_norm(x, keepdim)`` or ``nuclear_norm(x, dim, keepdim)``."""
    if isinstance(dim, bool):
        dim, keepdim = (-2, -1), dim
    return matrix_norm(b, x, "nuc", dim, keepdim)


def import_linalg_norm(
    b: Builder, x: Value, ord: Order = None, dim: Dims = None, keepdim: bool = False, *, dtype: str | None = None
) -> Value:
    """Of vectors over one axis or of all elements, of matrices over two axes."""
    axes = [dim] if isinstance(dim, int) else dim
    if ord is None:
        return vector_norm(b, x, 2, axes, keepdim, dtype)
    if axes is None:
        axes = list(range(x.type.rank))
    if len(axes) == 2:
        return matrix_norm(b, x, ord, axes, keepdim, dtype)
    if isinstance(ord, str) or len(axes) != 1:
        raise TypeRuleError(f"a norm of order {ord} is over one or two axes, got {axes}")
    return vector_norm(b, x, ord, axes, keepdim, dtype)


def import_cond(b: Builder, x: Value, p: Order = None) -> Value:
    """The norm times that of the inverse; infinite for a singular matrix."""
    rank = x.type.rank
    if not x.type.numel:
        return full(b, 0.0, x.type.shape[:-2], x.type.dtype)
    if p is None or (not isinstance(p, str) and abs(p) == 2):
        s = b.emit_many("svd", x, full_matrices=False)[1]
        high, low = (
            reshape(b, b.emit("slice", s, dim=rank - 2, start=at, end=at + 1, step=1), x.type.shape[:-2])
            for at in (0, s.type.shape[-1] - 1)
        )
        return b.emit("div", high, low) if p != -2 else b.emit("div", low, high)
    inverse, info = b.emit_many("inverse", x, check_errors=False)
    regular = b.emit("eq_scalar", info, value=0)
    product = mul(b, matrix_norm(b, x, p, (-2, -1)), matrix_norm(b, inverse, p, (-2, -1)))
    return b.emit("where_scalar", regular, product, value=math.inf)
