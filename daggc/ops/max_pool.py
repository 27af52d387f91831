"""Max pooling over 1 to 3 spatial axes, adaptive or not; shapes ``[n, c, *spatial]``.

A maximum comes with the flat index, inside its plane of the input, of the element it took, as in torch; its
derivative scatters along these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import full, reshape, zeros_like
from daggc.ops.opdef import Arg, Importer, Sample, require, sample, t, upcast
from daggc.ops.pooling import (
    ADAPTIVE_CASES,
    adaptive_windows,
    numbers,
    pooled_shape,
    register_pool,
    spatial_shape,
    window_attrs,
    window_counts,
    with_batch,
)
from daggc.ops.rearrange import import_max_unpool
from daggc.ops.windows import windows


def _flat(b: Builder, x: Value) -> Value:
    """``[n, c, positions]``."""
    return reshape(b, x, (*x.type.shape[:2], math.prod(x.type.shape[2:])))


def _with_indices(x: TensorType, counts: Sequence[int]) -> tuple[TensorType, ...]:
    shape = (*x.shape[:2], *counts)
    return x.with_(shape=shape), TensorType("i64", shape)


def _infer_max_pool(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require(x.is_float, "x of a float dtype is required")
    seen = all(d <= size or k == 1 for size, k, d in zip(x.shape[2:], attrs["kernel"], attrs["dilation"], strict=True))
    require(seen, f"a window may see nothing of {x} with dilation {attrs['dilation']}")
    return _with_indices(x, window_counts(x, attrs, attrs["dilation"]))


def first_largest(cells: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maxima over the last axis and their ``places``; of cells outside of the input the place is -1.

    Where all cells inside are -inf, the first of them counts.
    """
    best = np.where(places >= 0, cells, -np.inf).argmax(-1)
    best = np.where(np.take_along_axis(places, best[..., None], -1)[..., 0] < 0, (places >= 0).argmax(-1), best)
    pick = best[..., None]
    return np.take_along_axis(cells, pick, -1)[..., 0], np.take_along_axis(places, pick, -1)[..., 0]


def _evaluate_max_pool(node: Node, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, indices = (output.type for output in node.outputs)
    a, spatial = node.attrs, x.shape[2:]
    geometry = (values.shape[2:], a["kernel"], a["stride"], a["padding"], a["dilation"])
    cells = windows(x.astype(np.float64), *geometry).reshape(*values.shape, math.prod(a["kernel"]))
    places = windows(np.arange(math.prod(spatial)).reshape(spatial), *geometry, fill=-1)
    places = np.broadcast_to(places.reshape(*values.shape[2:], -1), cells.shape)
    top, where = first_largest(cells, places)
    return top.astype(values.numpy_dtype), where.astype(indices.numpy_dtype)


def _max_pool_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    if cts[0] is None:
        return (None,)
    shape = node.inputs[0].type.shape
    return (b.emit("max_pool_backward", cts[0], node.outputs[1], input_shape=shape, **node.attrs),)


def _infer_max_pool_backward(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    ct, indices = inputs
    x = TensorType(ct.dtype, attrs["input_shape"])
    expected = _infer_max_pool((x,), attrs)
    require((ct, indices) == expected, f"a cotangent and indices of types {expected[0]}, {expected[1]} are required")
    return (x,)


def _evaluate_max_pool_backward(node: Node, ct: np.ndarray, indices: np.ndarray) -> np.ndarray:
    shape = node.output.type.shape
    planes = np.zeros((math.prod(shape[:2]), math.prod(shape[2:])), ct.dtype)
    rows = (len(planes), math.prod(ct.shape[2:]))
    np.add.at(planes, (np.arange(len(planes))[:, None], indices.reshape(rows)), ct.reshape(rows))
    return planes.reshape(shape)


def _take(b: Builder, x: Value, indices: Value) -> Value:
    """Elements of each plane of x at flat indices: the transpose of the scatter."""
    return reshape(b, b.emit("gather", _flat(b, x), _flat(b, indices), dim=2), indices.type.shape)


def _max_pool_backward_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    assert cts[0] is not None
    return _take(b, cts[0], node.inputs[1]), None


def _lower_max_pool(node: Node, args: Sequence[str]) -> str:
    a = node.attrs
    call = f"torch.ops.aten.max_pool{len(a['kernel'])}d_with_indices"
    return f"{call}({args[0]}, {a['kernel']}, {a['stride']}, {a['padding']}, {a['dilation']}, {a['ceil_mode']})"


def _lower_max_pool_backward(node: Node, args: Sequence[str]) -> str:
    a = node.attrs
    return (
        f"kernels.max_pool_backward({args[0]}, {args[1]}, {a['input_shape']}, "
        f"{a['kernel']}, {a['stride']}, {a['padding']}, {a['dilation']}, {a['ceil_mode']})"
    )


def _pool_attrs(
    rank: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> dict[str, Attr]:
    """ATen's arguments as attributes; by default windows lie side by side."""
    kernel = numbers(kernel_size, rank)
    return {
        "kernel": kernel,
        "stride": numbers(stride, rank) or kernel,
        "padding": numbers(padding, rank),
        "dilation": numbers(dilation, rank),
        "ceil_mode": ceil_mode,
    }


def _import_max_pool(rank: int, with_indices: bool) -> Importer:
    def importer(
        b: Builder,
        x: Value,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        ceil_mode: bool = False,
    ) -> Value | tuple[Value, ...]:
        attrs = _pool_attrs(rank, kernel_size, stride, padding, dilation, ceil_mode)
        values, indices = with_batch(b, x, rank, lambda x: b.emit_many("max_pool", x, **attrs))
        return (values, indices) if with_indices else values

    return importer


def _import_max_pool_backward(rank: int) -> Importer:
    """The derivative by the cotangent is that of a scatter; by x it is zero, not absent."""

    def importer(
        b: Builder,
        ct: Value,
        x: Value,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
        indices: Value,
    ) -> Value:
        attrs = _pool_attrs(rank, kernel_size, stride, padding, dilation, ceil_mode)
        if x.type.rank == rank + 1:
            ct, indices = (reshape(b, value, (1, *value.type.shape)) for value in (ct, indices))
        shape = (1,) * (rank + 2 - x.type.rank) + x.type.shape
        x_ct = reshape(b, b.emit("max_pool_backward", ct, indices, input_shape=shape, **attrs), x.type.shape)
        return b.emit("where", full(b, False, x.type.shape, "bool"), x, x_ct)

    return importer


def _infer_adaptive_max(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require(x.is_float, "x of a float dtype is required")
    require(len(attrs["output_size"]) == len(spatial_shape(x)), "output_size is a spatial shape")
    return _with_indices(x, attrs["output_size"])


def _evaluate_adaptive_max(node: Node, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, where = (np.empty(output.type.shape, output.type.numpy_dtype) for output in node.outputs)
    places = np.arange(math.prod(x.shape[2:])).reshape(x.shape[2:])
    for at, window in adaptive_windows(x.shape[2:], node.attrs["output_size"]):
        inside = places[window].reshape(-1)
        cells = x[(..., *window)].reshape(*x.shape[:2], inside.size)
        top, place = first_largest(cells.astype(np.float64), np.broadcast_to(inside, cells.shape))
        values[(..., *at)], where[(..., *at)] = top, place
    return values, where


def _adaptive_max_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    if cts[0] is None:
        return (None,)
    return (scatter_to_maxima(b, node.inputs[0], node.outputs[1], cts[0]),)


def scatter_to_maxima(b: Builder, x: Value, indices: Value, ct: Value) -> Value:
    """The cotangent of x: that of each maximum, added where it was."""
    scattered = b.emit("scatter_add", zeros_like(b, _flat(b, x)), _flat(b, indices), _flat(b, ct), dim=2)
    return reshape(b, scattered, x.type.shape)


def _import_adaptive_max(rank: int) -> Importer:
    def importer(b: Builder, x: Value, output_size: Sequence[int]) -> tuple[Value, ...]:
        size = numbers(output_size, rank)
        return with_batch(b, x, rank, lambda x: b.emit_many("adaptive_max_pool", x, output_size=size))

    return importer


_MAX_CASES = (
    ((2, 3, 6, 8), window_attrs((2, 2), dilation=(1, 1))),
    ((2, 3, 7, 6), window_attrs((3, 2), stride=(2, 1), padding=(1, 1), dilation=(1, 2), ceil_mode=True)),
    ((2, 3, 9), window_attrs((3,), stride=(2,), padding=(1,), dilation=(1,))),
    ((1, 2, 4, 5, 4), window_attrs((2, 3, 2), stride=(2, 1, 2), padding=(0, 1, 0), dilation=(1, 1, 1))),
)


def _scatter_sample(shape: Sequence[int], attrs: dict[str, Any]) -> Sample:
    out = pooled_shape(shape, attrs)
    indices = Arg(t(*out, dtype="i64"), f"index:{math.prod(shape[2:])}")
    return Sample((Arg(t(*out)), indices), {**attrs, "input_shape": shape})


register_pool(
    "max_pool",
    _infer_max_pool,
    _evaluate_max_pool,
    _max_pool_vjp,
    _lower_max_pool,
    tuple(sample(shape, domain="distinct", **attrs) for shape, attrs in _MAX_CASES),
    {
        **{f"max_pool{rank}d.default": _import_max_pool(rank, False) for rank in (1, 2, 3)},
        **{f"max_pool{rank}d_with_indices.default": _import_max_pool(rank, True) for rank in (1, 2, 3)},
    },
)
register_pool(
    "max_pool_backward",
    _infer_max_pool_backward,
    upcast(_evaluate_max_pool_backward),
    _max_pool_backward_vjp,
    _lower_max_pool_backward,
    tuple(_scatter_sample(shape, attrs) for shape, attrs in _MAX_CASES),
    {
        **{f"max_pool{rank}d_with_indices_backward.default": _import_max_pool_backward(rank) for rank in (2, 3)},
        **{f"max_unpool{rank}d.default": import_max_unpool(rank) for rank in (2, 3)},
    },
)
register_pool(
    "adaptive_max_pool",
    _infer_adaptive_max,
    _evaluate_adaptive_max,
    _adaptive_max_vjp,
    lambda node, args: (
        f"torch.ops.aten.adaptive_max_pool{len(node.attrs['output_size'])}d({args[0]}, {node.attrs['output_size']})"
    ),
    tuple(sample(shape, domain="distinct", output_size=size) for shape, size in ADAPTIVE_CASES),
    {f"adaptive_max_pool{rank}d.default": _import_adaptive_max(rank) for rank in (1, 2, 3)},
)
