"""Tensors made larger: concat and pad, and what is put together from slices (stack, roll, borders)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import Scalar, broadcast, cast, kind, norm_dim, promote_dtypes, reshape
from daggc.ops.differences import GRADIENTS, import_diff
from daggc.ops.opdef import AS_IT_IS, Axes, OpDef, copy_cost, register, require, sample, scalar
from daggc.ops.shape import Cotangents, at_least, flip, unsqueeze, whole_along
from daggc.ops.slicing import axes_but_dim, pad_value, slice_dim, split

# --- concat -------------------------------------------------------------------------------------------


def _infer_concat(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    first, dim = inputs[0], attrs["dim"]
    require(0 <= dim < first.rank, f"dim must be an axis of {first}, got {dim}")
    frames = {(x.dtype, x.shape[:dim], x.shape[dim + 1 :]) for x in inputs}
    require(len(frames) == 1, f"inputs of one dtype and, but for axis {dim}, one shape are required")
    return (first.with_(shape=(*first.shape[:dim], sum(x.shape[dim] for x in inputs), *first.shape[dim + 1 :])),)


def _concat_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    assert cts[0] is not None
    dim = node.attrs["dim"]
    return split(b, cts[0], [x.type.shape[dim] for x in node.inputs], dim)


def concat(b: Builder, tensors: Sequence[Value], dim: int) -> Value:
    """Tensors side by side along an axis, promoted to one dtype."""
    if len(tensors) == 1:
        return tensors[0]
    dtype = tensors[0].type.dtype
    for x in tensors[1:]:
        dtype = promote_dtypes(dtype, x.type.dtype)
    return b.emit("concat", *(cast(b, x, dtype) for x in tensors), dim=dim)


def _import_cat(b: Builder, tensors: Sequence[Value], dim: int = 0) -> Value:
    """torch skips tensors of shape (0,), whatever the shape of the others."""
    kept = [x for x in tensors if x.type.shape != (0,)] or tensors[:1]
    return concat(b, kept, norm_dim(dim, kept[0].type.rank))


def _import_stack(b: Builder, tensors: Sequence[Value], dim: int = 0) -> Value:
    dim = norm_dim(dim, tensors[0].type.rank + 1)
    return concat(b, [unsqueeze(b, x, dim) for x in tensors], dim)


def _import_hstack(b: Builder, tensors: Sequence[Value]) -> Value:
    wide = [reshape(b, x, x.type.shape or (1,)) for x in tensors]
    return concat(b, wide, 0 if wide[0].type.rank == 1 else 1)


def _import_vstack(b: Builder, tensors: Sequence[Value]) -> Value:
    return concat(b, [reshape(b, x, (1,) * (2 - x.type.rank) + x.type.shape) for x in tensors], 0)


def _import_dstack(b: Builder, tensors: Sequence[Value]) -> Value:
    return concat(b, [at_least(b, x, 3) for x in tensors], 2)


def _import_chunk_cat(b: Builder, tensors: Sequence[Value], dim: int, num_chunks: int) -> Value:
    """Each tensor padded at the end of an axis to so many equal chunks, flattened from there on, side by side."""
    dim = norm_dim(dim, tensors[0].type.rank)
    rows: list[Value] = []
    for x in tensors:
        lead, missing = x.type.shape[:dim], -x.type.shape[dim] % num_chunks
        pads = [(0, missing if axis == dim else 0) for axis in range(x.type.rank)]
        x = b.emit("pad", x, pads=tuple(pads), value=pad_value(x, None)) if missing else x
        rows.append(reshape(b, x, (*lead, num_chunks, x.type.numel // (math.prod(lead) * num_chunks))))
    return concat(b, rows, dim + 1)


def _import_column_stack(b: Builder, tensors: Sequence[Value]) -> Value:
    return concat(b, [x if x.type.rank >= 2 else reshape(b, x, (x.type.numel, 1)) for x in tensors], 1)


def import_roll(b: Builder, x: Value, shifts: int | Sequence[int], dims: int | Sequence[int] = ()) -> Value:
    """Each axis cut in two and put together the other way round; without ``dims``, the flattened tensor."""
    shifts = [shifts] if isinstance(shifts, int) else shifts
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        return reshape(b, import_roll(b, reshape(b, x, (x.type.numel,)), shifts, (0,)), x.type.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        dim = norm_dim(dim, x.type.rank)
        size = x.type.shape[dim]
        cut = -shift % size if size else 0
        if cut:
            x = concat(b, split(b, x, (cut, size - cut), dim)[::-1], dim)
    return x


register(
    OpDef(
        name="concat",
        infer=_infer_concat,
        evaluate=lambda node, *arrays: np.concatenate(arrays, node.attrs["dim"]),
        vjp=_concat_vjp,
        complex=AS_IT_IS,
        cost=copy_cost,
        axes=axes_but_dim,
        lower=lambda node, args: f"torch.cat(({', '.join(args)},), {node.attrs['dim']})",
        aten={
            **dict.fromkeys(("cat.default", "concat.default", "concatenate.default"), _import_cat),
            "stack.default": _import_stack,
            "hstack.default": _import_hstack,
            "vstack.default": _import_vstack,
            "column_stack.default": _import_column_stack,
            "roll.default": import_roll,
            "dstack.default": _import_dstack,
            "_chunk_cat.default": _import_chunk_cat,
            "diff.default": import_diff,
            **GRADIENTS,
        },
        samples=(sample((2, 3), (2, 1), (2, 4), dim=1), sample((2, 3), (4, 3), dim=0), sample((2,), dim=0)),
    )
)

# --- pad ----------------------------------------------------------------------------------------------


def _infer_pad(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,), pads, value = inputs, attrs["pads"], attrs["value"]
    require(len(pads) == x.rank, f"a pair of pads for each axis of {x} is required, got {pads}")
    require(all(before >= 0 <= after for before, after in pads), f"pads are not negative, got {pads}")
    fits = {bool: "bifc", int: "ifc", float: "fc", complex: "c"}.get(type(value), "")
    require(kind(x.dtype) in fits, f"value={value!r} would change the dtype {x.dtype}")
    return (x.with_(shape=tuple(lo + size + hi for size, (lo, hi) in zip(x.shape, pads, strict=True))),)


def _pad_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    (ct,), shape = cts, node.inputs[0].type.shape
    assert ct is not None
    for dim, (before, _) in enumerate(node.attrs["pads"]):
        ct = slice_dim(b, ct, dim, before, before + shape[dim])
    return (ct,)


def _lower_pad(node: Node, args: Sequence[str]) -> str:
    flat = [size for pair in reversed(node.attrs["pads"]) for size in pair]
    return f"torch.constant_pad_nd({args[0]}, {flat}, {scalar(node.attrs['value'])})"


def _pad_axes(node: Node) -> Axes:
    padded = [dim for dim, pair in enumerate(node.attrs["pads"]) if pair != (0, 0)]
    labels = whole_along(padded, node.output.type.rank)
    return Axes((labels,), (labels,))


def _import_constant_pad(b: Builder, x: Value, pad: Sequence[int], value: Scalar | None = 0) -> Value:
    """Negative pads crop first."""
    pads = _pairs(x, pad)
    for dim, (before, after) in enumerate(pads):
        x = slice_dim(b, x, dim, max(0, -before), x.type.shape[dim] - max(0, -after))
    pads = [(max(0, before), max(0, after)) for before, after in pads]
    if not any(map(any, pads)):
        return x
    return b.emit("pad", x, pads=tuple(pads), value=pad_value(x, value))


def _pairs(x: Value, pad: Sequence[int]) -> list[tuple[int, int]]:
    """torch's flat list, last axis first, as a pair for each axis."""
    require(len(pad) % 2 == 0 and len(pad) <= 2 * x.type.rank, f"pads {tuple(pad)} do not fit {x.type}")
    given = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]
    return [(0, 0)] * (x.type.rank - len(given)) + given[::-1]


def _border(b: Builder, x: Value, dim: int, before: int, after: int, mode: str) -> Value:
    """One axis padded by a mirror image, by its edges, or by itself; negative pads crop it."""
    if mode == "circular":  # what is left after cropping goes round
        x, before, after = _crop(b, x, dim, before, after)
    wide = _bordered(b, x, dim, max(0, before), max(0, after), mode)
    return _crop(b, wide, dim, min(0, before), min(0, after))[0]


def _crop(b: Builder, x: Value, dim: int, before: int, after: int) -> tuple[Value, int, int]:
    """x less what negative pads take away, and the pads that are left."""
    start, end = max(0, -before), x.type.shape[dim] - max(0, -after)
    require(start < end, f"pads {before}, {after} leave nothing of axis {dim} of {x.type}")
    return slice_dim(b, x, dim, start, end), max(0, before), max(0, after)


def _bordered(b: Builder, x: Value, dim: int, before: int, after: int, mode: str) -> Value:
    size = x.type.shape[dim]
    if mode == "reflect":
        require(max(before, after) < size, f"reflecting pads must be less than {size}, got {before}, {after}")
        head = flip(b, slice_dim(b, x, dim, 1, before + 1), (dim,))
        tail = flip(b, slice_dim(b, x, dim, size - 1 - after, size - 1), (dim,))
    elif mode == "replicate":
        edge = list(x.type.shape)
        edge[dim] = before
        head = broadcast(b, slice_dim(b, x, dim, 0, 1), edge)
        edge[dim] = after
        tail = broadcast(b, slice_dim(b, x, dim, size - 1, size), edge)
    else:
        require(max(before, after) <= size, f"circular pads must be at most {size}, got {before}, {after}")
        head, tail = slice_dim(b, x, dim, size - before, size), slice_dim(b, x, dim, 0, after)
    return concat(b, [*([head] if before else []), x, *([tail] if after else [])], dim)


def _import_pad(b: Builder, x: Value, pad: Sequence[int], mode: str = "constant", value: Scalar | None = None) -> Value:
    if mode == "constant":
        return _import_constant_pad(b, x, pad, value)
    if mode not in ("reflect", "replicate", "circular"):
        raise TypeRuleError(f"pad modes are constant, reflect, replicate and circular, got {mode!r}")
    for dim, (before, after) in enumerate(_pairs(x, pad)):
        if before or after:
            x = _border(b, x, dim, before, after, mode)
    return x


register(
    OpDef(
        name="pad",
        infer=_infer_pad,
        evaluate=lambda node, x: np.pad(x, node.attrs["pads"], constant_values=node.attrs["value"]) if x.ndim else x,
        vjp=_pad_vjp,
        complex=AS_IT_IS,
        cost=copy_cost,
        axes=_pad_axes,
        lower=_lower_pad,
        aten={
            "constant_pad_nd.default": _import_constant_pad,
            "pad.default": _import_pad,
            **{f"reflection_pad{n}d.default": lambda b, x, pad: _import_pad(b, x, pad, "reflect") for n in (1, 2, 3)},
            **{
                f"replication_pad{n}d.default": lambda b, x, pad: _import_pad(b, x, pad, "replicate") for n in (1, 2, 3)
            },
            "_pad_circular.default": lambda b, x, pad: _import_pad(b, x, pad, "circular"),
        },
        samples=(
            sample((3, 4), pads=((1, 0), (2, 3)), value=0.0),
            sample((2, 3, 2), pads=((0, 0), (0, 0), (1, 1)), value=-1.5),
        ),
    )
)
