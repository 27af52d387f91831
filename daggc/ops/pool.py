"""Pooling over 1 to 3 spatial axes, adaptive or not; shapes ``[n, c, *spatial]``.

Averages are linear: the op and its ``_backward`` are each other's derivative. A maximum comes with the flat
index, inside its plane of the input, of the element it took, as in torch; its derivative scatters along these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import reshape, zeros_like
from daggc.ops.opdef import (
    VJP,
    Arg,
    Axes,
    Cost,
    Evaluate,
    Importer,
    Infer,
    OpDef,
    Sample,
    leading_axes,
    node_bytes,
    register,
    require,
    sample,
    t,
    upcast,
)
from daggc.ops.windows import add_windows, output_size, span, windows

# --- what all have in common --------------------------------------------------------------------------


def _spatial_shape(x: TensorType) -> tuple[int, ...]:
    require(3 <= x.rank <= 5, f"x [n, c, *spatial] with 1 to 3 spatial axes is required, got {x}")
    return x.shape[2:]


def _window_counts(x: TensorType, attrs: Attrs, dilation: Sequence[int]) -> tuple[int, ...]:
    """The spatial shape of the output. Raises TypeRuleError as torch does for windows that do not fit."""
    spatial, kernel, stride, padding = _spatial_shape(x), attrs["kernel"], attrs["stride"], attrs["padding"]
    lengths = {len(kernel), len(stride), len(padding), len(dilation)}
    require(lengths == {len(spatial)}, f"{len(spatial)} numbers for each of kernel, stride and padding are required")
    require(min(*kernel, *stride, *dilation) >= 1, "kernel, stride and dilation are positive")
    half = all(0 <= p <= span(k, d) // 2 for p, k, d in zip(padding, kernel, dilation, strict=True))
    require(half, f"padding is at most half of the kernel, got {padding} and {kernel}")
    counts = tuple(
        output_size(size, k, s, p, d, attrs["ceil_mode"])
        for size, k, s, p, d in zip(spatial, kernel, stride, padding, dilation, strict=True)
    )
    require(min(counts) > 0, f"the output would have the spatial shape {counts}")
    return counts


def _planes(node: Node) -> Axes:
    """Samples and channels are independent."""
    return leading_axes(node.outputs[0].type.rank - 2)(node)


def _cost(node: Node) -> Cost:
    """An operation for each element of each window, or for each element where windows are adaptive."""
    window = math.prod(node.attrs.get("kernel", ()))
    return Cost(window * min(v.type.numel for v in (*node.inputs, *node.outputs)) + 1.0 * node.inputs[0].type.numel,
                node_bytes(node), "reduction")  # fmt: skip


def _tuple(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * rank if len(numbers) == 1 else numbers


def _with_batch(b: Builder, x: Value, rank: int, emit: Callable[[Value], tuple[Value, ...]]) -> tuple[Value, ...]:
    """Apply ``emit`` to x, with a batch axis for the time of the op where x has none."""
    if x.type.rank == rank + 2:
        return emit(x)
    if x.type.rank != rank + 1:
        raise TypeRuleError(f"pooling over {rank} axes needs {rank + 1} or {rank + 2} dimensions, got {x.type}")
    outputs = emit(reshape(b, x, (1, *x.type.shape)))
    return tuple(reshape(b, y, y.type.shape[1:]) for y in outputs)


def _flat(b: Builder, x: Value) -> Value:
    """``[n, c, positions]``."""
    return reshape(b, x, (*x.type.shape[:2], math.prod(x.type.shape[2:])))


def _unflatten(attr: str) -> Infer:
    """The type rule of the backward of an average: one of the shape that ``attr`` holds."""

    def infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        (ct,) = inputs
        return (ct.with_(shape=attrs[attr]),)

    return infer


# --- maxima -------------------------------------------------------------------------------------------


def _with_indices(x: TensorType, counts: Sequence[int]) -> tuple[TensorType, ...]:
    shape = (*x.shape[:2], *counts)
    return x.with_(shape=shape), TensorType("i64", shape)


def _infer_max_pool(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require(x.is_float, "x of a float dtype is required")
    return _with_indices(x, _window_counts(x, attrs, attrs["dilation"]))


def _first_largest(cells: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maxima over the last axis and their ``places``; of cells outside of the input the place is -1."""
    best = np.where(places >= 0, cells, -np.inf).argmax(-1)
    best = np.where(np.take_along_axis(places, best[..., None], -1)[..., 0] < 0, (places >= 0).argmax(-1), best)
    pick = best[..., None]
    return np.take_along_axis(cells, pick, -1)[..., 0], np.take_along_axis(places, pick, -1)[..., 0]


def _evaluate_max_pool(node: Node, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, indices = (output.type for output in node.outputs)
    a, spatial = node.attrs, x.shape[2:]
    geometry = (values.shape[2:], a["kernel"], a["stride"], a["padding"], a["dilation"])
    wide = np.promote_types(x.dtype, np.float32) if x.dtype.kind == "f" else np.dtype(np.float32)
    cells = windows(x.astype(wide), *geometry).reshape(*values.shape, -1)
    places = windows(np.arange(math.prod(spatial)).reshape(spatial), *geometry, fill=-1)
    places = np.broadcast_to(places.reshape(*values.shape[2:], -1), cells.shape)
    top, where = _first_largest(cells, places)
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
    np.add.at(planes, (np.arange(len(planes))[:, None], indices.reshape(len(planes), -1)), ct.reshape(len(planes), -1))
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
        kernel = _tuple(kernel_size, rank)
        attrs = {
            "kernel": kernel,
            "stride": _tuple(stride, rank) or kernel,
            "padding": _tuple(padding, rank),
            "dilation": _tuple(dilation, rank),
            "ceil_mode": ceil_mode,
        }
        values, indices = _with_batch(b, x, rank, lambda x: b.emit_many("max_pool", x, **attrs))
        return (values, indices) if with_indices else values

    return importer


def _infer_adaptive_max(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require(x.is_float, "x of a float dtype is required")
    require(len(attrs["output_size"]) == len(_spatial_shape(x)), "output_size is a spatial shape")
    return _with_indices(x, attrs["output_size"])


def _adaptive_slices(size: int, count: int) -> list[slice]:
    """Window i of ``count`` over ``size`` positions: from floor(i * size / count) to ceil((i + 1) * size / count)."""
    return [slice(i * size // count, -((i + 1) * size // -count)) for i in range(count)]


def _adaptive_windows(spatial: Sequence[int], counts: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Each output position and its window."""
    slices = [_adaptive_slices(size, count) for size, count in zip(spatial, counts, strict=True)]
    return [(at, tuple(of[i] for of, i in zip(slices, at, strict=True))) for at in np.ndindex(*counts)]


def _evaluate_adaptive_max(node: Node, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, where = (np.empty(output.type.shape, output.type.numpy_dtype) for output in node.outputs)
    places = np.arange(math.prod(x.shape[2:])).reshape(x.shape[2:])
    for at, window in _adaptive_windows(x.shape[2:], node.attrs["output_size"]):
        cells = x[(..., *window)].reshape(*x.shape[:2], -1)
        top, place = _first_largest(cells.astype(np.float64), np.broadcast_to(places[window].reshape(-1), cells.shape))
        values[(..., *at)], where[(..., *at)] = top, place
    return values, where


def _adaptive_max_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    if cts[0] is None:
        return (None,)
    x, indices = node.inputs[0], node.outputs[1]
    scattered = b.emit("scatter_add", zeros_like(b, _flat(b, x)), _flat(b, indices), _flat(b, cts[0]), dim=2)
    return (reshape(b, scattered, x.type.shape),)


def _import_adaptive_max(rank: int) -> Importer:
    def importer(b: Builder, x: Value, output_size: Sequence[int]) -> tuple[Value, ...]:
        size = _tuple(output_size, rank)
        return _with_batch(b, x, rank, lambda x: b.emit_many("adaptive_max_pool", x, output_size=size))

    return importer


# --- averages -----------------------------------------------------------------------------------------


def _ones(attrs: Attrs) -> tuple[int, ...]:
    return (1,) * len(attrs["kernel"])


def _infer_avg_pool(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require(x.is_float, "x of a float dtype is required")
    require(attrs["divisor_override"] != 0, "divisor_override is not zero")
    require(isinstance(attrs["count_include_pad"], bool), "count_include_pad is a bool")
    return (x.with_(shape=(*x.shape[:2], *_window_counts(x, attrs, _ones(attrs)))),)


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
        kernel = _tuple(kernel_size, rank)
        attrs = {
            "kernel": kernel,
            "stride": _tuple(stride, rank) or kernel,
            "padding": _tuple(padding, rank),
            "ceil_mode": ceil_mode,
            "count_include_pad": count_include_pad,
            "divisor_override": divisor_override,
        }
        return _with_batch(b, x, rank, lambda x: b.emit_many("avg_pool", x, **attrs))[0]

    return importer


def _infer_adaptive_avg(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require(x.is_float, "x of a float dtype is required")
    require(len(attrs["output_size"]) == len(_spatial_shape(x)), "output_size is a spatial shape")
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
    for at, window in _adaptive_windows(x.shape[2:], node.attrs["output_size"]):
        y[(..., *at)] = x[(..., *window)].mean(spatial)
    return y


def _evaluate_adaptive_avg_backward(node: Node, ct: np.ndarray) -> np.ndarray:
    x = np.zeros(node.output.type.shape, ct.dtype)
    for at, window in _adaptive_windows(x.shape[2:], node.attrs["output_size"]):
        cells = math.prod(part.stop - part.start for part in window)
        x[(..., *window)] += (ct[(..., *at)] / ct.dtype.type(cells)).reshape(*ct.shape[:2], *(1,) * len(at))
    return x


def _import_adaptive_avg(rank: int) -> Importer:
    """Down to one position it is a mean, as in torch."""

    def importer(b: Builder, x: Value, output_size: Sequence[int]) -> Value:
        size = _tuple(output_size, rank)
        if set(size) == {1}:
            axes = range(x.type.rank - rank, x.type.rank)
            return b.emit("mean", x, dims=tuple(axes), keepdim=True)
        return _with_batch(b, x, rank, lambda x: b.emit_many("adaptive_avg_pool", x, output_size=size))[0]

    return importer


# --- the ops ------------------------------------------------------------------------------------------


def _register(
    name: str,
    infer: Infer,
    evaluate: Evaluate,
    vjp: VJP,
    lower: Callable[[Node, Sequence[str]], str],
    samples: Sequence[Sample],
    aten: dict[str, Importer] | None = None,
) -> None:
    register(
        OpDef(
            name=name,
            infer=infer,
            evaluate=evaluate,
            vjp=vjp,
            cost=_cost,
            axes=_planes,
            lower=lower,
            aten=aten or {},
            samples=samples,
        )
    )


def _window(kernel: Sequence[int], **changes: Attr) -> dict[str, Any]:
    rank = len(kernel)
    plain = {"kernel": tuple(kernel), "stride": tuple(kernel), "padding": (0,) * rank, "ceil_mode": False}
    return {**plain, **changes}


_MAX_CASES = (
    ((2, 3, 6, 8), _window((2, 2), dilation=(1, 1))),
    ((2, 3, 7, 6), _window((3, 2), stride=(2, 1), padding=(1, 1), dilation=(1, 2), ceil_mode=True)),
    ((2, 3, 9), _window((3,), stride=(2,), padding=(1,), dilation=(1,))),
    ((1, 2, 4, 5, 4), _window((2, 3, 2), stride=(2, 1, 2), padding=(0, 1, 0), dilation=(1, 1, 1))),
)
_AVERAGE = {"count_include_pad": True, "divisor_override": None}
_AVG_CASES = (
    ((2, 3, 6, 8), _window((2, 2), **_AVERAGE)),
    ((2, 3, 7, 6), _window((3, 2), stride=(2, 2), padding=(1, 1), ceil_mode=True, **_AVERAGE)),
    ((2, 3, 8, 6), _window((3, 2), stride=(2, 1), padding=(1, 1), ceil_mode=True,
                           count_include_pad=False, divisor_override=None)),
    ((2, 3, 7, 6), _window((3, 2), stride=(2, 2), count_include_pad=True, divisor_override=5)),
    ((2, 3, 9), _window((3,), stride=(2,), padding=(1,), count_include_pad=False, divisor_override=None)),
    ((1, 2, 4, 5, 4), _window((2, 3, 2), stride=(2, 1, 2), padding=(1, 1, 0), **_AVERAGE)),
)  # fmt: skip
_ADAPTIVE_CASES = (((2, 3, 6, 8), (3, 4)), ((2, 3, 7, 5), (3, 2)), ((2, 3, 7), (4,)), ((1, 2, 3, 4, 5), (2, 3, 3)))


def _counts(shape: Sequence[int], attrs: dict[str, Any]) -> tuple[int, ...]:
    dilation = attrs.get("dilation", (1,) * len(attrs["kernel"]))
    return (*shape[:2], *_window_counts(t(*shape), Attrs(attrs), dilation))


def _scatter_sample(shape: Sequence[int], attrs: dict[str, Any]) -> Sample:
    out = _counts(shape, attrs)
    indices = Arg(t(*out, dtype="i64"), f"index:{math.prod(shape[2:])}")
    return Sample((Arg(t(*out)), indices), {**attrs, "input_shape": shape})


_register(
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
_register(
    "max_pool_backward",
    _infer_max_pool_backward,
    upcast(_evaluate_max_pool_backward),
    _max_pool_backward_vjp,
    _lower_max_pool_backward,
    tuple(_scatter_sample(shape, attrs) for shape, attrs in _MAX_CASES),
)
_register(
    "adaptive_max_pool",
    _infer_adaptive_max,
    _evaluate_adaptive_max,
    _adaptive_max_vjp,
    lambda node, args: (
        f"torch.ops.aten.adaptive_max_pool{len(node.attrs['output_size'])}d({args[0]}, {node.attrs['output_size']})"
    ),
    tuple(sample(shape, domain="distinct", output_size=size) for shape, size in _ADAPTIVE_CASES),
    {f"adaptive_max_pool{rank}d.default": _import_adaptive_max(rank) for rank in (1, 2, 3)},
)
_register(
    "avg_pool",
    _infer_avg_pool,
    upcast(_evaluate_avg_pool),
    _linear_vjp("avg_pool_backward", forward=True),
    _lower_avg_pool,
    tuple(sample(shape, **attrs) for shape, attrs in _AVG_CASES),
    {f"avg_pool{rank}d.default": _import_avg_pool(rank) for rank in (1, 2, 3)},
)
_register(
    "avg_pool_backward",
    _infer_avg_pool_backward,
    upcast(_evaluate_avg_pool_backward),
    _linear_vjp("avg_pool", forward=False),
    _lower_avg_pool_backward,
    tuple(sample(_counts(shape, attrs), input_shape=shape, **attrs) for shape, attrs in _AVG_CASES),
)
_register(
    "adaptive_avg_pool",
    _infer_adaptive_avg,
    upcast(_evaluate_adaptive_avg),
    _linear_vjp("adaptive_avg_pool_backward", forward=True),
    lambda node, args: f"kernels.adaptive_avg_pool({args[0]}, {node.attrs['output_size']})",
    tuple(sample(shape, output_size=size) for shape, size in _ADAPTIVE_CASES),
    {
        **{f"adaptive_avg_pool{rank}d.default": _import_adaptive_avg(rank) for rank in (1, 2, 3)},
        **{f"_adaptive_avg_pool{rank}d.default": _import_adaptive_avg(rank) for rank in (2, 3)},
    },
)
_register(
    "adaptive_avg_pool_backward",
    _infer_adaptive_avg_backward,
    upcast(_evaluate_adaptive_avg_backward),
    _linear_vjp("adaptive_avg_pool", forward=False),
    lambda node, args: f"kernels.adaptive_avg_pool_backward({args[0]}, {node.attrs['input_shape']})",
    tuple(sample((*shape[:2], *size), output_size=size, input_shape=shape) for shape, size in _ADAPTIVE_CASES),
)
