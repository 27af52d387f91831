"""``x[i, :, j]`` with integer tensors, read and written.

The indices have one shape (importers broadcast them) and index the axes ``dims``. As in NumPy and torch, the
axes of the index take the place of the indexed axes if those are adjacent, and come first if they are not.
Negative indices count from the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import (
    Scalar,
    add,
    broadcast,
    broadcast_together,
    cast,
    full,
    norm_dim,
    reshape,
    zeros_like,
)
from daggc.ops.indexing import require_room
from daggc.ops.iota import iota
from daggc.ops.opdef import (
    AS_IT_IS,
    REGISTRY,
    Arg,
    Axes,
    OpDef,
    Sample,
    copy_cost,
    elementwise_cost,
    letters,
    register,
    require,
    t,
    upcast,
)
from daggc.ops.shape import Cotangents, movedim, whole_along

T = TypeVar("T")
Label = str | None


def _place(dims: Sequence[int]) -> int:
    """Where the axes of the index go in the result."""
    return dims[0] if list(dims) == list(range(dims[0], dims[0] + len(dims))) else 0


def _around(axes: Sequence[T], dims: Sequence[int], inserted: Sequence[T]) -> tuple[T, ...]:
    """The axes that are not indexed, with ``inserted`` where the axes of the index go."""
    kept = [axis for dim, axis in enumerate(axes) if dim not in dims]
    place = _place(dims)
    return (*kept[:place], *inserted, *kept[place:])


def _infer_index(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, *indices = inputs
    dims = attrs["dims"]
    known = bool(dims) and list(dims) == sorted(set(dims)) and dims[0] >= 0 and dims[-1] < x.rank
    require(known and len(dims) == len(indices), f"dims must be sorted axes of {x}, one for each index, got {dims}")
    one_type = len(set(indices)) == 1 and indices[0].dtype == "i64"
    require(one_type, f"i64 indices of one shape are required, got {', '.join(map(str, indices))}")
    require_room(indices[0], min(x.shape[dim] for dim in dims))
    return (x.with_(shape=_around(x.shape, dims, indices[0].shape)),)


def _infer_index_put(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    base, *indices, values = inputs
    (wanted,) = _infer_index((base, *indices), attrs)
    require(values == wanted, f"values of type {wanted} are required, got {values}")
    require(isinstance(attrs["accumulate"], bool), f"accumulate must be a bool, got {attrs['accumulate']!r}")
    return (base,)


def _index_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    (ct,), (x, *indices) = cts, node.inputs
    assert ct is not None
    put = b.emit("index_put", zeros_like(b, x), *indices, ct, dims=node.attrs["dims"], accumulate=True)
    return put, *(None for _ in indices)


def _index_put_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    (ct,), (_, *indices, values), dims = cts, node.inputs, node.attrs["dims"]
    assert ct is not None
    outside = ct
    if not node.attrs["accumulate"]:
        outside = b.emit("index_put", ct, *indices, zeros_like(b, values), dims=dims, accumulate=False)
    return outside, *(None for _ in indices), b.emit("index", ct, *indices, dims=dims)


def _key(node: Node, indices: Sequence[np.ndarray]) -> tuple[slice | np.ndarray, ...]:
    key: list[slice | np.ndarray] = [slice(None)] * node.inputs[0].type.rank
    for dim, index in zip(node.attrs["dims"], indices, strict=True):
        key[dim] = index
    return tuple(key)


def _evaluate_index_put(node: Node, base: np.ndarray, *rest: np.ndarray) -> np.ndarray:
    *indices, values = rest
    result, key = base.copy(), _key(node, indices)
    if node.attrs["accumulate"]:
        np.add.at(result, key, values)  # pyright: ignore[reportArgumentType]  # a tuple is one key
    else:
        result[key] = values
    return result


def _index_axes(node: Node) -> Axes:
    x, *indices = (value.type for value in node.inputs)
    dims = node.attrs["dims"]
    index = tuple(f"i{axis}" for axis in range(indices[0].rank))
    result: tuple[Label, ...] = _around(letters(x.rank), dims, index)
    return Axes((whole_along(dims, x.rank), *(index for _ in indices)), (result,))


def _index_put_axes(node: Node) -> Axes:
    base, *indices, _ = (value.type for value in node.inputs)
    dims = node.attrs["dims"]
    index: tuple[Label, ...] = (None,) * indices[0].rank
    labels: tuple[Label, ...] = letters(base.rank)
    kept = whole_along(dims, base.rank)
    return Axes((kept, *(index for _ in indices), _around(labels, dims, index)), (kept,))


def _lower_index(node: Node, args: Sequence[str]) -> str:
    positions = dict(zip(node.attrs["dims"], args[1:], strict=True))
    key = [positions.get(dim, "None") for dim in range(node.attrs["dims"][-1] + 1)]
    return f"torch.ops.aten.index.Tensor({args[0]}, [{', '.join(key)}])"


def _lower_index_put(node: Node, args: Sequence[str]) -> str:
    indices = ", ".join(args[1:-1])
    return f"kernels.index_put({args[0]}, {node.attrs['dims']}, ({indices},), {args[-1]}, {node.attrs['accumulate']})"


# --- importers ----------------------------------------------------------------------------------------


def _integer_indices(b: Builder, indices: Sequence[Value | None]) -> tuple[tuple[int, ...], tuple[Value, ...]]:
    """The indexed axes and their indices, of one shape. Raises TypeRuleError for masks."""
    dims = tuple(dim for dim, index in enumerate(indices) if index is not None)
    given = [index for index in indices if index is not None]
    for index in given:
        if index.type.dtype in ("bool", "u8"):
            raise TypeRuleError(
                f"integer indices are required: the mask {index.type} gives a tensor of data-dependent shape; "
                "torch.where or masked_fill do without"
            )
    return dims, broadcast_together(b, *(cast(b, index, "i64") for index in given))


def _import_index(b: Builder, x: Value, indices: Sequence[Value | None]) -> Value:
    dims, given = _integer_indices(b, indices)
    return b.emit("index", x, *given, dims=dims) if dims else x


def _import_index_put(
    b: Builder, base: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False
) -> Value:
    values = cast(b, values, base.type.dtype)
    masks = [index for index in indices if index is not None and index.type.dtype in ("bool", "u8")]
    if masks:
        return _put_by_mask(b, base, indices, values, accumulate)
    dims, given = _integer_indices(b, indices)
    if not dims:
        values = broadcast(b, values, base.type.shape)
        return add(b, base, values) if accumulate else values
    shape = _around(base.type.shape, dims, given[0].type.shape)
    return b.emit("index_put", base, *given, broadcast(b, values, shape), dims=dims, accumulate=accumulate)


def _put_by_mask(b: Builder, base: Value, indices: Sequence[Value | None], values: Value, accumulate: bool) -> Value:
    """``x[mask] = values`` where each place gets the same values: a choice, without counting the mask."""
    given = [index for index in indices if index is not None]
    lead = next(dim for dim, index in enumerate(indices) if index is not None)
    mask = given[0]
    tail = base.type.rank - lead - mask.type.rank
    # The axis of chosen places, whose length depends on data, is the one before the last `tail` axes.
    chosen = values.type.shape[-tail - 1 : -tail or None] if values.type.rank > tail else (1,)
    if len(given) > 1 or chosen != (1,):
        raise TypeRuleError(
            f"one mask and values that do not depend on the place are required, got values {values.type} "
            f"for the mask {mask.type}, whose number of places is data-dependent"
        )
    if values.type.rank > tail:
        first = values.type.shape[: values.type.rank - tail - 1]
        last = values.type.shape[values.type.rank - tail :]
        values = reshape(b, values, (*first, *(1,) * mask.type.rank, *last))
    mask = cast(b, mask, "bool")
    mask = broadcast(b, reshape(b, mask, (*mask.type.shape, *(1,) * tail)), base.type.shape)
    values = broadcast(b, values, base.type.shape)
    return b.emit("where", mask, add(b, base, values) if accumulate else values, base)


def _import_index_copy(b: Builder, base: Value, dim: int, index: Value, source: Value) -> Value:
    if not base.type.rank:
        put = _import_index_copy(b, reshape(b, base, (1,)), 0, index, reshape(b, source, (source.type.numel,)))
        return reshape(b, put, ())
    dim = norm_dim(dim, base.type.rank)
    index = reshape(b, cast(b, index, "i64"), (index.type.numel,))
    source = reshape(b, source, _around(base.type.shape, (dim,), index.type.shape))
    return b.emit("index_put", base, index, source, dims=(dim,), accumulate=False)


def _import_index_fill(b: Builder, base: Value, dim: int, index: Value, value: Value | Scalar) -> Value:
    """A choice by a mask: what is named twice gives the value its cotangent once, as in torch."""
    dim = norm_dim(dim, base.type.rank)
    size = base.type.shape[dim] if base.type.rank else 1
    index = reshape(b, cast(b, index, "i64"), (index.type.numel,))
    named = full(b, True, index.type.shape, "bool")
    mask = b.emit("index_put", full(b, False, (size,), "bool"), index, named, dims=(0,), accumulate=False)
    mask = reshape(b, mask, [size if axis == dim else 1 for axis in range(base.type.rank)])
    if not isinstance(value, Value):
        value = full(b, value, (), base.type.dtype)
    shape = base.type.shape
    return b.emit("where", broadcast(b, mask, shape), broadcast(b, cast(b, value, base.type.dtype), shape), base)


def _import_put(b: Builder, base: Value, index: Value, source: Value, accumulate: bool = False) -> Value:
    """Into the flattened tensor."""
    flat, index = reshape(b, base, (base.type.numel,)), cast(b, index, "i64")
    source = reshape(b, source, index.type.shape)
    put = b.emit("index_put", flat, index, source, dims=(0,), accumulate=accumulate)
    return reshape(b, put, base.type.shape)


def _clamped(b: Builder, x: Value, indices: Sequence[Value | None], from_end: bool) -> list[Value | None]:
    """Indices into the axes of x, moved to the nearest element that there is."""
    result: list[Value | None] = []
    for size, index in zip(x.type.shape, indices, strict=False):
        bounds = (-size if from_end else 0, size - 1)
        result.append(index if index is None else REGISTRY.importers["clamp.default"](b, index, *bounds))
    return result


def _import_masked_index(b: Builder, x: Value, mask: Value, indices: Sequence[Value | None], fill: Scalar) -> Value:
    """``_unsafe_masked_index``: an index that may be out of bounds where the mask does not hold."""
    if not x.type.numel:
        raise NotImplementedError("_unsafe_masked_index into nothing")
    taken = _import_index(b, x, _clamped(b, x, indices, from_end=False))
    return REGISTRY.importers["masked_fill.Scalar"](b, taken, b.emit("logical_not", mask), fill)


def _import_masked_put(b: Builder, x: Value, mask: Value, indices: Sequence[Value | None], values: Value) -> Value:
    if not x.type.numel:
        return x
    kept = REGISTRY.importers["masked_fill.Scalar"](b, values, b.emit("logical_not", mask), 0)
    return _import_index_put(b, x, _clamped(b, x, indices, from_end=True), kept, accumulate=True)


def _import_take(b: Builder, x: Value, index: Value) -> Value:
    return b.emit("index", reshape(b, x, (x.type.numel,)), cast(b, index, "i64"), dims=(0,))


def import_unfold(b: Builder, x: Value, dim: int, size: int, step: int) -> Value:
    """``Tensor.unfold``: windows along an axis, whose elements become a new last axis."""
    if not x.type.rank:
        return reshape(b, x, (1,))
    dim = norm_dim(dim, x.type.rank)
    count = (x.type.shape[dim] - size) // step + 1
    starts = broadcast(b, reshape(b, iota(b, count, step=step), (count, 1)), (count, size))
    windows = add(b, starts, broadcast(b, iota(b, size), (count, size)))
    return movedim(b, b.emit("index", x, windows, dims=(dim,)), dim + 1, -1)


def _index(*shape: int, below: int) -> Arg:
    return Arg(t(*shape, dtype="i64"), f"index:{below}")


register(
    OpDef(
        name="index",
        infer=_infer_index,
        evaluate=lambda node, x, *indices: x[_key(node, indices)],
        vjp=_index_vjp,
        complex=AS_IT_IS,
        cost=copy_cost,
        axes=_index_axes,
        lower=_lower_index,
        aten={
            "index.Tensor": _import_index,
            "_unsafe_index.Tensor": _import_index,
            "take.default": _import_take,
            **dict.fromkeys(("unfold.default", "unfold_copy.default"), import_unfold),
            "_unsafe_masked_index.default": _import_masked_index,
        },
        samples=(
            Sample((Arg(t(4, 3)), _index(5, below=4)), {"dims": (0,)}),
            Sample((Arg(t(2, 3, 4)), _index(2, 2, below=3), _index(2, 2, below=4)), {"dims": (1, 2)}),
            Sample((Arg(t(2, 3, 4)), _index(5, below=2), _index(5, below=4)), {"dims": (0, 2)}),
        ),
    )
)
register(
    OpDef(
        name="index_put",
        infer=_infer_index_put,
        evaluate=upcast(_evaluate_index_put),
        vjp=_index_put_vjp,
        complex=AS_IT_IS,
        cost=elementwise_cost(1),
        axes=_index_put_axes,
        lower=_lower_index_put,
        aten=dict.fromkeys(("index_put.default", "_unsafe_index_put.default"), _import_index_put)
        | {
            "index_copy.default": _import_index_copy,
            "put.default": _import_put,
            "_unsafe_masked_index_put_accumulate.default": _import_masked_put,
            "index_fill.int_Scalar": _import_index_fill,
            "index_fill.int_Tensor": _import_index_fill,
        },
        samples=(
            Sample((Arg(t(4, 3)), _index(5, below=4), Arg(t(5, 3))), {"dims": (0,), "accumulate": True}),
            Sample(
                (Arg(t(2, 3, 4)), _index(5, below=2), _index(5, below=4), Arg(t(5, 3))),
                {"dims": (0, 2), "accumulate": True},
            ),
            # One index: where indices repeat, the result is any of the values.
            Sample((Arg(t(4, 3)), _index(1, below=3), Arg(t(4, 1))), {"dims": (1,), "accumulate": False}),
        ),
    )
)
