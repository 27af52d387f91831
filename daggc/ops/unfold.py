"""``im2col`` and ``col2im`` (``F.unfold`` and ``F.fold``): windows of an image as columns, and their sum back.

Each is the other's transpose, and so its derivative. Shapes: image ``[n, c, height, width]``, columns
``[n, c * kernel height * kernel width, windows]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import reshape
from daggc.ops.opdef import (
    VJP,
    Axes,
    Importer,
    Infer,
    OpDef,
    Sample,
    copy_cost,
    register,
    require,
    sample,
    t,
    upcast,
)
from daggc.ops.pooling import numbers
from daggc.ops.rearrange import import_channel_shuffle, import_pixel_shuffle, import_pixel_unshuffle
from daggc.ops.windows import add_windows, output_size, windows


def _counts(spatial: Sequence[int], attrs: Attrs) -> tuple[int, ...]:
    """Windows along each axis. Raises TypeRuleError if there are none."""
    geometry = [attrs[name] for name in ("kernel", "stride", "padding", "dilation")]
    require(all(len(numbers) == 2 for numbers in (spatial, *geometry)), "two numbers for each of two axes are required")
    kernel, stride, padding, dilation = geometry
    require(min(*kernel, *stride, *dilation) >= 1 and min(padding) >= 0, "kernel, stride and dilation are positive")
    counts = tuple(map(output_size, spatial, kernel, stride, padding, dilation))
    require(min(counts) > 0, f"no window fits, there would be {counts}")
    return counts


def _columns_type(x: TensorType, attrs: Attrs) -> TensorType:
    require(x.is_float and x.rank == 4, f"floats [n, c, height, width] are required, got {x}")
    require(all(x.shape[1:]), f"only the batch axis can be of size 0, got {x}")
    rows, columns = _counts(x.shape[2:], attrs)
    cells = attrs["kernel"][0] * attrs["kernel"][1]
    return x.with_(shape=(x.shape[0], x.shape[1] * cells, rows * columns))


def _infer_im2col(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    return (_columns_type(x, attrs),)


def _infer_col2im(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (columns,) = inputs
    x = columns.with_(shape=attrs["input_shape"])
    wanted = _columns_type(x, attrs)
    require(columns == wanted, f"columns {wanted} are required, got {columns}")
    return (x,)


def _evaluate_im2col(node: Node, x: np.ndarray) -> np.ndarray:
    a, counts = node.attrs, _counts(x.shape[2:], node.attrs)
    view = windows(x, counts, a["kernel"], a["stride"], a["padding"], a["dilation"])
    return view.transpose(0, 1, 4, 5, 2, 3).reshape(node.output.type.shape)


def _evaluate_col2im(node: Node, columns: np.ndarray) -> np.ndarray:
    a, shape = node.attrs, node.output.type.shape
    view = columns.reshape(*shape[:2], *a["kernel"], *_counts(shape[2:], a)).transpose(0, 1, 4, 5, 2, 3)
    return add_windows(view, shape, a["kernel"], a["stride"], a["padding"], a["dilation"])


def _im2col_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    assert cts[0] is not None
    return (b.emit("col2im", cts[0], input_shape=node.inputs[0].type.shape, **node.attrs),)


def _col2im_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    assert cts[0] is not None
    attrs = {name: value for name, value in node.attrs.items() if name != "input_shape"}
    return (b.emit("im2col", cts[0], **attrs),)


def _geometry(node: Node) -> str:
    return ", ".join(str(node.attrs[name]) for name in ("kernel", "dilation", "padding", "stride"))


def _lower_im2col(node: Node, args: Sequence[str]) -> str:
    return f"torch.ops.aten.im2col({args[0]}, {_geometry(node)})"


def _lower_col2im(node: Node, args: Sequence[str]) -> str:
    return f"torch.ops.aten.col2im({args[0]}, {node.attrs['input_shape'][2:]}, {_geometry(node)})"


def _samplewise(node: Node) -> Axes:
    image, columns = ("n", None, None, None), ("n", None, None)
    return Axes((image,), (columns,)) if node.op == "im2col" else Axes((columns,), (image,))


def _attrs(
    kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> dict[str, Attr]:
    named = {"kernel": kernel, "dilation": dilation, "padding": padding, "stride": stride}
    return {name: numbers(value, 2) for name, value in named.items()}


def _import_im2col(b: Builder, x: Value, *geometry: Sequence[int], **named: Sequence[int]) -> Value:
    attrs = _attrs(*geometry, **_renamed(named))
    if x.type.rank == 3:
        columns = b.emit("im2col", reshape(b, x, (1, *x.type.shape)), **attrs)
        return reshape(b, columns, columns.type.shape[1:])
    return b.emit("im2col", x, **attrs)


def _import_col2im(
    b: Builder, columns: Value, output_size: Sequence[int], *geometry: Sequence[int], **named: Sequence[int]
) -> Value:
    attrs = _attrs(*geometry, **_renamed(named))
    kernel = numbers(attrs["kernel"], 2)  # pyright: ignore[reportArgumentType]
    shape = columns.type.shape if columns.type.rank == 3 else (1, *columns.type.shape)
    if len(shape) != 3:
        raise TypeRuleError(f"columns of two or three axes are required, got {columns.type}")
    image = (shape[0], shape[1] // (kernel[0] * kernel[1]), *numbers(output_size, 2))
    x = b.emit("col2im", reshape(b, columns, shape), input_shape=image, **attrs)
    return x if columns.type.rank == 3 else reshape(b, x, image[1:])


def _renamed(named: dict[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    return {name.removesuffix("_size"): value for name, value in named.items()}


_CASES: tuple[tuple[tuple[int, ...], dict[str, Attr]], ...] = (
    ((2, 3, 5, 6), _attrs((2, 3), (1, 1), (1, 0), (2, 1))),
    ((1, 2, 6, 7), _attrs((2, 2), (2, 3), (0, 1), (1, 2))),
)


def _columns_shape(shape: tuple[int, ...], attrs: dict[str, Attr]) -> tuple[int, ...]:
    return _columns_type(t(*shape), Attrs(attrs)).shape


def _register(
    name: str,
    infer: Infer,
    evaluate: Callable[..., np.ndarray],
    vjp: VJP,
    lower: Callable[[Node, Sequence[str]], str],
    aten: dict[str, Importer],
    samples: Sequence[Sample],
) -> None:
    register(
        OpDef(
            name=name,
            infer=infer,
            evaluate=upcast(evaluate),
            vjp=vjp,
            cost=copy_cost,
            axes=_samplewise,
            lower=lower,
            aten=aten,
            samples=samples,
        )
    )


_register(
    "im2col",
    _infer_im2col,
    _evaluate_im2col,
    _im2col_vjp,
    _lower_im2col,
    {
        "im2col.default": _import_im2col,
        "pixel_shuffle.default": import_pixel_shuffle,
        "pixel_unshuffle.default": import_pixel_unshuffle,
        "channel_shuffle.default": import_channel_shuffle,
        "native_channel_shuffle.default": import_channel_shuffle,
    },
    [sample(shape, **attrs) for shape, attrs in _CASES],
)
_register(
    "col2im",
    _infer_col2im,
    _evaluate_col2im,
    _col2im_vjp,
    _lower_col2im,
    {"col2im.default": _import_col2im},
    [sample(_columns_shape(shape, attrs), input_shape=shape, **attrs) for shape, attrs in _CASES],
)
