"""Nearest-neighbour upsampling over 1 to 3 spatial axes: each output position copies one input position."""

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
from daggc.ops.opdef import VJP, Importer, OpDef, copy_cost, leading_axes, register, require, sample, upcast

_NAMES = {False: "upsample_nearest", True: "_upsample_nearest_exact"}


def _spatial(x: TensorType, attrs: Attrs) -> tuple[int, ...]:
    require(x.is_float and 3 <= x.rank <= 5, f"floats [n, c, *spatial] with 1 to 3 spatial axes are required, got {x}")
    require(all(x.shape[1:]), f"only the batch axis can be of size 0, got {x}")
    size, scales = attrs["output_size"], attrs["scales"]
    require(len(size) == x.rank - 2 and min(size) > 0, f"a spatial shape for {x} is required, got {size}")
    require(scales is None or len(scales) == len(size), f"a factor for each spatial axis is required, got {scales}")
    require(isinstance(attrs["exact"], bool), "exact is a bool")
    return size


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    return (x.with_(shape=(*x.shape[:2], *_spatial(x, attrs))),)


def _infer_backward(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (ct,) = inputs
    x = ct.with_(shape=attrs["input_shape"])
    require(_infer((x,), attrs) == (ct,), "a cotangent of the output's shape is required")
    return (x,)


def _sources(size: int, count: int, factor: float | None, exact: bool) -> np.ndarray:
    """For each output position the input position it copies, in f32 as torch computes it (UpSample.h)."""
    if count == size:
        return np.arange(size)
    if count == 2 * size and not exact:
        return np.arange(count) // 2
    step = np.float32(1 / factor) if factor else np.float32(size) / np.float32(count)
    positions = (np.arange(count, dtype=np.float32) + np.float32(0.5 if exact else 0)) * step
    return np.minimum(np.floor(positions).astype(np.int64), size - 1)


def _grid(spatial: Sequence[int], attrs: Attrs) -> tuple[np.ndarray, ...]:
    counts = attrs["output_size"]
    factors = attrs["scales"] or (None,) * len(counts)
    each = [_sources(*item, attrs["exact"]) for item in zip(spatial, counts, factors, strict=True)]
    return np.ix_(*each)


def _evaluate(node: Node, x: np.ndarray) -> np.ndarray:
    return x[(slice(None), slice(None), *_grid(x.shape[2:], node.attrs))]


def _evaluate_backward(node: Node, ct: np.ndarray) -> np.ndarray:
    x = np.zeros(node.output.type.shape, ct.dtype)
    places: Any = (slice(None), slice(None), *_grid(x.shape[2:], node.attrs))
    np.add.at(x, places, ct)
    return x


def _vjp(transposed: str) -> VJP:
    """Linear: the derivative of either op is the other."""

    def vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
        assert cts[0] is not None
        attrs = {name: value for name, value in node.attrs.items() if name != "input_shape"}
        if transposed.endswith("backward"):
            attrs["input_shape"] = node.inputs[0].type.shape
        return (b.emit(transposed, cts[0], **attrs),)

    return vjp


def _scales(node: Node) -> str:
    size = node.attrs["output_size"]
    return ", ".join(map(repr, node.attrs["scales"] or (None,) * len(size)))


def _aten(node: Node) -> str:
    return f"torch.ops.aten.{_NAMES[node.attrs['exact']]}{len(node.attrs['output_size'])}d"


def _lower(node: Node, args: Sequence[str]) -> str:
    return f"{_aten(node)}({args[0]}, {node.attrs['output_size']}, {_scales(node)})"


def _lower_backward(node: Node, args: Sequence[str]) -> str:
    a = node.attrs
    return f"{_aten(node)}_backward({args[0]}, {a['output_size']}, {a['input_shape']}, {_scales(node)})"


def _import_vec(exact: bool) -> Importer:
    def importer(
        b: Builder, x: Value, output_size: Sequence[int] | None, scale_factors: Sequence[float] | None = None
    ) -> Value:
        if output_size is None:
            if scale_factors is None:
                raise TypeRuleError("upsampling needs an output size or scale factors")
            sizes = zip(x.type.shape[2:], scale_factors, strict=True)
            output_size = [math.floor(size * factor) for size, factor in sizes]
        scales = None if scale_factors is None else tuple(map(float, scale_factors))
        return b.emit("upsample_nearest", x, output_size=tuple(output_size), scales=scales, exact=exact)

    return importer


def _import_default(exact: bool) -> Importer:
    def importer(b: Builder, x: Value, output_size: Sequence[int], *factors: float | None, **named: Any) -> Value:
        given = [*factors, *(named[name] for name in ("scales", "scales_d", "scales_h", "scales_w") if name in named)]
        scales = None if not given or None in given else tuple(map(float, given))
        return b.emit("upsample_nearest", x, output_size=tuple(output_size), scales=scales, exact=exact)

    return importer


def _attrs(output_size: Sequence[int], scales: Sequence[float] | None = None, exact: bool = False) -> dict[str, Attr]:
    return {"output_size": tuple(output_size), "scales": scales, "exact": exact}


_CASES = (
    ((2, 3, 4, 5), _attrs((8, 10), (2.0, 2.0))),
    ((2, 3, 4, 5), _attrs((7, 3))),
    ((2, 3, 5), _attrs((8,), (1.7,))),
    ((2, 3, 5), _attrs((8,), exact=True)),
    ((1, 2, 2, 3, 2), _attrs((4, 3, 5))),
)

register(
    OpDef(
        name="upsample_nearest",
        infer=_infer,
        evaluate=_evaluate,
        vjp=_vjp("upsample_nearest_backward"),
        cost=copy_cost,
        axes=lambda node: leading_axes(node.output.type.rank - 2)(node),
        lower=_lower,
        aten={
            f"{name}{rank}d.{overload}": make(exact)
            for exact, name in _NAMES.items()
            for rank in (1, 2, 3)
            for overload, make in (("vec", _import_vec), ("default", _import_default))
        },
        samples=tuple(sample(shape, **attrs) for shape, attrs in _CASES),
    )
)
register(
    OpDef(
        name="upsample_nearest_backward",
        infer=_infer_backward,
        evaluate=upcast(_evaluate_backward),
        vjp=_vjp("upsample_nearest"),
        cost=copy_cost,
        axes=lambda node: leading_axes(node.output.type.rank - 2)(node),
        lower=_lower_backward,
        aten={},
        samples=tuple(
            sample((*shape[:2], *attrs["output_size"]), input_shape=shape, **attrs) for shape, attrs in _CASES
        ),
    )
)
