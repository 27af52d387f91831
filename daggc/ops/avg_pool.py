"""Average pooling over 1 to 3 spatial axes, adaptive or not; shapes ``[n, c, *spatial]``.

Averages are linear: the op and its ``_backward`` are each other's derivative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.opdef import VJP, Importer, require, sample, upcast
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
from daggc.ops.windows import add_windows, windows


def _ones(attrs: Attrs) -> tuple[int, ...]:
    return (1,) * len(attrs["kernel"])


def _infer_avg_pool(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require(x.is_float, "x of a float dtype is required")
    require(attrs["divisor_override"] != 0, "divisor_override is not zero")
    require(isinstance(attrs["count_include_pad"], bool), "count_include_pad is a bool")
    fits = x.rank < 5 or all(k <= size for k, size in zip(attrs["kernel"], x.shape[2:], strict=True))
    require(fits, f"a window that x holds is required of three spatial axes, got {attrs['kernel']} for {x}")
    return (x.with_(shape=(*x.shape[:2], *window_counts(x, attrs, _ones(attrs)))),)


def _infer_avg_pool_backward(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (ct,) = inputs
    x = ct.with_(shape=attrs["input_shape"])
    (y,) = _infer_avg_pool((x,), attrs)
    require(ct == y, f"a cotangent {y} is required")
    return (x,)


def _divisors(spatial: Sequence[int], counts: Sequence[int], attrs: Attrs) -> np.ndarray:
    """By what each window's sum is divided: the override, or its cells inside of the input or of its padding."""
    if attrs["divisor_override"] is not None:
        return np.full(counts, attrs["divisor_override"], np.int64)
    margin = attrs["padding"] if attrs["count_include_pad"] else (0,) * len(spatial)
    result = np.ones((), np.int64)
    for size, count, k, s, p, m in zip(
        spatial, counts, attrs["kernel"], attrs["stride"], attrs["padding"], margin, strict=True
    ):
        start = np.arange(count) * s - p
        cells = np.minimum(start + k, size + m) - np.maximum(start, -m)
        result = result[..., None] * cells
    return result


def _evaluate_avg_pool(node: Node, x: np.ndarray) -> np.ndarray:
    a, counts = node.attrs, node.output.type.shape[2:]
    cells = windows(x, counts, a["kernel"], a["stride"], a["padding"], _ones(a))
    total = cells.sum(tuple(range(-len(counts), 0)))
    return total / _divisors(x.shape[2:], counts, a).astype(x.dtype)


def _evaluate_avg_pool_backward(node: Node, ct: np.ndarray) -> np.ndarray:
    a, shape = node.attrs, node.output.type.shape
    share = ct / _divisors(shape[2:], ct.shape[2:], a).astype(ct.dtype)
    share = np.broadcast_to(share.reshape(*ct.shape, *_ones(a)), (*ct.shape, *a["kernel"]))
    return add_windows(share, shape, a["kernel"], a["stride"], a["padding"], _ones(a))


def _linear_vjp(transposed: str, forward: bool) -> VJP:
    """The derivative of an average or of its backward is the other one."""

    def vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
        assert cts[0] is not None
        attrs = {name: value for name, value in node.attrs.items() if name != "input_shape"}
        if forward:
            attrs["input_shape"] = node.inputs[0].type.shape
        return (b.emit(transposed, cts[0], **attrs),)

    return vjp


def _lower_avg_pool(node: Node, args: Sequence[str]) -> str:
    a = node.attrs
    return (
        f"kernels.avg_pool({args[0]}, {a['kernel']}, {a['stride']}, {a['padding']}, {a['ceil_mode']}, "
        f"{a['count_include_pad']}, {a['divisor_override']})"
    )


def _lower_avg_pool_backward(node: Node, args: Sequence[str]) -> str:
    a = node.attrs
    return (
        f"kernels.avg_pool_backward({args[0]}, {a['input_shape']}, {a['kernel']}, {a['stride']}, {a['padding']}, "
        f"{a['ceil_mode']}, {a['count_include_pad']}, {a['divisor_override']})"
    )


def _import_avg_pool(rank: int) -> Importer:
    def importer(
        b: Builder,
        x: Value,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Value:
        kernel = numbers(kernel_size, rank)
        attrs = {
            "kernel": kernel,
            "stride": numbers(stride, rank) or kernel,
            "padding": numbers(padding, rank),
            "ceil_mode": ceil_mode,
            "count_include_pad": count_include_pad,
            "divisor_override": divisor_override,
        }
        return with_batch(b, x, rank, lambda x: b.emit_many("avg_pool", x, **attrs))[0]

    return importer


def _infer_adaptive_avg(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require(x.is_float, "x of a float dtype is required")
    require(len(attrs["output_size"]) == len(spatial_shape(x)), "output_size is a spatial shape")
    require(min(attrs["output_size"]) > 0, "output_size is positive")
    return (x.with_(shape=(*x.shape[:2], *attrs["output_size"])),)


def _infer_adaptive_avg_backward(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (ct,) = inputs
    x = ct.with_(shape=attrs["input_shape"])
    require(_infer_adaptive_avg((x,), attrs) == (ct,), "a cotangent of the output's shape is required")
    return (x,)


def _evaluate_adaptive_avg(node: Node, x: np.ndarray) -> np.ndarray:
    y = np.empty(node.output.type.shape, x.dtype)
    spatial = tuple(range(2, x.ndim))
    for at, window in adaptive_windows(x.shape[2:], node.attrs["output_size"]):
        y[(..., *at)] = x[(..., *window)].mean(spatial)
    return y


def _evaluate_adaptive_avg_backward(node: Node, ct: np.ndarray) -> np.ndarray:
    x = np.zeros(node.output.type.shape, ct.dtype)
    for at, window in adaptive_windows(x.shape[2:], node.attrs["output_size"]):
        cells = math.prod(part.stop - part.start for part in window)
        x[(..., *window)] += (ct[(..., *at)] / ct.dtype.type(cells)).reshape(*ct.shape[:2], *(1,) * len(at))
    return x


def _import_adaptive_avg(rank: int) -> Importer:
    """Down to one position it is a mean, as in torch."""

    def importer(b: Builder, x: Value, output_size: Sequence[int]) -> Value:
        size = numbers(output_size, rank)
        if set(size) == {1}:
            axes = range(x.type.rank - rank, x.type.rank)
            return b.emit("mean", x, dims=tuple(axes), keepdim=True)
        return with_batch(b, x, rank, lambda x: b.emit_many("adaptive_avg_pool", x, output_size=size))[0]

    return importer


_AVERAGE = {"count_include_pad": True, "divisor_override": None}
_AVG_CASES = (
    ((2, 3, 6, 8), window_attrs((2, 2), **_AVERAGE)),
    ((2, 3, 7, 6), window_attrs((3, 2), stride=(2, 2), padding=(1, 1), ceil_mode=True, **_AVERAGE)),
    ((2, 3, 8, 6), window_attrs((3, 2), stride=(2, 1), padding=(1, 1), ceil_mode=True,
                           count_include_pad=False, divisor_override=None)),
    ((2, 3, 7, 6), window_attrs((3, 2), stride=(2, 2), count_include_pad=True, divisor_override=5)),
    ((2, 3, 9), window_attrs((3,), stride=(2,), padding=(1,), count_include_pad=False, divisor_override=None)),
    ((1, 2, 4, 5, 4), window_attrs((2, 3, 2), stride=(2, 1, 2), padding=(1, 1, 0), **_AVERAGE)),
)  # fmt: skip
register_pool(
    "avg_pool",
    _infer_avg_pool,
    upcast(_evaluate_avg_pool),
    _linear_vjp("avg_pool_backward", forward=True),
    _lower_avg_pool,
    tuple(sample(shape, **attrs) for shape, attrs in _AVG_CASES),
    {f"avg_pool{rank}d.default": _import_avg_pool(rank) for rank in (1, 2, 3)},
)
register_pool(
    "avg_pool_backward",
    _infer_avg_pool_backward,
    upcast(_evaluate_avg_pool_backward),
    _linear_vjp("avg_pool", forward=False),
    _lower_avg_pool_backward,
    tuple(sample(pooled_shape(shape, attrs), input_shape=shape, **attrs) for shape, attrs in _AVG_CASES),
)
register_pool(
    "adaptive_avg_pool",
    _infer_adaptive_avg,
    upcast(_evaluate_adaptive_avg),
    _linear_vjp("adaptive_avg_pool_backward", forward=True),
    lambda node, args: f"kernels.adaptive_avg_pool({args[0]}, {node.attrs['output_size']})",
    tuple(sample(shape, output_size=size) for shape, size in ADAPTIVE_CASES),
    {
        **{f"adaptive_avg_pool{rank}d.default": _import_adaptive_avg(rank) for rank in (1, 2, 3)},
        **{f"_adaptive_avg_pool{rank}d.default": _import_adaptive_avg(rank) for rank in (2, 3)},
    },
)
register_pool(
    "adaptive_avg_pool_backward",
    _infer_adaptive_avg_backward,
    upcast(_evaluate_adaptive_avg_backward),
    _linear_vjp("adaptive_avg_pool", forward=False),
    lambda node, args: f"kernels.adaptive_avg_pool_backward({args[0]}, {node.attrs['input_shape']})",
    tuple(sample((*shape[:2], *size), output_size=size, input_shape=shape) for shape, size in ADAPTIVE_CASES),
)
