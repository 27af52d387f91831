"""Interpolation between grids: linear (1 to 3 spatial axes), cubic and, against aliasing, wider filters (2 axes).

Each output row is a weighted sum of input rows, one axis at a time: a matrix an axis, ``[output size, input size]``.
Linear in x, so that the op and its ``_backward`` are each other's derivative. Shapes ``[n, c, *spatial]``.
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
from daggc.ops.opdef import (
    VJP,
    Cost,
    Importer,
    OpDef,
    leading_axes,
    node_bytes,
    out_numel,
    register,
    require,
    sample,
    upcast,
)

# torch's kernels, by (filter, antialias, spatial axes).
_KERNELS = {
    ("linear", False, 1): "upsample_linear1d",
    ("linear", False, 2): "upsample_bilinear2d",
    ("linear", False, 3): "upsample_trilinear3d",
    ("cubic", False, 2): "upsample_bicubic2d",
    ("linear", True, 2): "_upsample_bilinear2d_aa",
    ("cubic", True, 2): "_upsample_bicubic2d_aa",
    ("lanczos", True, 2): "_upsample_lanczos2d_aa",
}
_TAPS = {"linear": 2, "cubic": 4, "lanczos": 6}  # input rows an output row is made of, where nothing shrinks

# --- type rules ---------------------------------------------------------------------------------------


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    size, scales, antialias = attrs["output_size"], attrs["scales"], attrs["antialias"]
    require(x.is_float and 3 <= x.rank <= 5, f"floats [n, c, *spatial] with 1 to 3 spatial axes are required, got {x}")
    require(all(x.shape[1:]), f"only the batch axis can be of size 0, got {x}")
    require((attrs["filter"], antialias, x.rank - 2) in _KERNELS, f"torch has no such filter for {x}")
    require(isinstance(antialias, bool) and isinstance(attrs["align_corners"], bool), "two bools are required")
    require(len(size) == x.rank - 2 and min(size) > 0, f"a spatial shape is required, got {size}")
    fits = scales is None or (len(scales) == len(size) and min(scales) > 0)
    require(fits, f"a positive factor for each spatial axis is required, got {scales}")
    # torch's kernel gives every row of such an output the weights of the first
    require(not antialias or size[-1] > 1, "an antialiased output has two columns or more")
    return (x.with_(shape=(*x.shape[:2], *size)),)


def _infer_backward(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (ct,) = inputs
    x = ct.with_(shape=attrs["input_shape"])
    require(_infer((x,), attrs) == (ct,), "a cotangent of the output's shape is required")
    return (x,)


# --- meaning ------------------------------------------------------------------------------------------


def _cubic_taps(t: np.ndarray) -> tuple[np.ndarray, ...]:
    """Weights of the four rows around a place, ``t`` after the second of them (Keys, a = -0.75)."""
    return tuple(keys(distance, -0.75) for distance in (t + 1, t, 1 - t, 2 - t))


def keys(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (1981) of distances that are not negative; zero from 2 on."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance < 1, near, np.where(distance < 2, far, 0)).astype(distance.dtype)


_FILTERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of distances, for antialiasing
    "linear": lambda distance: np.maximum(0, 1 - distance),
    "cubic": lambda distance: keys(distance, -0.5),
    "lanczos": lambda distance: np.where(distance < 3, np.sinc(distance) * np.sinc(distance / 3), 0),
}


def _step(size: int, count: int, factor: float | None, align_corners: bool, real: Any) -> Any:
    """Input rows an output row; in the dtype torch computes it in (UpSample.h, ``area_pixel_compute_scale``)."""
    if align_corners:
        return real(size - 1) / real(count - 1) if count > 1 else real(0)
    return real(1 / factor) if factor else real(size) / real(count)


def _smooth_weights(size: int, count: int, step: Any, name: str, real: Any) -> np.ndarray:
    """Rows of a filter centred on each output row, wider where the image shrinks, and normalised."""
    stretch = max(step, real(1))
    centers = step * (np.arange(count, dtype=real) + real(0.5))
    reach = real(_TAPS[name] / 2) * stretch
    first = np.maximum((centers - reach + real(0.5)).astype(np.int64), 0)
    last = np.minimum((centers + reach + real(0.5)).astype(np.int64), size)
    rows = np.arange(size)
    distances = np.abs((rows - centers[:, None] + real(0.5)) * (1 / stretch))
    inside = (rows >= first[:, None]) & (rows < last[:, None])
    weights = np.where(inside, _FILTERS[name](distances.astype(real)), real(0))
    return weights / weights.sum(1, keepdims=True)


def _weights(size: int, count: int, step: Any, attrs: Attrs, real: Any) -> np.ndarray:
    """The matrix ``[count, size]`` of one axis (UpSample.h, ``area_pixel_compute_source_index``)."""
    name = attrs["filter"]
    if attrs["antialias"]:
        return _smooth_weights(size, count, step, name, real)
    if name == "linear" and size == count:
        return np.eye(size, dtype=real)
    rows = np.arange(count, dtype=real)
    places = step * rows if attrs["align_corners"] else step * (rows + real(0.5)) - real(0.5)
    if name == "linear":
        places = np.maximum(places, real(0))
    below = np.floor(places).astype(np.int64)
    t = places - below.astype(real)
    shares = enumerate((1 - t, t)) if name == "linear" else enumerate(_cubic_taps(t), -1)
    matrix = np.zeros((count, size), real)
    for offset, share in shares:
        np.add.at(matrix, (np.arange(count), np.clip(below + offset, 0, size - 1)), share)
    return matrix


def _combine(matrix: np.ndarray, array: np.ndarray, dim: int) -> np.ndarray:
    """Each row of the matrix over one axis; what has no weight is not read, lest a NaN be everywhere."""
    reads = map(np.flatnonzero, matrix)
    sums = [np.tensordot(row[at], array.take(at, dim), (0, dim)) for row, at in zip(matrix, reads, strict=True)]
    return np.stack(sums, dim)


def _apply(
    node: Node, array: np.ndarray, spatial: Sequence[int], same: Callable[[int, int], bool], back: bool
) -> np.ndarray:
    """Combine along each spatial axis with its matrix, or its transpose. ``same``: whether an axis is left alone."""
    a, real = node.attrs, array.dtype.type
    factors = a["scales"] or (None,) * len(spatial)
    for dim, (size, count, factor) in enumerate(zip(spatial, a["output_size"], factors, strict=True), 2):
        if same(size, count):
            continue
        matrix = _weights(size, count, _step(size, count, factor, a["align_corners"], real), a, real)
        array = _combine(matrix.T if back else matrix, array, dim)
    return array


def _evaluate(node: Node, x: np.ndarray) -> np.ndarray:
    smooth = node.attrs["antialias"]
    return _apply(node, x, x.shape[2:], lambda size, count: smooth and size == count, back=False)


def _evaluate_backward(node: Node, ct: np.ndarray) -> np.ndarray:
    """Which axes torch's kernels copy depends on the direction; it matters where sizes agree and factors are not 1."""
    spatial, a = node.attrs["input_shape"][2:], node.attrs
    copied = a["filter"] == "cubic" and not a["antialias"] and tuple(spatial) == tuple(a["output_size"])
    return _apply(node, ct, spatial, lambda size, count: copied, back=True)


# --- derivative, cost, lowering -----------------------------------------------------------------------


def _vjp(transposed: str) -> VJP:
    """Linear: the derivative of either op is the other."""

    def vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
        assert cts[0] is not None
        attrs = {name: value for name, value in node.attrs.items() if name != "input_shape"}
        if transposed.endswith("backward"):
            attrs["input_shape"] = node.inputs[0].type.shape
        return (b.emit(transposed, cts[0], **attrs),)

    return vjp


def _cost(node: Node) -> Cost:
    taps = _TAPS[node.attrs["filter"]] ** (node.output.type.rank - 2)
    return Cost(2.0 * taps * out_numel(node), node_bytes(node), "reduction")


def _kernel(node: Node) -> str:
    a = node.attrs
    return f"torch.ops.aten.{_KERNELS[a['filter'], a['antialias'], len(a['output_size'])]}"


def _scales(node: Node) -> str:
    return ", ".join(map(repr, node.attrs["scales"] or (None,) * len(node.attrs["output_size"])))


def _lower(node: Node, args: Sequence[str]) -> str:
    a = node.attrs
    return f"{_kernel(node)}({args[0]}, {a['output_size']}, {a['align_corners']}, {_scales(node)})"


def _lower_backward(node: Node, args: Sequence[str]) -> str:
    a = node.attrs
    geometry = f"{a['output_size']}, {a['input_shape']}, {a['align_corners']}, {_scales(node)}"
    return f"{_kernel(node)}_backward({args[0]}, {geometry})"


# --- importers ----------------------------------------------------------------------------------------


def output_size_of(
    x: Value, output_size: Sequence[int] | None, scale_factors: Sequence[float] | None
) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
    """The spatial shape and the factors of an overload ``vec``. Raises TypeRuleError if neither is given."""
    scales = None if scale_factors is None else tuple(map(float, scale_factors))
    if output_size is not None:
        return tuple(output_size), scales
    if scales is None:
        raise TypeRuleError("upsampling needs an output size or scale factors")
    return tuple(math.floor(size * factor) for size, factor in zip(x.type.shape[2:], scales, strict=True)), scales


def scales_of(factors: Sequence[float | None], named: dict[str, Any]) -> tuple[float, ...] | None:
    """The factors of an overload ``default``, one argument an axis. Raises NotImplementedError if some are absent."""
    given = [*factors, *(named[name] for name in ("scales", "scales_d", "scales_h", "scales_w") if name in named)]
    present = tuple(float(factor) for factor in given if factor is not None)
    if present and len(present) < len(given):
        raise NotImplementedError("factors for some of the axes")
    return present or None


def _import_vec(name: str, antialias: bool) -> Importer:
    def importer(
        b: Builder,
        x: Value,
        output_size: Sequence[int] | None,
        align_corners: bool,
        scale_factors: Sequence[float] | None = None,
    ) -> Value:
        size, scales = output_size_of(x, output_size, scale_factors)
        attrs = _attrs(name, size, scales, align_corners=align_corners, antialias=antialias)
        return b.emit("interpolate", x, **attrs)

    return importer


def _import_default(name: str, antialias: bool) -> Importer:
    def importer(
        b: Builder, x: Value, output_size: Sequence[int], align_corners: bool, *factors: float | None, **named: Any
    ) -> Value:
        scales = scales_of(factors, named)
        attrs = _attrs(name, output_size, scales, align_corners=align_corners, antialias=antialias)
        return b.emit("interpolate", x, **attrs)

    return importer


def _attrs(
    name: str,
    output_size: Sequence[int],
    scales: Sequence[float] | None = None,
    align_corners: bool = False,
    antialias: bool = False,
) -> dict[str, Attr]:
    return {
        "filter": name,
        "output_size": tuple(output_size),
        "scales": None if scales is None else tuple(scales),
        "align_corners": align_corners,
        "antialias": antialias,
    }


# --- the ops ------------------------------------------------------------------------------------------

_CASES = (
    ((2, 3, 5), _attrs("linear", (8,), (1.7,))),
    ((2, 2, 4, 3), _attrs("linear", (7, 2), align_corners=True)),
    ((1, 2, 2, 3, 4), _attrs("linear", (3, 3, 2))),
    ((2, 2, 4, 5), _attrs("cubic", (7, 3))),
    ((2, 2, 4, 5), _attrs("cubic", (6, 10), (1.6, 2.0))),
    ((2, 2, 7, 5), _attrs("linear", (3, 6), antialias=True)),
    ((1, 2, 9, 4), _attrs("cubic", (4, 2), antialias=True, align_corners=True)),
    ((1, 1, 4, 9), _attrs("lanczos", (6, 3), antialias=True)),
)

register(
    OpDef(
        name="interpolate",
        infer=_infer,
        evaluate=upcast(_evaluate),
        vjp=_vjp("interpolate_backward"),
        cost=_cost,
        axes=lambda node: leading_axes(node.output.type.rank - 2)(node),
        lower=_lower,
        aten={
            f"{kernel}.{overload}": make(name, antialias)
            for (name, antialias, _), kernel in _KERNELS.items()
            for overload, make in (("vec", _import_vec), ("default", _import_default))
        },
        samples=tuple(sample(shape, **attrs) for shape, attrs in _CASES),
    )
)
register(
    OpDef(
        name="interpolate_backward",
        infer=_infer_backward,
        evaluate=upcast(_evaluate_backward),
        vjp=_vjp("interpolate"),
        cost=_cost,
        axes=lambda node: leading_axes(node.output.type.rank - 2)(node),
        lower=_lower_backward,
        aten={},
        samples=tuple(
            sample((*shape[:2], *attrs["output_size"]), input_shape=shape, **attrs) for shape, attrs in _CASES
        ),
    )
)
