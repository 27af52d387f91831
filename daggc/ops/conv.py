"""Convolution, 1 to 3 spatial axes, and its two gradients.

The three ops are the partial derivatives of one trilinear form ``<ct, conv(x, w)>``, so each is differentiated
by the other two, to any order. They share the attributes of ``conv``; input and weight gradients are nodes of
their own (a planner may split them: zero-bubble schedules), at the price of one joint call of
``convolution_backward``.

Shapes: x ``[n, c, *spatial]``; w ``[o, c / groups, *kernel]``, or ``[c, o / groups, *kernel]`` where transposed;
y ``[n, o, *out]``; the bias, a third input of ``conv``, ``[o]``. All of one float dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import add, reshape, sub, sum_dims
from daggc.ops.complex_numbers import imag, make_complex, real
from daggc.ops.opdef import (
    Axes,
    Cost,
    OpDef,
    Sample,
    node_bytes,
    register,
    require,
    sample,
    upcast,
)
from daggc.ops.windows import add_windows, output_size, span, windows

MEMORY_FORMATS = ("contiguous", "channels_last")
_GEOMETRY = ("stride", "padding", "dilation", "transposed", "output_padding", "groups", "memory_format")

# --- type rules ---------------------------------------------------------------------------------------


def conv_type(x: TensorType, weight: TensorType, attrs: Attrs) -> TensorType:
    """The type of ``conv(x, weight)``. Raises TypeRuleError if the shapes do not fit."""
    spatial = x.rank - 2
    groups, transposed = attrs["groups"], attrs["transposed"]
    require(1 <= spatial <= 3 and weight.rank == x.rank, "x and weight of one rank, 3 to 5, are required")
    require(x.dtype == weight.dtype and x.is_float, "x and weight of one float dtype are required")
    # Of no channels torch's kernels give an output of another shape than its type.
    some = all((*x.shape[1:], *weight.shape))
    require(some, f"only the batch axis can be of size 0, got x {x} and weight {weight}")
    for name in ("stride", "padding", "dilation", "output_padding"):
        require(len(attrs[name]) == spatial, f"{name} needs {spatial} numbers, got {attrs[name]}")
    require(min(*attrs["stride"], *attrs["dilation"]) >= 1, "strides and dilations are positive")
    require(min(*attrs["padding"], *attrs["output_padding"]) >= 0, "paddings are not negative")
    require(attrs["memory_format"] in MEMORY_FORMATS, f"memory_format is one of {MEMORY_FORMATS}")
    require(spatial > 1 or attrs["memory_format"] == "contiguous", "channels_last needs two or three spatial axes")
    channels, kernel = x.shape[1], weight.shape[2:]
    if transposed:
        require(channels == weight.shape[0] and channels % groups == 0, f"x has {channels} channels, weight does not")
        less = zip(attrs["output_padding"], attrs["stride"], attrs["dilation"], strict=True)
        require(all(extra < max(s, d) for extra, s, d in less), "output_padding is less than stride or dilation")
        out = weight.shape[1] * groups
        sizes = tuple(
            (size - 1) * s - 2 * p + span(k, d) + extra
            for size, k, s, p, d, extra in zip(
                x.shape[2:], kernel, attrs["stride"], attrs["padding"], attrs["dilation"], attrs["output_padding"],
                strict=True,
            )
        )  # fmt: skip
    else:
        require(
            channels == weight.shape[1] * groups and weight.shape[0] % groups == 0,
            f"x has {channels} channels, weight {weight.shape[1]} for each of {groups} groups",
        )
        require(not any(attrs["output_padding"]), "output_padding needs transposed")
        out = weight.shape[0]
        sizes = tuple(map(output_size, x.shape[2:], kernel, attrs["stride"], attrs["padding"], attrs["dilation"]))
    require(all(size > 0 for size in sizes), f"the output would have the spatial shape {sizes}")
    return TensorType(x.dtype, (x.shape[0], out, *sizes))


def _infer_conv(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, weight, *bias = inputs
    y = conv_type(x, weight, attrs)
    if bias:
        expected = TensorType(y.dtype, y.shape[1:2])
        require(bias == [expected], f"a bias {expected} is required")
    return (y,)


def _infer_input_grad(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    ct, weight = inputs
    x = TensorType(ct.dtype, attrs["input_shape"])
    y = conv_type(x, weight, attrs)
    require(ct == y, f"a cotangent {y} is required")
    return (x,)


def _infer_weight_grad(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    ct, x = inputs
    weight = TensorType(ct.dtype, attrs["weight_shape"])
    y = conv_type(x, weight, attrs)
    require(ct == y, f"a cotangent {y} is required")
    return (weight,)


# --- meaning ------------------------------------------------------------------------------------------
# The three functions below are of the plain convolution. The transposed one is its input gradient.


def _columns(x: np.ndarray, counts: Sequence[int], kernel: Sequence[int], attrs: Attrs) -> np.ndarray:
    """im2col: ``[n, groups, positions, channels of a group * kernel]``."""
    n, channels = x.shape[:2]
    groups, rank = attrs["groups"], len(kernel)
    view = windows(x, counts, kernel, attrs["stride"], attrs["padding"], attrs["dilation"])
    view = view.reshape(n, groups, channels // groups, *counts, *kernel)
    view = np.moveaxis(view, 2, 2 + rank)
    return view.reshape(n, groups, math.prod(counts), channels // groups * math.prod(kernel))


def _grouped_rows(y: np.ndarray, groups: int) -> np.ndarray:
    """``[n, groups, positions, channels of a group]``."""
    return np.swapaxes(y.reshape(y.shape[0], groups, y.shape[1] // groups, math.prod(y.shape[2:])), 2, 3)


def _forward(x: np.ndarray, weight: np.ndarray, shape: Sequence[int], attrs: Attrs) -> np.ndarray:
    groups = attrs["groups"]
    columns = _columns(x, shape[2:], weight.shape[2:], attrs)
    rows = columns @ np.swapaxes(weight.reshape(groups, weight.shape[0] // groups, -1), 1, 2)
    return np.swapaxes(rows, 2, 3).reshape(shape)


def _input_grad(ct: np.ndarray, weight: np.ndarray, shape: Sequence[int], attrs: Attrs) -> np.ndarray:
    groups, kernel = attrs["groups"], weight.shape[2:]
    columns = _grouped_rows(ct, groups) @ weight.reshape(groups, weight.shape[0] // groups, -1)
    columns = columns.reshape(ct.shape[0], groups, *ct.shape[2:], weight.shape[1], *kernel)
    columns = np.moveaxis(columns, 2 + len(kernel), 2)
    columns = columns.reshape(ct.shape[0], shape[1], *ct.shape[2:], *kernel)
    return add_windows(columns, shape, kernel, attrs["stride"], attrs["padding"], attrs["dilation"])


def _weight_grad(ct: np.ndarray, x: np.ndarray, shape: Sequence[int], attrs: Attrs) -> np.ndarray:
    columns = _columns(x, ct.shape[2:], shape[2:], attrs)
    rows = _grouped_rows(ct, attrs["groups"])
    return (np.swapaxes(rows, 2, 3) @ columns).sum(0).reshape(shape)


def _evaluate_conv(node: Node, x: np.ndarray, weight: np.ndarray, *bias: np.ndarray) -> np.ndarray:
    function = _input_grad if node.attrs["transposed"] else _forward
    y = function(x, weight, node.output.type.shape, node.attrs)
    return y + bias[0].reshape(-1, *(1,) * (y.ndim - 2)) if bias else y


def _evaluate_input_grad(node: Node, ct: np.ndarray, weight: np.ndarray) -> np.ndarray:
    function = _forward if node.attrs["transposed"] else _input_grad
    return function(ct, weight, node.attrs["input_shape"], node.attrs)


def _evaluate_weight_grad(node: Node, ct: np.ndarray, x: np.ndarray) -> np.ndarray:
    pair = (x, ct) if node.attrs["transposed"] else (ct, x)
    return _weight_grad(*pair, node.attrs["weight_shape"], node.attrs)


# --- derivatives --------------------------------------------------------------------------------------


def _geometry(node: Node) -> dict[str, Attr]:
    return {name: node.attrs[name] for name in _GEOMETRY}


def _conv_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,), (x, weight, *bias) = cts, node.inputs
    assert ct is not None
    geometry = _geometry(node)
    x_ct = b.emit("conv_input_grad", ct, weight, input_shape=x.type.shape, **geometry)
    weight_ct = b.emit("conv_weight_grad", ct, x, weight_shape=weight.type.shape, **geometry)
    return x_ct, weight_ct, *(sum_dims(b, ct, (0, *range(2, ct.type.rank))) for _ in bias)


def _input_grad_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (x_ct,), (ct, weight) = cts, node.inputs
    assert x_ct is not None
    geometry = _geometry(node)
    weight_ct = b.emit("conv_weight_grad", ct, x_ct, weight_shape=weight.type.shape, **geometry)
    return b.emit("conv", x_ct, weight, **geometry), weight_ct


def _weight_grad_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (weight_ct,), (ct, x) = cts, node.inputs
    assert weight_ct is not None
    geometry = _geometry(node)
    x_ct = b.emit("conv_input_grad", ct, weight_ct, input_shape=x.type.shape, **geometry)
    return b.emit("conv", x, weight_ct, **geometry), x_ct


# --- cost, axes, lowering -----------------------------------------------------------------------------


def _conv_cost(x: TensorType, weight: TensorType, y: TensorType, node: Node) -> Cost:
    """A multiplication and an addition for each weight at each of its positions; the same for all three ops.

    oneDNN copies what it reads and writes into blocked layouts.
    """
    small = x if node.attrs["transposed"] else y
    flops = 2 * small.numel * weight.numel / max(1, small.shape[1])
    kernel = "grouped" if node.attrs["groups"] > 1 else ""
    return Cost(flops, node_bytes(node), "conv", float(x.nbytes + y.nbytes), kernel)


def _cost(node: Node) -> Cost:
    return _conv_cost(node.inputs[0].type, node.inputs[1].type, node.output.type, node)


def _input_grad_cost(node: Node) -> Cost:
    return _conv_cost(node.output.type, node.inputs[1].type, node.inputs[0].type, node)


def _weight_grad_cost(node: Node) -> Cost:
    return _conv_cost(node.inputs[1].type, node.output.type, node.inputs[0].type, node)


def _labels(node: Node, rank: int) -> tuple[tuple[str | None, ...], tuple[str | None, ...], tuple[str | None, ...]]:
    """Labels of x, weight and y. Channels can be cut only where there is one group."""
    spatial = (None,) * (rank - 2)
    c, o = ("c", "o") if node.attrs["groups"] == 1 else (None, None)
    kernel_channels = (c, o) if node.attrs["transposed"] else (o, c)
    return ("n", c, *spatial), (*kernel_channels, *spatial), ("n", o, *spatial)


def _axes(node: Node) -> Axes:
    x, weight, y = _labels(node, node.output.type.rank)
    if len(node.inputs) == 3:  # cut along c, every part would add the bias
        x = (x[0], None, *x[2:])
        weight = tuple(None if label == "c" else label for label in weight)
        return Axes((x, weight, (y[1],)), (y,))
    return Axes((x, weight), (y,), {"c": "sum"} if x[1] else {})


def _input_grad_axes(node: Node) -> Axes:
    x, weight, y = _labels(node, node.output.type.rank)
    return Axes((y, weight), (x,), {"o": "sum"} if y[1] else {})


def _weight_grad_axes(node: Node) -> Axes:
    x, weight, y = _labels(node, node.output.type.rank)
    return Axes((y, x), (weight,), {"n": "sum"})


def _arguments(node: Node) -> str:
    values = [node.attrs[name] for name in ("stride", "padding", "dilation", "transposed", "output_padding", "groups")]
    return ", ".join(map(repr, values))


def _lower_conv(node: Node, args: Sequence[str]) -> str:
    bias = args[2] if len(args) == 3 else "None"
    if node.attrs["memory_format"] == "channels_last":
        return f"kernels.conv_channels_last({args[0]}, {args[1]}, {bias}, {_arguments(node)})"
    return f"torch.convolution({args[0]}.contiguous(), {args[1]}, {bias}, {_arguments(node)})"


def _lower_gradient(kernel: str, shape: str) -> Callable[[Node, Sequence[str]], str]:
    def lower(node: Node, args: Sequence[str]) -> str:
        last = node.attrs["memory_format"] == "channels_last"
        return f"kernels.{kernel}({args[0]}, {args[1]}, {node.attrs[shape]}, {last}, {_arguments(node)})"

    return lower


# --- importers ----------------------------------------------------------------------------------------


def _tuple(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """ATen's lists may have one number for all axes."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * rank if len(numbers) == 1 else numbers


def import_conv(
    b: Builder,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    transposed: bool,
    output_padding: int | Sequence[int],
    groups: int,
    memory_format: str = "contiguous",
) -> Value:
    """``aten.convolution``; an x without a batch axis is given one for the op.

    ``memory_format``: what the capture saw (``channels_last`` where x or the weight was laid out so).
    """
    if x.type.is_complex and weight.type.is_complex:
        convolve = partial(
            import_conv, b, stride=stride, padding=padding, dilation=dilation, transposed=transposed,
            output_padding=output_padding, groups=groups, memory_format=memory_format,
        )  # fmt: skip
        return _of_complex(b, x, weight, bias, convolve)
    rank = weight.type.rank - 2
    if x.type.rank == rank + 1:
        batch = reshape(b, x, (1, *x.type.shape))
        y = import_conv(b, batch, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
        return reshape(b, y, y.type.shape[1:])
    return b.emit(
        "conv",
        x,
        weight,
        *(() if bias is None else (bias,)),
        stride=_tuple(stride, rank),
        padding=_tuple(padding, rank),
        dilation=_tuple(dilation, rank),
        transposed=transposed,
        output_padding=_tuple(output_padding, rank),
        groups=groups,
        memory_format=memory_format if rank > 1 else "contiguous",
    )


def _of_complex(
    b: Builder, x: Value, weight: Value, bias: Value | None, convolve: Callable[[Value, Value, Value | None], Value]
) -> Value:
    """Three convolutions of real numbers for one of complex ones (Gauss), as torch does it."""
    parts = [(real(b, value), imag(b, value)) for value in (x, weight, *([] if bias is None else [bias]))]
    sums = [add(b, *pair) for pair in parts]
    of_real = convolve(*(re for re, _ in parts), *([None] if bias is None else []))
    of_imag = convolve(parts[0][1], parts[1][1], None)
    of_sums = convolve(*sums, *([None] if bias is None else []))
    return make_complex(b, sub(b, of_real, of_imag), sub(b, sub(b, of_sums, of_real), of_imag))


def _import_plain(
    b: Builder,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
    *,
    memory_format: str = "contiguous",
) -> Value:
    return import_conv(b, x, weight, bias, stride, padding, dilation, False, (0,), groups, memory_format)


def _import_named_padding(
    b: Builder,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Sequence[int] = (1,),
    padding: str = "valid",
    dilation: Sequence[int] = (1,),
    groups: int = 1,
    *,
    memory_format: str = "contiguous",
) -> Value:
    """``same`` keeps the spatial shape; where the total padding is odd, the end of an axis gets one more."""
    rank = weight.type.rank - 2
    left = (0,) * rank
    if padding == "same":
        if any(s != 1 for s in stride):
            raise TypeRuleError(f"padding 'same' needs strides of 1, got {tuple(stride)}")
        total = [span(k, d) - 1 for k, d in zip(weight.type.shape[2:], _tuple(dilation, rank), strict=True)]
        left = tuple(width // 2 for width in total)
        if any(width % 2 for width in total):
            lead = ((0, 0),) * (x.type.rank - rank)
            x = b.emit("pad", x, pads=(*lead, *((0, width % 2) for width in total)), value=0.0)
    elif padding != "valid":
        raise TypeRuleError(f"padding is 'same' or 'valid' or numbers, got {padding!r}")
    return import_conv(b, x, weight, bias, stride, left, dilation, False, (0,), groups, memory_format)


def _import_transposed(
    b: Builder,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
    dilation: Sequence[int] = (1,),
    *,
    memory_format: str = "contiguous",
) -> Value:
    return import_conv(b, x, weight, bias, stride, padding, dilation, True, output_padding, groups, memory_format)


def _import_convolution(b: Builder, *args: Any, memory_format: str = "contiguous") -> Value:
    return import_conv(b, *args[:9], memory_format=memory_format)


# --- the ops ------------------------------------------------------------------------------------------


def _attrs(rank: int, **changes: Attr) -> dict[str, Attr]:
    plain = {
        "stride": (1,) * rank,
        "padding": (0,) * rank,
        "dilation": (1,) * rank,
        "transposed": False,
        "output_padding": (0,) * rank,
        "groups": 1,
        "memory_format": "contiguous",
    }
    return {**plain, **changes}


_Shape = tuple[int, ...]
_CASES: tuple[tuple[_Shape, _Shape, dict[str, Attr]], ...] = (  # shapes of x and weight, attributes
    ((2, 3, 5, 6), (4, 3, 3, 3), _attrs(2, padding=(1, 1))),
    ((2, 3, 9), (4, 3, 3), _attrs(1, stride=(2,), dilation=(2,))),
    ((1, 2, 4, 4, 5), (3, 2, 2, 2, 2), _attrs(3, padding=(1, 0, 0), stride=(1, 2, 1))),
    ((2, 4, 7, 6), (6, 2, 3, 2), _attrs(2, groups=2, stride=(3, 2), padding=(1, 0), dilation=(1, 2))),
    ((2, 4, 6, 6), (4, 1, 3, 3), _attrs(2, groups=4, padding=(1, 1), memory_format="channels_last")),
    ((2, 3, 4, 5), (3, 2, 3, 3), _attrs(2, transposed=True, stride=(2, 2), padding=(1, 1), output_padding=(1, 0))),
    ((2, 4, 5), (4, 3, 4), _attrs(1, transposed=True, groups=2, stride=(3,))),
)


def _output_shape(x: _Shape, weight: _Shape, attrs: dict[str, Attr]) -> _Shape:
    return conv_type(TensorType("f64", x), TensorType("f64", weight), Attrs(attrs)).shape


_SAMPLES: tuple[Sample, ...] = (
    *(sample(x, weight, **attrs) for x, weight, attrs in _CASES),
    *(sample(x, weight, _output_shape(x, weight, attrs)[1:2], **attrs) for x, weight, attrs in _CASES[::3]),
)

register(
    OpDef(
        name="conv",
        infer=_infer_conv,
        evaluate=upcast(_evaluate_conv),
        vjp=_conv_vjp,
        cost=_cost,
        axes=_axes,
        lower=_lower_conv,
        aten={
            "convolution.default": _import_convolution,
            **{f"conv{rank}d.default": _import_plain for rank in (1, 2, 3)},
            **{f"conv{rank}d.padding": _import_named_padding for rank in (1, 2, 3)},
            "conv_transpose1d.default": _import_transposed,
            "conv_transpose2d.input": _import_transposed,
            "conv_transpose3d.input": _import_transposed,
        },
        samples=_SAMPLES,
    )
)
register(
    OpDef(
        name="conv_input_grad",
        infer=_infer_input_grad,
        evaluate=upcast(_evaluate_input_grad),
        vjp=_input_grad_vjp,
        cost=_input_grad_cost,
        axes=_input_grad_axes,
        lower=_lower_gradient("conv_input_grad", "input_shape"),
        aten={},
        samples=tuple(sample(_output_shape(x, w, attrs), w, input_shape=x, **attrs) for x, w, attrs in _CASES),
    )
)
register(
    OpDef(
        name="conv_weight_grad",
        infer=_infer_weight_grad,
        evaluate=upcast(_evaluate_weight_grad),
        vjp=_weight_grad_vjp,
        cost=_weight_grad_cost,
        axes=_weight_grad_axes,
        lower=_lower_gradient("conv_weight_grad", "weight_shape"),
        aten={},
        samples=tuple(sample(_output_shape(x, w, attrs), x, weight_shape=w, **attrs) for x, w, attrs in _CASES),
    )
)
