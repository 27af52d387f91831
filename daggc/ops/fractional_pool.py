"""Fractional max pooling (Graham, 2014): maxima over windows whose places are drawn at random, for 2 or 3 axes.

``y, indices = fractional_max_pool(x, samples)``: x ``[n, c, *spatial]``; samples ``[n, c, axes]``, numbers in [0, 1)
that place the windows of a plane along each axis. An index is flat, inside its plane of x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.max_pool import first_largest, scatter_to_maxima
from daggc.ops.opdef import Arg, Axes, Importer, OpDef, Sample, register, require, t
from daggc.ops.pooling import numbers, pool_cost, with_batch
from daggc.ops.slicing import slice_dim


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, samples = inputs
    kernel, size = attrs["kernel"], attrs["output_size"]
    require(x.dtype in ("f64", "f32"), f"x of f64 or f32 is required, got {x}")
    require(x.rank in (4, 5), f"x [n, c, *spatial] with 2 or 3 spatial axes is required, got {x}")
    require(x.shape[1] > 0, f"only the batch axis can be of size 0, got {x}")
    require(len(kernel) == len(size) == x.rank - 2, "a kernel and an output size for each spatial axis are required")
    require(min(*kernel, *size) > 0, "kernel and output size are positive")
    room = all(width + count - 1 <= whole for width, count, whole in zip(kernel, size, x.shape[2:], strict=True))
    if x.rank == 5:  # torch leaves a place for each window to move there
        room = all(width + count - 1 < whole for width, count, whole in zip(kernel, size, x.shape[2:], strict=True))
    require(room, f"windows {kernel} by {size} do not fit into {x}")
    wanted = TensorType(x.dtype, (*x.shape[:2], x.rank - 2))
    require(samples == wanted, f"samples {wanted} are required, got {samples}")
    shape = (*x.shape[:2], *size)
    return x.with_(shape=shape), TensorType("i64", shape)


def _starts(sample: np.floating, whole: int, count: int, width: int) -> list[int]:
    """Where the windows begin (FractionalMaxPooling.h, ``generate_intervals``), in the dtype of the sample."""
    real = sample.dtype.type
    last = whole - width
    if count == 1:
        return [last]
    step = real(last) / real(count - 1)
    return [int((real(i) + sample) * step) - int(sample * step) for i in range(count - 1)] + [last]


def _evaluate(node: Node, x: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kernel, counts, spatial = node.attrs["kernel"], node.attrs["output_size"], x.shape[2:]
    values, indices = (np.empty(output.type.shape, output.type.numpy_dtype) for output in node.outputs)
    places = np.arange(math.prod(spatial)).reshape(spatial)
    for plane in np.ndindex(*x.shape[:2]):
        drawn = samples[plane] if len(spatial) == 3 else samples[plane][::-1]  # of two axes, the last comes first
        starts = [_starts(*axis) for axis in zip(drawn, spatial, counts, kernel, strict=True)]
        for at in np.ndindex(*counts):
            window = tuple(slice(s[i], s[i] + k) for s, i, k in zip(starts, at, kernel, strict=True))
            cells = (x[(*plane, *window)].reshape(-1), places[window].reshape(-1))
            values[(*plane, *at)], indices[(*plane, *at)] = first_largest(*cells)
    return values, indices


def _vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    """The samples move windows in jumps."""
    if cts[0] is None:
        return None, None
    return scatter_to_maxima(b, node.inputs[0], node.outputs[1], cts[0]), None


def _axes(node: Node) -> Axes:
    labels = ("n", "c", *(None,) * (node.inputs[0].type.rank - 2))
    return Axes((labels, ("n", "c", None)), (labels, labels))


def _lower(node: Node, args: Sequence[str]) -> str:
    a = node.attrs
    call = f"torch.ops.aten.fractional_max_pool{len(a['kernel'])}d"
    return f"{call}({args[0]}.contiguous(), {a['kernel']}, {a['output_size']}, {args[1]}.contiguous())"


def _import(rank: int) -> Importer:
    def importer(
        b: Builder, x: Value, kernel_size: Sequence[int], output_size: Sequence[int], random_samples: Value
    ) -> tuple[Value, ...]:
        attrs: dict[str, Any] = {"kernel": numbers(kernel_size, rank), "output_size": numbers(output_size, rank)}
        if random_samples.type.rank != 3:
            raise TypeRuleError(f"samples [n, c, {rank}] are required, got {random_samples.type}")
        batch = x.type.shape[0] if x.type.rank == rank + 2 else 1
        random_samples = slice_dim(b, random_samples, 0, 0, min(batch, random_samples.type.shape[0]))  # torch's first
        return with_batch(b, x, rank, lambda x: b.emit_many("fractional_max_pool", x, random_samples, **attrs))

    return importer


def _sample(shape: Sequence[int], kernel: Sequence[int], size: Sequence[int]) -> Sample:
    inputs = (Arg(t(*shape), "distinct"), Arg(t(*shape[:2], len(kernel)), "unit"))
    attrs: dict[str, Attr] = {"kernel": tuple(kernel), "output_size": tuple(size)}
    return Sample(inputs, attrs)


register(
    OpDef(
        name="fractional_max_pool",
        infer=_infer,
        evaluate=_evaluate,
        vjp=_vjp,
        cost=pool_cost,
        axes=_axes,
        lower=_lower,
        aten={f"fractional_max_pool{rank}d.default": _import(rank) for rank in (2, 3)},
        samples=(_sample((2, 2, 7, 9), (2, 3), (3, 4)), _sample((1, 2, 5, 6, 4), (2, 2, 1), (3, 2, 3))),
    )
)
