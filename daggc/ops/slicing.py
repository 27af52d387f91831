"""Parts of tensors: slice, functional update of a slice, split.

Indices in attributes are canonical: ``0 <= start <= end <= size`` and ``step >= 1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import (
    Scalar,
    broadcast,
    cast,
    full,
    kind,
    norm_dim,
    reshape,
    zeros_like,
)
from daggc.ops.opdef import AS_IT_IS, Axes, Importer, OpDef, copy_cost, register, require, sample, view_cost
from daggc.ops.shape import Cotangents, movedim, unsqueeze, whole_along

# --- slice --------------------------------------------------------------------------------------------


def _part_shape(x: TensorType, attrs: Attrs) -> tuple[int, ...]:
    """The shape of a slice. Raises TypeRuleError if the attributes are not canonical."""
    dim, start, end, step = attrs["dim"], attrs["start"], attrs["end"], attrs["step"]
    require(0 <= dim < x.rank, f"dim must be an axis of {x}, got {dim}")
    fits = 0 <= start <= end <= x.shape[dim] and step >= 1
    require(fits, f"0 <= start <= end <= {x.shape[dim]} and step >= 1 are required, got {start}, {end}, {step}")
    return (*x.shape[:dim], -(-(end - start) // step), *x.shape[dim + 1 :])


def _infer_slice(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    return (x.with_(shape=_part_shape(x, attrs)),)


def _slice_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """Zeros around the cotangent: one ``pad`` where the slice has no gaps."""
    (ct,), (x,), attrs = cts, node.inputs, node.attrs
    assert ct is not None
    if attrs["step"] != 1:
        return (b.emit("slice_update", zeros_like(b, x), ct, **attrs),)
    after = x.type.shape[attrs["dim"]] - attrs["end"]
    return (pad_dim(b, ct, attrs["dim"], attrs["start"], after),)


def _slices(attrs: Attrs) -> tuple[slice, ...]:
    return (slice(None),) * attrs["dim"] + (slice(attrs["start"], attrs["end"], attrs["step"]),)


def _slice_args(attrs: Attrs) -> str:
    return ", ".join(str(attrs[name]) for name in ("dim", "start", "end", "step"))


def _lower_slice(node: Node, args: Sequence[str]) -> str:
    attrs = node.attrs
    if attrs["step"] == 1:
        return f"{args[0]}.narrow({attrs['dim']}, {attrs['start']}, {attrs['end'] - attrs['start']})"
    return f"torch.ops.aten.slice.Tensor({args[0]}, {_slice_args(attrs)})"


def axes_but_dim(node: Node) -> Axes:
    """All axes pass but ``dim``, which is needed whole."""
    labels = tuple(whole_along((node.attrs["dim"],), value.type.rank) for value in node.inputs)
    return Axes(labels, tuple(whole_along((node.attrs["dim"],), value.type.rank) for value in node.outputs))


def slice_dim(b: Builder, x: Value, dim: int, start: int, end: int, step: int = 1) -> Value:
    """``x[start:end:step]`` along an axis; nothing where that is all of x."""
    if (start, end, step) == (0, x.type.shape[dim], 1):
        return x
    return b.emit("slice", x, dim=dim, start=start, end=end, step=step)


def _bounds(size: int, start: int | None, end: int | None) -> tuple[int, int]:
    """Canonical bounds, as Python's slices have them."""
    first, last, _ = slice(start, end).indices(size)
    return first, max(first, last)


def _import_slice(
    b: Builder, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    dim = norm_dim(dim, x.type.rank)
    return slice_dim(b, x, dim, *_bounds(x.type.shape[dim], start, end), step)


def select(b: Builder, x: Value, dim: int, index: int) -> Value:
    """``x[index]`` along an axis, which vanishes."""
    dim = norm_dim(dim, x.type.rank)
    index = _index(x, dim, index)
    return reshape(b, slice_dim(b, x, dim, index, index + 1), x.type.shape[:dim] + x.type.shape[dim + 1 :])


def pad_dim(b: Builder, x: Value, dim: int, before: int, after: int, value: Scalar | None = None) -> Value:
    """A constant (zero by default) before and after x along an axis."""
    if not before and not after:
        return x
    pads = [(before, after) if axis == dim else (0, 0) for axis in range(x.type.rank)]
    return b.emit("pad", x, pads=tuple(pads), value=pad_value(x, value))


def pad_value(x: Value, value: Scalar | None) -> Scalar:
    """The constant (zero by default) as a number of x's kind."""
    if isinstance(value, complex) and x.type.is_complex:
        return value
    return {"b": bool, "i": int}.get(kind(x.type.dtype), float)(value or 0)


def _index(x: Value, dim: int, index: int) -> int:
    size = x.type.shape[dim]
    require(-size <= index < size, f"an index into axis {dim} of {x.type} is required, got {index}")
    return index % size


def _import_narrow(b: Builder, x: Value, dim: int, start: int, length: int) -> Value:
    dim = norm_dim(dim, x.type.rank)
    start = start + x.type.shape[dim] if start < 0 else start
    return slice_dim(b, x, dim, start, start + length)


def _import_slice_backward(
    b: Builder, ct: Value, sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> Value:
    zeros = full(b, 0.0, sizes, ct.type.dtype)
    return _import_slice_scatter(b, zeros, ct, dim, start, end, step)


def _import_select_backward(b: Builder, ct: Value, sizes: Sequence[int], dim: int, index: int) -> Value:
    return _import_select_scatter(b, full(b, 0.0, sizes, ct.type.dtype), ct, dim, index)


def diagonal(b: Builder, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    """The elements where two axes have equal index, as a new last axis: steps through the two axes merged."""
    x, attrs = _diagonal_of(b, x, offset, dim1, dim2)
    return b.emit("slice", x, **attrs)


def _diagonal_of(b: Builder, x: Value, offset: int, dim1: int, dim2: int) -> tuple[Value, dict[str, Any]]:
    """x with the two axes merged into a last one, and the slice of that which is the diagonal."""
    x = movedim(b, x, (dim1, dim2), (-2, -1))
    rows, columns = x.type.shape[-2:]
    length = max(0, min(rows, columns - offset) if offset >= 0 else min(rows + offset, columns))
    start = offset if offset >= 0 else -offset * columns
    start = start if length else 0
    end = start + (length - 1) * (columns + 1) + 1 if length else 0
    merged = reshape(b, x, (*x.type.shape[:-2], rows * columns))
    return merged, {"dim": x.type.rank - 2, "start": start, "end": end, "step": columns + 1}


register(
    OpDef(
        name="slice",
        infer=_infer_slice,
        evaluate=lambda node, x: x[_slices(node.attrs)],
        vjp=_slice_vjp,
        complex=AS_IT_IS,
        cost=view_cost,
        axes=axes_but_dim,
        lower=_lower_slice,
        aten={
            **dict.fromkeys(("slice.Tensor", "slice_copy.Tensor"), _import_slice),
            **dict.fromkeys(("select.int", "select_copy.int"), select),
            **dict.fromkeys(("narrow.default", "narrow_copy.default"), _import_narrow),
            "slice_backward.default": _import_slice_backward,
            "select_backward.default": _import_select_backward,
            **dict.fromkeys(("diagonal.default", "diagonal_copy.default"), diagonal),
            "linalg_diagonal.default": lambda b, x, *, offset=0, dim1=-2, dim2=-1: diagonal(b, x, offset, dim1, dim2),
        },
        samples=(
            sample((5, 4), dim=0, start=1, end=4, step=1),
            sample((3, 7), dim=1, start=1, end=6, step=2),
            sample((3, 4), dim=1, start=2, end=2, step=1),
        ),
    )
)

# --- slice_update -------------------------------------------------------------------------------------


def _infer_slice_update(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    base, part = inputs
    wanted = base.with_(shape=_part_shape(base, attrs))
    require(part == wanted, f"the new part must be a {wanted}, got {part}")
    return (base,)


def _slice_update_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    (ct,), attrs = cts, node.attrs
    assert ct is not None
    outside = b.emit("slice_update", ct, zeros_like(b, node.inputs[1]), **attrs)
    return outside, b.emit("slice", ct, **attrs)


def _evaluate_slice_update(node: Node, base: np.ndarray, part: np.ndarray) -> np.ndarray:
    result = base.copy()
    result[_slices(node.attrs)] = part
    return result


def _import_slice_scatter(
    b: Builder,
    base: Value,
    part: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Value:
    dim = norm_dim(dim, base.type.rank)
    first, last = _bounds(base.type.shape[dim], start, end)
    part = cast(b, part, base.type.dtype)
    if (first, last, step) == (0, base.type.shape[dim], 1):
        return broadcast(b, part, base.type.shape)
    shape = list(base.type.shape)
    shape[dim] = -(-(last - first) // step)
    return b.emit("slice_update", base, broadcast(b, part, shape), dim=dim, start=first, end=last, step=step)


def _import_select_scatter(b: Builder, base: Value, part: Value, dim: int, index: int) -> Value:
    dim = norm_dim(dim, base.type.rank)
    index = _index(base, dim, index)
    return _import_slice_scatter(b, base, unsqueeze(b, part, dim), dim, index, index + 1)


def _import_diagonal_scatter(
    b: Builder, base: Value, part: Value, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Value:
    merged, attrs = _diagonal_of(b, base, offset, dim1, dim2)
    updated = b.emit("slice_update", merged, cast(b, part, base.type.dtype), **attrs)
    moved = movedim(b, base, (dim1, dim2), (-2, -1)).type.shape
    return movedim(b, reshape(b, updated, moved), (-2, -1), (dim1, dim2))


def _import_diag_embed(b: Builder, x: Value, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Value:
    size = x.type.shape[-1] + abs(offset)
    zeros = full(b, 0.0 if x.type.differentiable else 0, (*x.type.shape[:-1], size, size), x.type.dtype)
    return movedim(b, _import_diagonal_scatter(b, zeros, x, offset, -2, -1), (-2, -1), (dim1, dim2))


def _import_diag(b: Builder, x: Value, offset: int = 0) -> Value:
    return _import_diag_embed(b, x, offset) if x.type.rank == 1 else diagonal(b, x, offset)


register(
    OpDef(
        name="slice_update",
        infer=_infer_slice_update,
        evaluate=_evaluate_slice_update,
        vjp=_slice_update_vjp,
        complex=AS_IT_IS,
        cost=copy_cost,
        axes=axes_but_dim,
        lower=lambda node, args: f"torch.slice_scatter({args[0]}, {args[1]}, {_slice_args(node.attrs)})",
        aten={
            "slice_scatter.default": _import_slice_scatter,
            "select_scatter.default": _import_select_scatter,
            "diagonal_scatter.default": _import_diagonal_scatter,
            "diag_embed.default": _import_diag_embed,
            "diag.default": _import_diag,
            "diagflat.default": lambda b, x, offset=0: _import_diag_embed(b, reshape(b, x, (x.type.numel,)), offset),
        },
        samples=(
            sample((5, 4), (3, 4), dim=0, start=1, end=4, step=1),
            sample((2, 7), (2, 3), dim=1, start=1, end=7, step=2),
        ),
    )
)

# --- split --------------------------------------------------------------------------------------------


def _infer_split(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,), dim, sizes = inputs, attrs["dim"], attrs["sizes"]
    require(0 <= dim < x.rank, f"dim must be an axis of {x}, got {dim}")
    require(bool(sizes) and sum(sizes) == x.shape[dim], f"sizes must add up to {x.shape[dim]}, got {sizes}")
    return tuple(x.with_(shape=(*x.shape[:dim], size, *x.shape[dim + 1 :])) for size in sizes)


def _split_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """The parts' cotangents side by side, zeros where a part was not used."""
    filled = [zeros_like(b, part) if ct is None else ct for part, ct in zip(node.outputs, cts, strict=True)]
    return (b.emit("concat", *filled, dim=node.attrs["dim"]),)


def _evaluate_split(node: Node, x: np.ndarray) -> tuple[np.ndarray, ...]:
    ends = list(accumulate(node.attrs["sizes"]))
    return tuple(np.split(x, ends[:-1], node.attrs["dim"]))


def split(b: Builder, x: Value, sizes: Sequence[int], dim: int) -> tuple[Value, ...]:
    """Parts of given sizes along an axis."""
    dim = norm_dim(dim, x.type.rank)
    require(sum(sizes) == x.type.shape[dim], f"sizes must add up to {x.type.shape[dim]}, got {tuple(sizes)}")
    return b.emit_many("split", x, sizes=tuple(sizes), dim=dim) if len(sizes) > 1 else (x,) * len(sizes)


def _import_split(b: Builder, x: Value, size: int | Sequence[int], dim: int = 0) -> tuple[Value, ...]:
    if not isinstance(size, int):
        return split(b, x, size, dim)
    total = x.type.shape[norm_dim(dim, x.type.rank)]
    if total == 0:
        return (x,)
    return split(b, x, [min(size, total - start) for start in range(0, total, size)], dim)


def _import_chunk(b: Builder, x: Value, chunks: int, dim: int = 0) -> tuple[Value, ...]:
    total = x.type.shape[norm_dim(dim, x.type.rank)]
    if total == 0:
        return (x,) * chunks
    return _import_split(b, x, -(-total // chunks), dim)


def _import_tensor_split(b: Builder, x: Value, parts: int | Sequence[int], dim: int = 0) -> tuple[Value, ...]:
    dim = norm_dim(dim, x.type.rank)
    total = x.type.shape[dim]
    if isinstance(parts, int):
        small, larger = divmod(total, parts)
        return split(b, x, [small + (i < larger) for i in range(parts)], dim)
    edges = [0, *parts, total]
    return tuple(slice_dim(b, x, dim, *_bounds(total, start, end)) for start, end in pairwise(edges))


def _import_axis_split(name: str) -> Importer:
    """``hsplit``, ``vsplit``, ``dsplit``: ``tensor_split`` along the second, first and third axis."""

    def importer(b: Builder, x: Value, parts: int | Sequence[int]) -> tuple[Value, ...]:
        dim = {"h": 0 if x.type.rank == 1 else 1, "v": 0, "d": 2}[name]
        return _import_tensor_split(b, x, parts, dim)

    return importer


def _import_unbind(b: Builder, x: Value, dim: int = 0) -> tuple[Value, ...]:
    dim = norm_dim(dim, x.type.rank)
    shape = x.type.shape[:dim] + x.type.shape[dim + 1 :]
    return tuple(reshape(b, part, shape) for part in split(b, x, (1,) * x.type.shape[dim], dim))


register(
    OpDef(
        name="split",
        infer=_infer_split,
        evaluate=_evaluate_split,
        vjp=_split_vjp,
        complex=AS_IT_IS,
        cost=view_cost,
        axes=axes_but_dim,
        lower=lambda node, args: f"torch.split({args[0]}, {list(node.attrs['sizes'])}, {node.attrs['dim']})",
        aten={
            **dict.fromkeys(
                (
                    "split.Tensor",
                    "split.sizes",
                    "split_with_sizes.default",
                    "unsafe_split.Tensor",
                    "unsafe_split_with_sizes.default",
                    "split_copy.Tensor",
                    "split_with_sizes_copy.default",
                ),
                _import_split,
            ),
            **dict.fromkeys(("chunk.default", "unsafe_chunk.default"), _import_chunk),
            **dict.fromkeys(("tensor_split.sections", "tensor_split.indices"), _import_tensor_split),
            **dict.fromkeys(("unbind.int", "unbind_copy.int"), _import_unbind),
            **{f"{axis}split.{form}": _import_axis_split(axis) for axis in "hvd" for form in ("int", "array")},
        },
        samples=(sample((2, 6), sizes=(1, 3, 2), dim=1), sample((4,), sizes=(2, 0, 2), dim=0)),
    )
)
