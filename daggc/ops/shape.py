"""Views: reshape, permute, broadcast, flip, and the identity that stops gradients.

ATen ops that only rearrange axes import to these; ``clone``, ``contiguous`` and the like import to nothing at
all, since values of the IR have neither aliases nor strides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import (
    broadcast,
    broadcast_together,
    cast,
    conj,
    full,
    norm_dim,
    permute,
    reshape,
    sum_dims,
    transpose,
)
from daggc.ops.opdef import (
    AS_IT_IS,
    NOT_DIFFERENTIABLE,
    Arg,
    Axes,
    Importer,
    OpDef,
    Sample,
    copy_cost,
    letters,
    register,
    require,
    same_axes,
    sample,
    t,
    view_cost,
)

Cotangents = Sequence[Value | None]

# --- reshape ------------------------------------------------------------------------------------------


def _infer_reshape(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    result = x.with_(shape=attrs["shape"])
    require(result.numel == x.numel, f"{x.numel} elements are required, shape {attrs['shape']} has {result.numel}")
    return (result,)


def reshape_axes(source: Sequence[int], target: Sequence[int]) -> Axes | None:
    """Axes of a reshape, found by splitting both shapes into runs of equal product, from the left.

    The outermost axes of two runs correspond, in proportion: half of the rows of ``(8, 16)`` are half of the
    elements of ``(128,)``. Inner axes of a run of several are needed whole; so are axes of size 1.
    """
    if 0 in source:
        return None
    left = [axis for axis, size in enumerate(source) if size != 1]
    right = [axis for axis, size in enumerate(target) if size != 1]
    inputs: list[str | None] = [None] * len(source)
    outputs: list[str | None] = [None] * len(target)
    i = j = 0
    while i < len(left):
        first, second = left[i], right[j]
        have, want = source[first], target[second]
        i, j = i + 1, j + 1
        large, small = max(have, want), min(have, want)
        if large % small == 0:
            inputs[first] = outputs[second] = f"d{first}"
        while have != want:
            if have < want:
                have, i = have * source[left[i]], i + 1
            else:
                want, j = want * target[right[j]], j + 1
    return Axes((tuple(inputs),), (tuple(outputs),))


def _reshape_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    assert cts[0] is not None
    return (reshape(b, cts[0], node.inputs[0].type.shape),)


def full_shape(x: Value, shape: Sequence[int], numel: int | None = None) -> tuple[int, ...]:
    """``shape`` with its -1, if any, filled in so that the number of elements is x's (or ``numel``)."""
    numel = x.type.numel if numel is None else numel
    if -1 not in shape:
        return tuple(shape)
    known = math.prod(size for size in shape if size != -1)
    if known == 0 or numel % known:
        raise TypeRuleError(f"-1 in shape {tuple(shape)} has no value for {numel} elements")
    return tuple(numel // known if size == -1 else size for size in shape)


def _import_view(b: Builder, x: Value, shape: Sequence[int], **_: Any) -> Value:
    return reshape(b, x, full_shape(x, shape))


def _import_flatten(b: Builder, x: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    shape, first, last = x.type.shape, norm_dim(start_dim, x.type.rank), norm_dim(end_dim, x.type.rank)
    return reshape(b, x, (*shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :]))


def _import_unflatten(b: Builder, x: Value, dim: int, sizes: Sequence[int]) -> Value:
    shape, dim = x.type.shape, norm_dim(dim, x.type.rank)
    return reshape(b, x, (*shape[:dim], *full_shape(x, sizes, shape[dim]), *shape[dim + 1 :]))


def squeeze(b: Builder, x: Value, dims: Sequence[int] | int | None = None) -> Value:
    """Drop axes of size 1, of those given or of all."""
    chosen = range(x.type.rank) if dims is None else [norm_dim(d, x.type.rank) for d in _as_list(dims)]
    shape = (size for axis, size in enumerate(x.type.shape) if size != 1 or axis not in chosen)
    return reshape(b, x, tuple(shape))


def unsqueeze(b: Builder, x: Value, dim: int) -> Value:
    """Add an axis of size 1 before axis ``dim`` of the result."""
    dim = norm_dim(dim, x.type.rank + 1)
    return reshape(b, x, (*x.type.shape[:dim], 1, *x.type.shape[dim:]))


def _as_list(dims: Sequence[int] | int) -> Sequence[int]:
    return (dims,) if isinstance(dims, int) else dims


def at_least(b: Builder, x: Value, rank: int) -> Value:
    """Axes of size 1 before those there are; the third of three comes last."""
    shape = (1,) * (min(rank, 2) - x.type.rank) + x.type.shape
    return reshape(b, x, shape if len(shape) >= rank else (*shape, 1))


def _at_least(rank: int) -> Importer:
    return lambda b, x: at_least(b, x, rank)


def _all_at_least(rank: int) -> Importer:
    return lambda b, tensors: tuple(at_least(b, x, rank) for x in tensors)


def _import_resize(b: Builder, x: Value, shape: Sequence[int]) -> Value:
    """The elements in order. What is new is memory as torch finds it, for which the door stands open."""
    result = x.type.with_(shape=tuple(shape))
    if result.numel > x.type.numel:
        raise NotImplementedError("a resized tensor has elements that nothing has written")
    flat = reshape(b, x, (x.type.numel,))
    if result.numel < x.type.numel:
        flat = b.emit("slice", flat, dim=0, start=0, end=result.numel, step=1)
    return reshape(b, flat, result.shape)


def _identity(b: Builder, x: Value, *_args: Any, **_: Any) -> Value:
    return x


def _import_copy(b: Builder, x: Value, source: Value, *_args: Any, **_: Any) -> Value:
    """``x.copy_(source)`` made functional: the source in x's dtype and shape."""
    return broadcast(b, cast(b, source, x.type.dtype), x.type.shape)


def _import_fill(b: Builder, x: Value, value: Value | float) -> Value:
    """What is filled has a gradient of zeros, as in torch, unless it was a constant."""
    if isinstance(value, Value):
        return _import_copy(b, x, value)
    filled = full(b, value, x.type.shape, x.type.dtype)
    maker = next((node for node in reversed(b.nodes) if x in node.outputs), None)
    if not x.type.is_float or (maker is not None and not maker.inputs):
        return filled
    return b.emit("where", full(b, True, x.type.shape, "bool"), filled, x)


register(
    OpDef(
        name="reshape",
        infer=_infer_reshape,
        evaluate=lambda node, x: x.reshape(node.attrs["shape"]),
        vjp=_reshape_vjp,
        complex=AS_IT_IS,
        cost=view_cost,
        axes=lambda node: reshape_axes(node.inputs[0].type.shape, node.attrs["shape"]),
        lower=lambda node, args: f"{args[0]}.reshape({node.attrs['shape']})",
        aten={
            **dict.fromkeys(
                (
                    "view.default",
                    "reshape.default",
                    "_unsafe_view.default",
                    "view_copy.default",
                    "_reshape_copy.default",
                ),
                _import_view,
            ),
            "_reshape_alias.default": lambda b, x, shape, stride: _import_view(b, x, shape),
            **dict.fromkeys(
                ("view_as.default", "reshape_as.default"), lambda b, x, other: reshape(b, x, other.type.shape)
            ),
            "flatten.using_ints": _import_flatten,
            "ravel.default": _import_flatten,
            "unflatten.int": _import_unflatten,
            **dict.fromkeys(
                [f"squeeze{copy}.{form}" for copy in ("", "_copy") for form in ("default", "dim", "dims")], squeeze
            ),
            **dict.fromkeys(("unsqueeze.default", "unsqueeze_copy.default"), unsqueeze),
            **{f"atleast_{rank}d.default": _at_least(rank) for rank in (1, 2, 3)},
            **{f"atleast_{rank}d.Sequence": _all_at_least(rank) for rank in (1, 2, 3)},
            "resize_as.default": lambda b, x, other, **_: _import_resize(b, x, other.type.shape),
            **dict.fromkeys(
                (
                    "clone.default",
                    "contiguous.default",
                    "alias.default",
                    "alias_copy.default",
                    "lift_fresh.default",
                    "lift_fresh_copy.default",
                ),
                _identity,
            ),
            "copy.default": _import_copy,
            "fill.Scalar": _import_fill,
            "fill.Tensor": _import_fill,
            "zero.default": lambda b, x: _import_fill(b, x, 0.0 if x.type.differentiable else 0),
        },
        samples=(
            sample((3, 4), shape=(2, 6)),
            sample((2, 3, 4), shape=(6, 4)),
            sample((1,), shape=()),
            sample((), shape=(1, 1)),
        ),
    )
)

# --- permute ------------------------------------------------------------------------------------------


def _infer_permute(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,), dims = inputs, attrs["dims"]
    require(sorted(dims) == list(range(x.rank)), f"dims must be a permutation of {x.rank} axes, got {dims}")
    return (x.with_(shape=tuple(x.shape[dim] for dim in dims)),)


def _permute_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    assert cts[0] is not None
    dims = node.attrs["dims"]
    return (permute(b, cts[0], [dims.index(axis) for axis in range(len(dims))]),)


def _permute_axes(node: Node) -> Axes:
    labels = letters(node.inputs[0].type.rank)
    return Axes((labels,), (tuple(labels[dim] for dim in node.attrs["dims"]),))


def _import_permute(b: Builder, x: Value, dims: Sequence[int]) -> Value:
    return permute(b, x, [norm_dim(dim, x.type.rank) for dim in dims])


def _import_transpose(b: Builder, x: Value, first: int, second: int) -> Value:
    rank = x.type.rank
    return transpose(b, x, norm_dim(first, rank), norm_dim(second, rank)) if rank else x


def _import_t(b: Builder, x: Value) -> Value:
    return transpose(b, x) if x.type.rank == 2 else x


def _import_adjoint(b: Builder, x: Value) -> Value:
    return conj(b, transpose(b, x))


def movedim(b: Builder, x: Value, source: Sequence[int] | int, destination: Sequence[int] | int) -> Value:
    """Move axes to new places; the others keep their order."""
    rank = x.type.rank
    moves = {
        norm_dim(to, rank): norm_dim(at, rank) for at, to in zip(_as_list(source), _as_list(destination), strict=True)
    }
    others = iter([axis for axis in range(rank) if axis not in moves.values()])
    return permute(b, x, [moves[axis] if axis in moves else next(others) for axis in range(rank)])


register(
    OpDef(
        name="permute",
        infer=_infer_permute,
        evaluate=lambda node, x: x.transpose(node.attrs["dims"]),
        vjp=_permute_vjp,
        complex=AS_IT_IS,
        cost=view_cost,
        axes=_permute_axes,
        lower=lambda node, args: f"{args[0]}.permute({node.attrs['dims']})",
        aten={
            **dict.fromkeys(("permute.default", "permute_copy.default"), _import_permute),
            **dict.fromkeys(
                ("transpose.int", "transpose_copy.int", "swapaxes.default", "swapdims.default"), _import_transpose
            ),
            **dict.fromkeys(("t.default", "t_copy.default"), _import_t),
            "numpy_T.default": lambda b, x: permute(b, x, tuple(reversed(range(x.type.rank)))),
            "mT.default": lambda b, x: transpose(b, x),
            **dict.fromkeys(("adjoint.default", "mH.default", "matrix_H.default"), _import_adjoint),
            **dict.fromkeys(("movedim.int", "movedim.intlist", "moveaxis.int", "moveaxis.intlist"), movedim),
        },
        samples=(sample((3, 4), dims=(1, 0)), sample((2, 3, 4), dims=(2, 0, 1)), sample((), dims=())),
    )
)

# --- broadcast ----------------------------------------------------------------------------------------


def _infer_broadcast(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,), shape = inputs, attrs["shape"]
    lead = len(shape) - x.rank
    fits = lead >= 0 and all(size in (1, shape[lead + axis]) for axis, size in enumerate(x.shape))
    require(fits, f"a shape that broadcasts to {shape} is required, got {x.shape}")
    return (x.with_(shape=shape),)


def _broadcast_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    (ct,), shape = cts, node.inputs[0].type.shape
    assert ct is not None
    lead = ct.type.rank - len(shape)
    widened = [lead + axis for axis, size in enumerate(shape) if size != ct.type.shape[lead + axis]]
    return (reshape(b, sum_dims(b, ct, [*range(lead), *widened]), shape),)


def _broadcast_axes(node: Node) -> Axes:
    """Axes that the broadcast makes have labels of their own: a slice of them is a smaller broadcast."""
    x, shape = node.inputs[0].type, node.attrs["shape"]
    labels = letters(len(shape))
    lead = len(shape) - x.rank
    kept = tuple(labels[lead + axis] if size == shape[lead + axis] else None for axis, size in enumerate(x.shape))
    return Axes((kept,), (labels,))


def _import_expand(b: Builder, x: Value, size: Sequence[int], **_: Any) -> Value:
    lead = len(size) - x.type.rank
    return broadcast(b, x, tuple(x.type.shape[i - lead] if n == -1 else n for i, n in enumerate(size)))


def _import_repeat(b: Builder, x: Value, repeats: Sequence[int]) -> Value:
    """Copies side by side: an axis of copies is broadcast before each axis, then merged into it."""
    sizes = (1,) * (len(repeats) - x.type.rank) + x.type.shape
    pairs = list(zip(repeats, sizes, strict=True))
    single = [part for count, size in pairs for part in ((size,) if count == 1 else (1, size))]
    copied = [part for count, size in pairs for part in ((size,) if count == 1 else (count, size))]
    merged = [count * size for count, size in pairs]
    return reshape(b, broadcast(b, reshape(b, x, single), copied), merged)


def _import_tile(b: Builder, x: Value, dims: Sequence[int]) -> Value:
    return _import_repeat(b, x, (1,) * (x.type.rank - len(dims)) + tuple(dims))


def _import_repeat_interleave(b: Builder, x: Value, repeats: int, dim: int | None = None, **_: Any) -> Value:
    if dim is None:
        x, dim = reshape(b, x, (x.type.numel,)), 0
    shape, dim = x.type.shape, norm_dim(dim, x.type.rank)
    copied = broadcast(b, unsqueeze(b, x, dim + 1), (*shape[: dim + 1], repeats, *shape[dim + 1 :]))
    return reshape(b, copied, (*shape[:dim], shape[dim] * repeats, *shape[dim + 1 :]))


def _import_meshgrid(b: Builder, tensors: Sequence[Value], *, indexing: str = "ij") -> tuple[Value, ...]:
    """One axis a tensor; ``xy`` swaps the first two."""
    order = list(range(len(tensors)))
    if indexing == "xy" and len(order) >= 2:
        order[0], order[1] = 1, 0
    flat = [reshape(b, x, (x.type.numel,)) for x in tensors]
    shape = [flat[axis].type.numel for axis in order]
    columns = [
        reshape(b, x, [x.type.numel if axis == order.index(i) else 1 for axis in range(len(flat))])
        for i, x in enumerate(flat)
    ]
    return tuple(broadcast(b, x, shape) for x in columns)


register(
    OpDef(
        name="broadcast",
        infer=_infer_broadcast,
        evaluate=lambda node, x: np.broadcast_to(x, node.attrs["shape"]),
        vjp=_broadcast_vjp,
        complex=AS_IT_IS,
        cost=view_cost,
        axes=_broadcast_axes,
        lower=lambda node, args: f"{args[0]}.expand({node.attrs['shape']})",
        aten={
            **dict.fromkeys(("expand.default", "expand_copy.default", "broadcast_to.default"), _import_expand),
            "expand_as.default": lambda b, x, other: broadcast(b, x, other.type.shape),
            "broadcast_tensors.default": lambda b, tensors: broadcast_together(b, *tensors),
            "repeat.default": _import_repeat,
            "tile.default": _import_tile,
            "repeat_interleave.self_int": _import_repeat_interleave,
            "meshgrid.default": _import_meshgrid,
            "meshgrid.indexing": _import_meshgrid,
        },
        samples=(
            sample((3, 1), shape=(3, 4)),
            sample((), shape=(2, 3)),
            sample((1, 4), shape=(2, 3, 4)),
            sample((1, 1), shape=(1, 1, 1)),
        ),
    )
)

# --- flip ---------------------------------------------------------------------------------------------


def _infer_flip(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,), dims = inputs, attrs["dims"]
    known = len(set(dims)) == len(dims) and all(0 <= dim < x.rank for dim in dims)
    require(known, f"dims must be distinct axes of {x}, got {dims}")
    return (x,)


def flip(b: Builder, x: Value, dims: Sequence[int]) -> Value:
    """Reverse the order along axes, which must be non-negative."""
    return b.emit("flip", x, dims=tuple(dims)) if dims else x


def _flip_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    assert cts[0] is not None
    return (flip(b, cts[0], node.attrs["dims"]),)


def whole_along(dims: Sequence[int], rank: int) -> tuple[str | None, ...]:
    """Labels of ``rank`` axes, those of ``dims`` needed whole."""
    return tuple(None if axis in dims else label for axis, label in enumerate(letters(rank)))


def _flip_axes(node: Node) -> Axes:
    labels = whole_along(node.attrs["dims"], node.output.type.rank)
    return Axes((labels,), (labels,))


def _import_flip(b: Builder, x: Value, dims: Sequence[int]) -> Value:
    return flip(b, x, tuple(sorted(norm_dim(dim, x.type.rank) for dim in dims)) if x.type.rank else ())


def _import_rot90(b: Builder, x: Value, k: int = 1, dims: Sequence[int] = (0, 1)) -> Value:
    first, second = (norm_dim(dim, x.type.rank) for dim in dims)
    turns = k % 4
    if turns == 2:
        return flip(b, x, sorted((first, second)))
    if turns:
        return transpose(b, flip(b, x, (second if turns == 1 else first,)), first, second)
    return x


register(
    OpDef(
        name="flip",
        infer=_infer_flip,
        evaluate=lambda node, x: np.flip(x, node.attrs["dims"]),
        vjp=_flip_vjp,
        complex=AS_IT_IS,
        cost=copy_cost,
        axes=_flip_axes,
        lower=lambda node, args: f"torch.flip({args[0]}, {node.attrs['dims']})",
        aten={
            "flip.default": _import_flip,
            "flipud.default": lambda b, x: flip(b, x, (0,)),
            "fliplr.default": lambda b, x: flip(b, x, (1,)),
            "rot90.default": _import_rot90,
        },
        samples=(sample((3, 4), dims=(1,)), sample((2, 3, 2), dims=(0, 2))),
    )
)

# --- stop_gradient ------------------------------------------------------------------------------------


def _infer_same(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    return (x,)


register(
    OpDef(
        name="stop_gradient",
        infer=_infer_same,
        evaluate=lambda node, x: x,
        vjp=NOT_DIFFERENTIABLE,
        cost=view_cost,
        axes=same_axes,
        lower=lambda node, args: f"{args[0]}.detach()",
        aten=dict.fromkeys(
            ("detach.default", "detach_copy.default"),
            lambda b, x, **_: b.emit("stop_gradient", x) if x.type.differentiable else x,
        ),
        samples=(sample((3, 4)), Sample((Arg(t(), "real"),))),
    )
)
