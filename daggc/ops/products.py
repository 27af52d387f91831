"""Importers of products that are compositions of ``matmul`` and elementwise ops, and of matrices made of parts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ops.build import (
    add,
    broadcast,
    broadcast_together,
    cast,
    full,
    kind,
    mul,
    norm_dim,
    promote_dtypes,
    reshape,
    sub,
    sum_dims,
)
from daggc.ops.concat import concat
from daggc.ops.matrices import constant_indices
from daggc.ops.slicing import diagonal, pad_dim, slice_dim


def import_kron(b: Builder, x: Value, y: Value) -> Value:
    """Every element of x times the whole of y, in the place of that element."""
    dtype = promote_dtypes(x.type.dtype, y.type.dtype)
    x, y = cast(b, x, dtype), cast(b, y, dtype)
    rank = max(x.type.rank, y.type.rank)
    first = (1,) * (rank - x.type.rank) + x.type.shape
    second = (1,) * (rank - y.type.rank) + y.type.shape
    left = reshape(b, x, [size for n in first for size in (n, 1)])
    right = reshape(b, y, [size for n in second for size in (1, n)])
    return reshape(b, mul(b, *broadcast_together(b, left, right)), [m * n for m, n in zip(first, second, strict=True)])


def import_block_diag(b: Builder, tensors: Sequence[Value]) -> Value:
    """Matrices (a vector is a row, a number a matrix of one element) along the diagonal of zeros."""
    dtype = tensors[0].type.dtype
    for x in tensors[1:]:
        dtype = promote_dtypes(dtype, x.type.dtype)
    blocks = []
    for x in tensors:
        if x.type.rank > 2:
            raise TypeRuleError(f"block_diag takes tensors of at most 2 axes, got {x.type}")
        blocks.append(reshape(b, cast(b, x, dtype), (1,) * (2 - x.type.rank) + x.type.shape))
    width, start, bands = sum(x.type.shape[1] for x in blocks), 0, []
    for x in blocks:
        bands.append(pad_dim(b, x, 1, start, width - start - x.type.shape[1]))
        start += x.type.shape[1]
    return concat(b, bands, 0)


def import_trace(b: Builder, x: Value) -> Value:
    parts = diagonal(b, x)
    return sum_dims(b, cast(b, parts, "i64") if kind(x.type.dtype) in "bi" else parts, (0,))


def import_bilinear(b: Builder, x: Value, y: Value, weight: Value, bias: Value | None = None) -> Value:
    """``x[i] weight[o, i, j] y[j]`` for each row of x and y."""
    lead, (outputs, rows, columns) = x.type.shape[:-1], weight.type.shape
    count = math.prod(lead)
    by_row = reshape(b, b.emit("permute", weight, dims=(1, 0, 2)), (rows, outputs * columns))
    left = reshape(b, b.emit("matmul", reshape(b, x, (count, rows)), by_row), (count, outputs, columns))
    result = reshape(b, b.emit("matmul", left, reshape(b, y, (count, columns, 1))), (*lead, outputs))
    return result if bias is None else add(b, result, broadcast(b, bias, result.type.shape))


def import_cross(b: Builder, x: Value, y: Value, dim: int | None = None) -> Value:
    """The cross product along an axis of size 3: the first such axis for None."""
    dtype = promote_dtypes(x.type.dtype, y.type.dtype)
    x, y = broadcast_together(b, cast(b, x, dtype), cast(b, y, dtype))
    if dim is None:
        dim = x.type.shape.index(3) if 3 in x.type.shape else 0
    dim = norm_dim(dim, x.type.rank)
    if x.type.shape[dim] != 3:
        raise TypeRuleError(f"an axis of size 3 is required, axis {dim} of {x.type} is not")
    first, second = (mul(b, _rolled(b, x, dim, i), _rolled(b, y, dim, 3 - i)) for i in (1, 2))
    return sub(b, first, second)


def import_linalg_cross(b: Builder, x: Value, y: Value, *, dim: int = -1) -> Value:
    return import_cross(b, x, y, dim)


def _rolled(b: Builder, x: Value, dim: int, start: int) -> Value:
    """x, beginning with element ``start`` of an axis."""
    size = x.type.shape[dim]
    return concat(b, (slice_dim(b, x, dim, start, size), slice_dim(b, x, dim, 0, start)), dim)


def import_vander(b: Builder, x: Value, *, N: int | None = None) -> Value:  # torch's name
    """Powers 0 to N - 1 of each element."""
    x = reshape(b, x, x.type.shape or (1,))
    count = x.type.shape[-1] if N is None else N
    x = cast(b, x, "i64" if kind(x.type.dtype) in "bi" else x.type.dtype)
    ones = full(b, 1.0 if x.type.differentiable else 1, (*x.type.shape, 1), x.type.dtype)
    if count == 1:
        return ones
    powers = broadcast(b, reshape(b, x, (*x.type.shape, 1)), (*x.type.shape, count - 1))
    return b.emit("cumprod", concat(b, (ones, powers), x.type.rank), dim=x.type.rank)


def import_chain(b: Builder, matrices: Sequence[Value]) -> Value:
    """A product in the order that takes the fewest multiplications; vectors may stand at the ends."""
    first, last = matrices[0], matrices[-1]
    chain = [*matrices]
    if first.type.rank == 1:
        chain[0] = reshape(b, first, (1, first.type.numel))
    if last.type.rank == 1:
        chain[-1] = reshape(b, last, (last.type.numel, 1))
    product = _multiply(b, chain, _splits([*(x.type.shape[0] for x in chain), chain[-1].type.shape[1]]))
    rows = () if first.type.rank == 1 else product.type.shape[:1]
    columns = () if last.type.rank == 1 else product.type.shape[1:]
    return reshape(b, product, (*rows, *columns))


def _splits(sizes: Sequence[int]) -> dict[tuple[int, int], int]:
    """Where to split each run of matrices, by dynamic programming; matrix i is ``sizes[i]`` by ``sizes[i + 1]``."""
    count = len(sizes) - 1
    costs = {(i, i): 0 for i in range(count)}
    splits: dict[tuple[int, int], int] = {}
    for length in range(1, count):
        for i in range(count - length):
            j = i + length
            costs[i, j], splits[i, j] = min(
                (costs[i, k] + costs[k + 1, j] + sizes[i] * sizes[k + 1] * sizes[j + 1], k) for k in range(i, j)
            )
    return splits


def _multiply(b: Builder, chain: Sequence[Value], splits: dict[tuple[int, int], int]) -> Value:
    def product(i: int, j: int) -> Value:
        if i == j:
            return chain[i]
        middle = splits[i, j]
        return b.emit("matmul", product(i, middle), product(middle + 1, j))

    return product(0, len(chain) - 1)


def import_triangle_indices(upper: bool):
    """torch.triu_indices or torch.tril_indices: rows above columns, in order."""

    def importer(
        b: Builder, rows: int, columns: int, offset: int = 0, *, dtype: str | None = "i64", **_: object
    ) -> Value:
        if rows * columns > 2**16:
            raise NotImplementedError("indices that are part of the program's text are few")
        mask = np.fromfunction(lambda i, j: (j - i >= offset) if upper else (j - i <= offset), (rows, columns))
        places = np.stack(np.nonzero(np.broadcast_to(mask, (rows, columns))))
        return cast(b, constant_indices(b, places), dtype or "i64")

    return importer
