"""Accumulating by index, in an order that does not depend on how threads are scheduled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def index_put(base: Tensor, dims: Sequence[int], indices: Sequence[Tensor], values: Tensor, accumulate: bool) -> Tensor:
    """``base`` with ``values`` put, or added, where integer tensors index the axes ``dims``.

    torch adds f32 on the CPU with atomics once several threads share the work, in an order of their own;
    here each element is summed in the order of the indices.
    """
    if accumulate and base.device.type == "cpu" and base.dtype == torch.float32 and values.numel():
        return base + _sum_by_index(base, dims, indices, values)
    positions: list[Tensor | None] = [None] * base.dim()
    for dim, index in zip(dims, indices, strict=True):
        positions[dim] = index
    return torch.ops.aten.index_put.default(base, positions, values, accumulate)


def _sum_by_index(base: Tensor, dims: Sequence[int], indices: Sequence[Tensor], values: Tensor) -> Tensor:
    """The sum of the values at each index; zero where there are none. Indexed axes are merged into rows."""
    others = [dim for dim in range(base.dim()) if dim not in dims]
    sizes = [base.shape[dim] for dim in dims]
    linear = torch.zeros_like(indices[0])
    for index, size in zip(indices, sizes, strict=True):
        if bool(((index < -size) | (index >= size)).any()):
            raise IndexError(f"an index is out of bounds for an axis of size {size}")
        linear = linear * size + torch.where(index < 0, index + size, index)
    rank = linear.dim()
    adjacent = list(dims) == list(range(dims[0], dims[0] + len(dims)))
    first = dims[0] if adjacent else 0
    values = values.movedim(tuple(range(first, first + rank)), tuple(range(rank)))
    rows = 1
    for size in sizes:
        rows *= size
    values, linear = values.reshape(linear.numel(), -1), linear.reshape(-1)
    if values.shape[1] == 1:
        total = values.new_zeros(rows).index_add_(0, linear, values[:, 0])
    else:
        total = torch.ops.aten.embedding_dense_backward(values, linear, rows, -1, False)
    order = [*dims, *others]
    total = total.reshape([*sizes, *(base.shape[dim] for dim in others)])
    return total.permute([order.index(dim) for dim in range(base.dim())])
