"""Importers of differences between neighbours, and of integrals by the trapezoidal rule.

They are written in terms of other ATen ops, whose importers promote and broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ops.build import Operand, Scalar, full, norm_dim, reshape
from daggc.ops.opdef import REGISTRY, Importer, require
from daggc.ops.slicing import slice_dim


def _aten(b: Builder, name: str, *args: Any, **kwargs: Any) -> Any:
    return REGISTRY.importers[name](b, *args, **kwargs)


def _add(b: Builder, x: Value, y: Value) -> Value:
    return _aten(b, "add.Tensor", x, y)


def _sub(b: Builder, x: Value, y: Value) -> Value:
    return _aten(b, "sub.Tensor", x, y)


def _mul(b: Builder, x: Value, y: Operand) -> Value:
    return _aten(b, "mul.Tensor" if isinstance(y, Value) else "mul.Scalar", x, y)


def _div(b: Builder, x: Value, y: Operand) -> Value:
    return _aten(b, "div.Tensor" if isinstance(y, Value) else "div.Scalar", x, y)


def _part(b: Builder, x: Value, dim: int, start: int, end: int | None = None) -> Value:
    """``x[start:end]`` along an axis, negative bounds counted from the end."""
    size = x.type.shape[dim]
    first, last, _ = slice(start, end).indices(size)
    return slice_dim(b, x, dim, first, max(first, last))


def _neighbours(b: Builder, x: Value, dim: int) -> tuple[Value, Value]:
    return _part(b, x, dim, 0, -1), _part(b, x, dim, 1)


# --- diff ---------------------------------------------------------------------------------------------


def import_diff(
    b: Builder, x: Value, n: int = 1, dim: int = -1, prepend: Value | None = None, append: Value | None = None
) -> Value:
    """``n`` times the difference of neighbours; no more times than there are elements."""
    if n == 0:
        return x
    dim = norm_dim(dim, x.type.rank)
    parts = [part for part in (prepend, x, append) if part is not None]
    x = _aten(b, "cat.default", parts, dim) if len(parts) > 1 else x
    for _ in range(min(n, x.type.shape[dim])):
        earlier, later = _neighbours(b, x, dim)
        x = b.emit("logical_xor", later, earlier) if x.type.dtype == "bool" else b.emit("sub", later, earlier)
    return x


# --- trapezoid ----------------------------------------------------------------------------------------


def _spacing(b: Builder, y: Value, x: Value, dim: int) -> Value:
    """The steps between the points ``x``, of the rank of ``y``: one list of points, or one for each row."""
    if x.type.rank == 1:
        require(x.type.numel == y.type.shape[dim], f"{y.type.shape[dim]} points are required, got {x.type}")
        x = reshape(b, x, [x.type.numel if axis == dim else 1 for axis in range(y.type.rank)])
    elif x.type.rank < y.type.rank:
        x = reshape(b, x, (1,) * (y.type.rank - x.type.rank) + x.type.shape)
    earlier, later = _neighbours(b, x, dim)
    return _sub(b, later, earlier)


def _nothing(b: Builder, y: Value, dim: int) -> Value:
    """The integral over no points."""
    shape = y.type.shape[:dim] + y.type.shape[dim + 1 :]
    return full(b, 0.0 if y.type.differentiable else 0, shape, y.type.dtype)


def import_trapezoid_x(b: Builder, y: Value, x: Value, *, dim: int = -1) -> Value:
    dim = norm_dim(dim, y.type.rank)
    if not y.type.shape[dim]:
        return _nothing(b, y, dim)
    left, right = _neighbours(b, y, dim)
    areas = _mul(b, _add(b, left, right), _spacing(b, y, x, dim))
    return _div(b, _aten(b, "sum.dim_IntList", areas, [dim]), 2.0)


def import_trapezoid_dx(b: Builder, y: Value, *, dx: Scalar = 1, dim: int = -1) -> Value:
    dim = norm_dim(dim, y.type.rank)
    if not y.type.shape[dim]:
        return _nothing(b, y, dim)
    ends = _add(b, _aten(b, "select.int", y, dim, 0), _aten(b, "select.int", y, dim, -1))
    inner = _sub(b, _aten(b, "sum.dim_IntList", y, [dim]), _mul(b, ends, 0.5))
    return _mul(b, inner, _real(dx))


def import_cumulative_trapezoid_x(b: Builder, y: Value, x: Value, *, dim: int = -1) -> Value:
    dim = norm_dim(dim, y.type.rank)
    left, right = _neighbours(b, y, dim)
    areas = _mul(b, _spacing(b, y, x, dim), _add(b, left, right))
    return _div(b, _aten(b, "cumsum.default", areas, dim), 2.0)


def import_cumulative_trapezoid_dx(b: Builder, y: Value, *, dx: Scalar = 1, dim: int = -1) -> Value:
    dim = norm_dim(dim, y.type.rank)
    left, right = _neighbours(b, y, dim)
    return _aten(b, "cumsum.default", _mul(b, _add(b, left, right), _real(dx) / 2), dim)


def _real(dx: Scalar) -> float:
    require(not isinstance(dx, complex), f"a real step is required, got {dx}")
    return float(dx.real)


# --- gradient -----------------------------------------------------------------------------------------


def import_gradient(form: str) -> Importer:
    """``torch.gradient`` of one overload: a derivative along each axis, of second order inside.

    Args:
        form: what ``spacing`` is: ``step`` (one number), ``steps`` (one for each axis) or ``points`` (a tensor of
            coordinates for each axis).
    """

    def importer(
        b: Builder,
        x: Value,
        *,
        spacing: Any = None,
        dim: int | Sequence[int] | None = None,
        edge_order: int = 1,
    ) -> tuple[Value, ...]:
        require(edge_order in (1, 2), f"edge_order must be 1 or 2, got {edge_order}")
        rank = x.type.rank
        dims = list(range(rank)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
        spacings = list(spacing) if form != "step" else [1.0 if spacing is None else spacing] * len(dims)
        require(len(spacings) == len(dims), f"a spacing for each of {len(dims)} axes is required, got {len(spacings)}")
        along: Any = _by_points if form == "points" else _by_step
        return tuple(
            along(b, x, norm_dim(axis, rank), step, edge_order) for axis, step in zip(dims, spacings, strict=True)
        )

    return importer


def _by_step(b: Builder, x: Value, dim: int, step: Scalar, edge_order: int) -> Value:
    inside = _div(b, _sub(b, _part(b, x, dim, 2), _part(b, x, dim, 0, -2)), step)
    if edge_order == 1:
        first = _sub(b, _part(b, x, dim, 1, 2), _part(b, x, dim, 0, 1))
        last = _sub(b, _part(b, x, dim, -1), _part(b, x, dim, -2, -1))
    else:
        weights = (-1.5, 2.0, -0.5)
        first = _weighted(b, x, dim, [(weight, place, place + 1) for place, weight in enumerate(weights)])
        last = _weighted(b, x, dim, [(0.5, -3, -2), (-2.0, -2, -1), (1.5, -1, None)])
    halved = _div(b, inside, 2.0)
    return _aten(b, "cat.default", [_div(b, first, step), halved, _div(b, last, step)], dim)


def _weighted(b: Builder, x: Value, dim: int, terms: Sequence[tuple[Operand, int, int | None]]) -> Value:
    """The weighted sum of three slices."""
    first, second, third = (_mul(b, _part(b, x, dim, start, end), weight) for weight, start, end in terms)
    return _add(b, _add(b, first, second), third)


def _by_points(b: Builder, x: Value, dim: int, points: Value, edge_order: int) -> Value:
    steps = _sub(b, _part(b, points, 0, 1), _part(b, points, 0, 0, -1))
    before, after = _neighbours(b, steps, 0)
    shape = [-1 if axis == dim else 1 for axis in range(x.type.rank)]

    def column(value: Value) -> Value:
        return _aten(b, "view.default", value, shape)

    both = _add(b, before, after)
    below = column(_div(b, _mul(b, after, -1), _mul(b, before, both)))
    here = column(_div(b, _sub(b, after, before), _mul(b, before, after)))
    above = column(_div(b, before, _mul(b, after, both)))
    inside = _weighted(b, x, dim, [(below, 0, -2), (here, 1, -1), (above, 2, None)])
    first, last = _part(b, steps, 0, 0, 1), _part(b, steps, 0, -1)
    if edge_order == 1:
        head = _div(b, _sub(b, _part(b, x, dim, 1, 2), _part(b, x, dim, 0, 1)), column(first))
        tail = _div(b, _sub(b, _part(b, x, dim, -1), _part(b, x, dim, -2, -1)), column(last))
    else:
        near, middle, far = (column(value) for value in _edge_weights(b, first, _part(b, steps, 0, 1, 2)))
        head = _weighted(b, x, dim, [(_mul(b, near, -1), 0, 1), (middle, 1, 2), (_mul(b, far, -1), 2, 3)])
        near, middle, far = (column(value) for value in _edge_weights(b, last, _part(b, steps, 0, -2, -1)))
        tail = _weighted(b, x, dim, [(far, -3, -2), (_mul(b, middle, -1), -2, -1), (near, -1, None)])
    return _aten(b, "cat.default", [head, inside, tail], dim)


def _edge_weights(b: Builder, outer: Value, inner: Value) -> tuple[Value, Value, Value]:
    """Of the point at the edge, its neighbour and the next one, from the two steps between them."""
    both = _add(b, outer, inner)
    near = _div(b, _add(b, _mul(b, outer, 2.0), inner), _mul(b, outer, both))
    return near, _div(b, both, _mul(b, outer, inner)), _div(b, outer, _mul(b, inner, both))


GRADIENTS = {
    "gradient.scalarint": import_gradient("step"),
    "gradient.scalararray": import_gradient("step"),
    "gradient.array": import_gradient("step"),
    "gradient.scalarrayint": import_gradient("steps"),
    "gradient.scalarrayarray": import_gradient("steps"),
    "gradient.tensorarrayint": import_gradient("points"),
    "gradient.tensorarray": import_gradient("points"),
}
