"""``grid_sample``: x read at places given by a grid, between its elements; and its backward.

Shapes: x ``[n, c, *spatial]`` with two or three spatial axes; grid ``[n, *out, axes]``, the last axis of x first, with
-1 and 1 at x's edges; y ``[n, c, *out]``. ``x_ct, grid_ct = grid_sample_backward(ct, x, grid)``.

Meaning and higher derivatives are those of the decomposition: along each axis a place has a few taps (elements of x
that it reads), each with a weight, and y sums over the products of taps. A place is a differentiable function of
the grid; which elements are read is not. torch has no second derivative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import add, broadcast, cast, full, mul, neg, reshape, scale, sub, sum_dims, transpose
from daggc.ops.iota import iota
from daggc.ops.moments import wide_dtype
from daggc.ops.opdef import (
    BY_DECOMPOSITION,
    Axes,
    Cost,
    Importer,
    OpDef,
    node_bytes,
    out_numel,
    register,
    require,
    sample,
    torch_dtype,
)
from daggc.ops.slicing import select

MODES = ("bilinear", "nearest", "bicubic")  # in the order of torch's numbers for them
PADDINGS = ("zeros", "border", "reflection")
_TAPS = {"bilinear": 2, "nearest": 1, "bicubic": 4}
_A = -0.75  # of Keys' cubic convolution kernel

# --- type rules ---------------------------------------------------------------------------------------


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, grid = inputs
    spatial = x.shape[2:]
    require(x.is_float and x.rank in (4, 5), f"floats [n, c, *spatial] with 2 or 3 spatial axes are required, got {x}")
    fits = grid.dtype == x.dtype and grid.rank == x.rank and grid.shape[0] == x.shape[0]
    require(fits and grid.shape[-1] == len(spatial), f"a grid [n, *out, {len(spatial)}] of x's dtype is required")
    require(min(spatial) > 0, f"x has no elements to sample from: {x}")
    require(attrs["mode"] in MODES and attrs["padding"] in PADDINGS, f"modes {MODES}, paddings {PADDINGS}")
    require(x.rank == 4 or attrs["mode"] != "bicubic", "bicubic sampling is for two axes")
    require(isinstance(attrs["align_corners"], bool), "align_corners is a bool")
    return (x.with_(shape=(*x.shape[:2], *grid.shape[1:-1])),)


def _infer_backward(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    ct, x, grid = inputs
    require(_infer((x, grid), attrs) == (ct,), "a cotangent of the output's type is required")
    return x, grid


# --- places: where along an axis a grid points to -----------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """A coordinate in elements of x, ``[n, points]``, and its derivative by the grid, constant piece by piece."""

    at: Value
    slope: Value

    def where(self, b: Builder, mask: Value, at: float) -> _Place:
        """This place where the mask holds; elsewhere a constant."""
        kept = b.emit("where_scalar", mask, self.at, value=at)
        return _Place(kept, b.emit("where_scalar", mask, self.slope, value=0.0))


def _place(b: Builder, component: Value, size: int, align_corners: bool, axes: int) -> _Place:
    """From -1..1 to elements, in the order of operations of torch's kernels (GridSamplerKernel.cpp, GridSampler.h)."""
    shifted = b.emit("add_scalar", component, value=1.0)
    reach = (size - 1) / 2 if align_corners else size / 2
    if axes == 2:
        at = scale(b, shifted, reach)
        at = at if align_corners else b.emit("add_scalar", at, value=-0.5)
    elif align_corners:
        at = scale(b, scale(b, shifted, 0.5), float(size - 1))
    else:
        at = scale(b, b.emit("add_scalar", scale(b, shifted, float(size)), value=-1.0), 0.5)
    return _Place(at, full(b, reach, at.type.shape, at.type.dtype))


def _clip(b: Builder, place: _Place, size: int) -> _Place:
    """To x's extent; the edges themselves count as outside, and have no slope."""
    place = place.where(b, b.emit("gt_scalar", place.at, value=0.0), 0.0)
    return place.where(b, b.emit("lt_scalar", place.at, value=float(size - 1)), float(size - 1))


def _reflect(b: Builder, place: _Place, size: int, align_corners: bool) -> _Place:
    """Back and forth between the edges: the centers of the outer elements, or their outer sides."""
    low, span = (0.0, float(size - 1)) if align_corners else (-0.5, float(size))
    if not span:
        zeros = full(b, 0.0, place.at.type.shape, place.at.type.dtype)
        return _Place(zeros, zeros)
    offset = b.emit("add_scalar", place.at, value=-low)
    left = b.emit("lt_scalar", offset, value=0.0)
    distance = b.emit("where", left, neg(b, offset), offset)
    slope = b.emit("where", left, neg(b, place.slope), place.slope)
    flips = b.emit("floor", b.emit("div_scalar", distance, value=span))
    rest = sub(b, distance, scale(b, flips, span))
    pairs = scale(b, b.emit("floor", scale(b, flips, 0.5)), 2.0)
    even = b.emit("eq", flips, pairs)
    back = b.emit("add_scalar", neg(b, rest), value=span)
    at = b.emit("add_scalar", b.emit("where", even, rest, back), value=low)
    return _Place(at, b.emit("where", even, slope, neg(b, slope)))


def _padded(b: Builder, place: _Place, size: int, attrs: Attrs) -> _Place:
    if attrs["padding"] == "zeros":
        return place
    if attrs["padding"] == "reflection":
        place = _reflect(b, place, size, attrs["align_corners"])
    return _clip(b, place, size)


# --- taps: what a place reads along an axis -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tap:
    """An element along one axis, for each point: ``[n, points]``.

    Attributes:
        index: i64; zero where it is not inside.
        inside: whether x has such an element.
        weight: by what it counts; None for one.
        slope: the weight's derivative by the grid; None for none.
    """

    index: Value
    inside: Value
    weight: Value | None
    slope: Value | None


def _tap(b: Builder, at: Value, size: int, weight: Value | None, slope: Value | None) -> _Tap:
    first, last = b.emit("ge_scalar", at, value=0.0), b.emit("le_scalar", at, value=float(size - 1))
    inside = b.emit("logical_and", first, last)
    index = cast(b, b.emit("where_scalar", inside, at, value=0.0), "i64")
    return _Tap(index, inside, weight, slope)


def _polynomial(b: Builder, x: Value, *coefficients: float) -> Value:
    """By Horner's rule, highest power first."""
    total = scale(b, x, coefficients[0])
    for coefficient in coefficients[1:-1]:
        total = mul(b, b.emit("add_scalar", total, value=coefficient), x)
    return b.emit("add_scalar", total, value=coefficients[-1])


def _cubic_taps(b: Builder, place: _Place, size: int, attrs: Attrs) -> list[_Tap]:
    """Four elements; it is their places that padding moves."""
    low = b.emit("floor", place.at)
    t = sub(b, place.at, low)
    rest = b.emit("add_scalar", neg(b, t), value=1.0)
    before, after = b.emit("add_scalar", t, value=1.0), b.emit("add_scalar", rest, value=1.0)
    near, far = (_A + 2, -(_A + 3), 0.0, 1.0), (_A, -5 * _A, 8 * _A, -4 * _A)
    taps = []
    for offset, distance, cubic, sign in (
        (-1, before, far, 1),
        (0, t, near, 1),
        (1, rest, near, -1),
        (2, after, far, -1),
    ):
        derivative = _polynomial(b, distance, 3 * cubic[0], 2 * cubic[1], cubic[2])
        slope = mul(b, scale(b, derivative, float(sign)), place.slope)
        tap = b.emit("add_scalar", low, value=float(offset))
        at = _padded(b, _Place(tap, place.slope), size, attrs).at
        taps.append(_tap(b, at, size, _polynomial(b, distance, *cubic), slope))
    return taps


def _taps(b: Builder, component: Value, size: int, attrs: Attrs, axes: int) -> list[_Tap]:
    place = _place(b, component, size, attrs["align_corners"], axes)
    if attrs["mode"] == "bicubic":
        return _cubic_taps(b, place, size, attrs)
    place = _padded(b, place, size, attrs)
    if attrs["mode"] == "nearest":
        return [_tap(b, b.emit("round", place.at), size, None, None)]
    low = b.emit("floor", place.at)
    t = sub(b, place.at, low)
    rest = b.emit("add_scalar", neg(b, t), value=1.0)
    high = b.emit("add_scalar", low, value=1.0)
    return [_tap(b, low, size, rest, neg(b, place.slope)), _tap(b, high, size, t, place.slope)]


# --- decomposition ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Read:
    """One element of x for each point and channel: ``[n, c, points]``; and the taps it is the product of."""

    index: Value
    inside: Value
    taps: tuple[_Tap, ...]

    def weight(self, b: Builder, but: int | None = None) -> Value | None:
        """The product ``[n, points]`` of the taps' weights, but for one axis; None for one."""
        total = None
        for axis, tap in enumerate(self.taps):
            if axis != but and tap.weight is not None:
                total = tap.weight if total is None else mul(b, total, tap.weight)
        return total

    def masked(self, b: Builder, values: Value) -> Value:
        return b.emit("where_scalar", self.inside, values, value=0.0)


def _reads(b: Builder, x: Value, grid: Value, attrs: Attrs) -> Iterator[_Read]:
    """x is ``[n, c, *spatial]``."""
    n, channels, *spatial = x.type.shape
    axes, points = len(spatial), math.prod(grid.type.shape[1:-1])
    components = [reshape(b, select(b, grid, -1, axes - 1 - axis), (n, points)) for axis in range(axes)]
    taps = [_taps(b, component, size, attrs, axes) for component, size in zip(components, spatial, strict=True)]
    for chosen in product(*taps):
        index, inside = chosen[0].index, chosen[0].inside
        for tap, size in zip(chosen[1:], spatial[1:], strict=True):
            index = add(b, b.emit("mul_scalar", index, value=size), tap.index)
            inside = b.emit("logical_and", inside, tap.inside)
        shape = (n, channels, points)
        yield _Read(_over_channels(b, index, shape), _over_channels(b, inside, shape), chosen)


def _over_channels(b: Builder, value: Value, shape: Sequence[int]) -> Value:
    return broadcast(b, reshape(b, value, (shape[0], 1, shape[2])), shape)


def _weighted(b: Builder, values: Value, weight: Value | None) -> Value:
    return values if weight is None else mul(b, values, _over_channels(b, weight, values.type.shape))


def _flat(b: Builder, x: Value) -> Value:
    """``[n, c, elements]``, at least f32."""
    x = cast(b, x, wide_dtype(x.type.dtype))
    return reshape(b, x, (*x.type.shape[:2], math.prod(x.type.shape[2:])))


def _decompose(b: Builder, node: Node, *inputs: Value) -> tuple[Value, ...]:
    x, grid = inputs
    flat, grid = _flat(b, x), cast(b, grid, wide_dtype(grid.type.dtype))
    total = None
    for read in _reads(b, x, grid, node.attrs):
        values = read.masked(b, b.emit("gather", flat, read.index, dim=2))
        part = _weighted(b, values, read.weight(b))
        total = part if total is None else add(b, total, part)
    assert total is not None
    return (cast(b, reshape(b, total, node.outputs[0].type.shape), x.type.dtype),)


def _decompose_backward(b: Builder, node: Node, *inputs: Value) -> tuple[Value, ...]:
    ct, x, grid = inputs
    wide_ct, flat, wide = _flat(b, ct), _flat(b, x), cast(b, grid, wide_dtype(grid.type.dtype))
    x_ct = full(b, 0.0, flat.type.shape, flat.type.dtype)
    axes = x.type.rank - 2
    slopes: list[Value | None] = [None] * axes
    for read in _reads(b, x, wide, node.attrs):
        share = read.masked(b, _weighted(b, wide_ct, read.weight(b)))
        x_ct = b.emit("scatter_add", x_ct, read.index, share, dim=2)
        values = read.masked(b, b.emit("gather", flat, read.index, dim=2))
        product = sum_dims(b, mul(b, wide_ct, values), (1,))
        for axis, tap in enumerate(read.taps):
            if tap.slope is None:
                continue
            rest = read.weight(b, but=axis)
            part = mul(b, product, tap.slope if rest is None else mul(b, tap.slope, rest))
            known = slopes[axis]
            slopes[axis] = part if known is None else add(b, known, part)
    zeros = full(b, 0.0, (grid.type.shape[0], math.prod(grid.type.shape[1:-1])), flat.type.dtype)
    parts = [reshape(b, slope or zeros, (*grid.type.shape[:-1], 1)) for slope in reversed(slopes)]
    grid_ct = b.emit("concat", *parts, dim=grid.type.rank - 1)
    return cast(b, reshape(b, x_ct, x.type.shape), x.type.dtype), cast(b, grid_ct, grid.type.dtype)


# --- derivative, cost, axes, lowering -----------------------------------------------------------------


def _vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    assert cts[0] is not None
    return b.emit_many("grid_sample_backward", cts[0], *node.inputs, **node.attrs)


def _cost(node: Node) -> Cost:
    taps = _TAPS[node.attrs["mode"]] ** (node.inputs[0].type.rank - 2)
    return Cost(4.0 * taps * out_numel(node), node_bytes(node), "reduction")


def _axes(node: Node) -> Axes:
    """Samples, channels and points are independent; a point may read any element of its sample."""
    inner = (None,) * (node.inputs[0].type.rank - 2)
    points = tuple(f"p{axis}" for axis in range(len(inner)))
    return Axes((("n", "c", *inner), ("n", *points, None)), (("n", "c", *points),))


def _axes_backward(node: Node) -> Axes:
    labels = ("n", *(None,) * (node.inputs[0].type.rank - 1))
    return Axes((labels,) * 3, (labels,) * 2)


def _arguments(node: Node) -> str:
    a = node.attrs
    return f"{MODES.index(a['mode'])}, {PADDINGS.index(a['padding'])}, {a['align_corners']}"


def _kernel(node: Node) -> str:
    return f"torch.ops.aten.grid_sampler_{node.inputs[-1].type.rank - 2}d"


def _lower(node: Node, args: Sequence[str]) -> str:
    """In f32 where x has 16 bits: torch's CPU kernels would round the coordinates to those."""
    if wide_dtype(node.output.type.dtype) == node.output.type.dtype:
        return f"{_kernel(node)}({', '.join(args)}, {_arguments(node)})"
    wide = ", ".join(f"{arg}.float()" for arg in args)
    return f"{_kernel(node)}({wide}, {_arguments(node)}).to({torch_dtype(node.output.type.dtype)})"


def _lower_backward(node: Node, args: Sequence[str]) -> str:
    dtype = node.inputs[0].type.dtype
    if wide_dtype(dtype) == dtype:
        return f"{_kernel(node)}_backward({', '.join(args)}, {_arguments(node)}, [True, True])"
    wide = ", ".join(f"{arg}.float()" for arg in args)
    call = f"{_kernel(node)}_backward({wide}, {_arguments(node)}, [True, True])"
    return f"tuple(grad.to({torch_dtype(dtype)}) for grad in {call})"


def _importer(b: Builder, x: Value, grid: Value, mode: int, padding: int, align_corners: bool) -> Value:
    return b.emit("grid_sample", x, grid, **_attrs(MODES[mode], PADDINGS[padding], align_corners))


def _import_affine_grid(b: Builder, theta: Value, size: Sequence[int], align_corners: bool) -> Value:
    """``affine_grid``: the places ``theta [x, y, (z,) 1]`` of a regular grid, from -1 to 1 along each axis."""
    n, _, *spatial = size
    axes, dtype = len(spatial), theta.type.dtype
    columns = []
    for axis, count in reversed(list(enumerate(spatial))):
        steps = iota(b, count, wide_dtype(dtype), 1.0 - count, 2.0)
        steps = b.emit("div_scalar", steps, value=float(max(1, count - 1) if align_corners else count))
        shape = [count if other == axis else 1 for other in range(axes)]
        columns.append(broadcast(b, reshape(b, cast(b, steps, dtype), (*shape, 1)), (*spatial, 1)))
    columns.append(full(b, 1.0, (*spatial, 1), dtype))
    points = reshape(b, b.emit("concat", *columns, dim=axes), (1, math.prod(spatial), axes + 1))
    moved = b.emit("matmul", broadcast(b, points, (n, *points.type.shape[1:])), transpose(b, theta))
    return reshape(b, moved, (n, *spatial, axes))


def _attrs(mode: str, padding: str, align_corners: bool) -> dict[str, Attr]:
    return {"mode": mode, "padding": padding, "align_corners": align_corners}


_NAMES = ("grid_sampler.default", "grid_sampler_2d.default", "grid_sampler_3d.default")
_IMPORTERS: dict[str, Importer] = {
    **dict.fromkeys(_NAMES, _importer),
    "affine_grid_generator.default": _import_affine_grid,
}
_CASES = (
    ((2, 3, 4, 5), (2, 3, 2, 2), _attrs("bilinear", "zeros", False)),
    ((1, 2, 3, 4), (1, 3, 4, 2), _attrs("bilinear", "reflection", True)),
    ((2, 1, 4, 3), (2, 5, 2, 2), _attrs("bicubic", "reflection", False)),
    ((1, 2, 4, 4), (1, 2, 3, 2), _attrs("bicubic", "zeros", True)),
    ((1, 2, 4, 5), (1, 3, 3, 2), _attrs("nearest", "border", False)),
    ((1, 2, 3, 2, 4), (1, 2, 3, 2, 3), _attrs("bilinear", "border", False)),
)

register(
    OpDef(
        name="grid_sample",
        infer=_infer,
        evaluate=BY_DECOMPOSITION,
        vjp=_vjp,
        cost=_cost,
        axes=_axes,
        lower=_lower,
        aten=_IMPORTERS,
        samples=tuple(sample(x, grid, **attrs) for x, grid, attrs in _CASES),
        decompose=_decompose,
    )
)
register(
    OpDef(
        name="grid_sample_backward",
        infer=_infer_backward,
        evaluate=BY_DECOMPOSITION,
        vjp=BY_DECOMPOSITION,
        cost=_cost,
        axes=_axes_backward,
        lower=_lower_backward,
        aten={},
        samples=tuple(
            sample((*x[:2], *grid[1:-1]), x, grid, **attrs) for x, grid, attrs in (_CASES[i] for i in (0, 1, 2, 4, 5))
        ),
        decompose=_decompose_backward,
    )
)
