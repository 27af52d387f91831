"""``as_strided``: windows into a tensor's memory, read and written as elements of the tensor laid out in a row.

Capture sees to it that the tensor is contiguous, so that its memory is its elements in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ops.build import add, broadcast, full, reshape
from daggc.ops.iota import iota
from daggc.ops.opdef import require


def _positions(b: Builder, x: Value, size: Sequence[int], stride: Sequence[int], offset: int) -> Value:
    """Of each element of the window, its position in the flattened tensor: i64[number of elements]."""
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    inside = 0 in size or (offset >= 0 and min(stride, default=0) >= 0 and last < x.type.numel)
    require(inside, f"a window inside {x.type} is required, got {list(size)} by {list(stride)} from {offset}")
    places = full(b, offset, size, "i64")
    for axis, (length, step) in enumerate(zip(size, stride, strict=True)):
        along = iota(b, length, step=step)
        shape = [length if other == axis else 1 for other in range(len(size))]
        places = add(b, places, broadcast(b, reshape(b, along, shape), size))
    return reshape(b, places, (places.type.numel,))


def import_as_strided(
    b: Builder, x: Value, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Value:
    places = _positions(b, x, size, stride, storage_offset or 0)
    return reshape(b, b.emit("index_select", reshape(b, x, (x.type.numel,)), places, dim=0), size)


def import_as_strided_scatter(
    b: Builder, x: Value, source: Value, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Value:
    places = _positions(b, x, size, stride, storage_offset or 0)
    flat = reshape(b, x, (x.type.numel,))
    written: Any = b.emit("scatter", flat, places, reshape(b, source, (source.type.numel,)), dim=0)
    return reshape(b, written, x.type.shape)
