"""Reductions: sums, means, extrema, products, variances.

``dims`` are sorted, non-negative and, unless the input is a scalar, not empty; ``keepdim`` keeps them with
size 1. Sums of integers keep their dtype: importers cast to i64 first, as torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import (
    add,
    broadcast,
    broadcast_together,
    cast,
    full,
    kind,
    mul,
    norm_dims,
    promote_dtypes,
    reshape,
    scale,
    sub,
    sum_dims,
)
from daggc.ops.differences import import_trapezoid_dx, import_trapezoid_x
from daggc.ops.opdef import (
    AS_IT_IS,
    BY_DECOMPOSITION,
    NOT_DIFFERENTIABLE,
    REAL_ONLY,
    VJP,
    Arg,
    Axes,
    ComplexRule,
    Decompose,
    Derivative,
    Importer,
    OpDef,
    Sample,
    letters,
    reduction_cost,
    register,
    require,
    scalar,
    t,
    torch_dtype,
    upcast,
)
from daggc.ops.shape import Cotangents
from daggc.ops.slicing import pad_dim, slice_dim

Dims = Sequence[int] | int | None

# --- rules that reductions share ----------------------------------------------------------------------


def _reduced_type(x: TensorType, attrs: Attrs) -> TensorType:
    dims, keepdim = attrs["dims"], attrs["keepdim"]
    require(list(dims) == sorted(set(dims)), f"dims must be sorted and distinct, got {dims}")
    require(all(0 <= dim < x.rank for dim in dims), f"dims must be axes of {x}, got {dims}")
    require(bool(dims) or x.rank == 0, "dims must not be empty: torch would reduce over all axes")
    require(isinstance(keepdim, bool), f"keepdim must be a bool, got {keepdim!r}")
    return x.with_(
        shape=tuple(1 if axis in dims else size for axis, size in enumerate(x.shape) if keepdim or axis not in dims)
    )


def _infer(kinds: str, extremum: bool) -> Callable[[Sequence[TensorType], Attrs], tuple[TensorType, ...]]:
    def infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        (x,) = inputs
        require(kind(x.dtype) in kinds, f"an input of a dtype of kind {', '.join(kinds)} is required, got {x}")
        result = _reduced_type(x, attrs)
        if extremum or math.isinf(attrs.get("ord", 0)):
            some = all(x.shape[dim] > 0 for dim in attrs["dims"])
            require(some, f"nothing has no extremum: axes that are not empty are required, got {x}")
        return (result,)

    return infer


def _axes(how: str | None) -> Callable[[Node], Axes]:
    """``how`` slices of a reduced axis combine; None: the axis is needed whole."""

    def axes(node: Node) -> Axes:
        dims, labels = node.attrs["dims"], letters(node.inputs[0].type.rank)
        taken = tuple(None if axis in dims and how is None else label for axis, label in enumerate(labels))
        if node.attrs["keepdim"]:
            given = tuple(None if axis in dims else label for axis, label in enumerate(labels))
        else:
            given = tuple(label for axis, label in enumerate(labels) if axis not in dims)
        return Axes((taken,), (given,), {labels[dim]: how for dim in dims} if how else {})

    return axes


def spread(b: Builder, node: Node, reduced: Value) -> Value:
    """A value of the reduced shape, broadcast to the shape of the reduction's input."""
    shape, dims = node.inputs[0].type.shape, node.attrs["dims"]
    kept = tuple(1 if axis in dims else size for axis, size in enumerate(shape))
    return broadcast(b, reshape(b, reduced, kept), shape)


def _count(node: Node) -> int:
    return math.prod(node.inputs[0].type.shape[dim] for dim in node.attrs["dims"])


def dim_args(node: Node) -> str:
    return f"dim={node.attrs['dims']}, keepdim={node.attrs['keepdim']}"


def _numpy(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A reduction of NumPy's with torch's conventions, computed at least in f32."""
    return upcast(lambda node, x: function(x, axis=node.attrs["dims"], keepdims=node.attrs["keepdim"]))


def _samples(domain: str = "real", dtype: str = "f64", **attrs: Attr) -> tuple[Sample, ...]:
    shapes = (((3, 4), (1,), False), ((2, 3, 4), (0, 2), True), ((2, 3, 4), (0, 1, 2), False), ((), (), False))
    return tuple(
        Sample((Arg(t(*shape, dtype=dtype), domain),), {"dims": dims, "keepdim": keepdim, **attrs})
        for shape, dims, keepdim in shapes
    )


def reduction(
    name: str,
    evaluate: Callable[..., np.ndarray],
    vjp: Callable[[Builder, Node, Value], Value] | Derivative,
    aten: dict[str, Importer],
    *,
    lower: Callable[[Node, Sequence[str]], str] | None = None,
    combine: str | None = None,
    kinds: str = "ifc",
    flops: float = 1,
    samples: Sequence[Sample] | None = None,
    decompose: Decompose | None = None,
    complex_rule: ComplexRule = REAL_ONLY,
    extremum: bool = False,
) -> None:
    """Register ``y = name(x) {dims, keepdim}``. ``vjp(builder, node, ct)`` gives the cotangent of x.

    An ``extremum`` is one of at least one element, and so is a norm of infinite order.
    """

    def pull_back(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
        assert cts[0] is not None and not isinstance(vjp, Derivative)
        return (vjp(b, node, cts[0]),)

    rule: VJP | Derivative = vjp if isinstance(vjp, Derivative) else pull_back
    register(
        OpDef(
            name=name,
            infer=_infer(kinds, extremum),
            evaluate=evaluate,
            vjp=rule,
            complex=complex_rule,
            cost=reduction_cost(flops),
            axes=_axes(combine),
            lower=lower or (lambda node, args: f"torch.{name}({args[0]}, {dim_args(node)})"),
            aten=aten,
            samples=_samples() if samples is None else samples,
            decompose=decompose,
        )
    )


def reduce(b: Builder, op: str, x: Value, dims: Dims = None, keepdim: bool = False, **attrs: Attr) -> Value:
    """Emit a reduction over ``dims``; over all axes for None or no dims, as torch has it."""
    return b.emit(op, x, dims=norm_dims(dims, x.type.rank), keepdim=keepdim, **attrs)


def _importer(op: str, to_i64: bool = False) -> Importer:
    """``op(x, dim=None, keepdim=False, *, dtype=None)``."""

    def importer(
        b: Builder, x: Value, dim: Dims = None, keepdim: bool = False, *, dtype: str | None = None, **_: Any
    ) -> Value:
        x = cast(b, x, dtype or ("i64" if to_i64 and kind(x.type.dtype) in "bi" else x.type.dtype))
        return reduce(b, op, x, dim, keepdim)

    return importer


# --- sum and mean -------------------------------------------------------------------------------------


def _lower_sum(node: Node, args: Sequence[str]) -> str:
    dtype = f", dtype={torch_dtype(node.output.type.dtype)}" if node.output.type.is_integer else ""
    return f"torch.sum({args[0]}, {dim_args(node)}{dtype})"


def _import_nansum(b: Builder, x: Value, dim: Dims = None, keepdim: bool = False, **dtype: Any) -> Value:
    if x.type.is_float:
        x = b.emit("where_scalar", b.emit("logical_not", b.emit("isnan", x)), x, value=0.0)
    return _importer("sum", to_i64=True)(b, x, dim, keepdim, **dtype)


def _import_nanmean(
    b: Builder, x: Value, dim: Dims = None, keepdim: bool = False, *, dtype: str | None = None, **_: Any
) -> Value:
    """The sum without NaNs, over how many are left."""
    x = cast(b, x, dtype or x.type.dtype)
    require(x.type.is_float, f"a float tensor is required, got {x.type}")
    kept = cast(b, b.emit("logical_not", b.emit("isnan", x)), "i64")
    count = cast(b, reduce(b, "sum", kept, dim, keepdim), x.type.dtype)
    return b.emit("div", _import_nansum(b, x, dim, keepdim), count)


def _import_count_nonzero(b: Builder, x: Value, dim: Dims = None) -> Value:
    return reduce(b, "sum", cast(b, _truth(b, x), "i64"), dim)


def _import_sum_to_size(b: Builder, x: Value, size: Sequence[int]) -> Value:
    lead = x.type.rank - len(size)
    dims = [axis for axis, n in enumerate(x.type.shape) if axis < lead or (size[axis - lead] == 1 and n != 1)]
    return reshape(b, sum_dims(b, x, dims), size)


_SUM = _importer("sum", to_i64=True)
reduction(
    "sum",
    # NumPy would widen small integers.
    upcast(lambda node, x: np.sum(x, axis=node.attrs["dims"], keepdims=node.attrs["keepdim"], dtype=x.dtype)),
    spread,
    {
        "sum.default": _SUM,
        "sum.dim_IntList": _SUM,
        "nansum.default": _import_nansum,
        "count_nonzero.default": _import_count_nonzero,
        "count_nonzero.dim_IntList": _import_count_nonzero,
        "sum_to_size.default": _import_sum_to_size,
        **dict.fromkeys(("trapezoid.x", "trapz.x"), import_trapezoid_x),
        **dict.fromkeys(("trapezoid.dx", "trapz.dx"), import_trapezoid_dx),
    },
    lower=_lower_sum,
    combine="sum",
    complex_rule=AS_IT_IS,
    samples=(*_samples(), *_samples("small", "i64")[:1], *_samples("small", "i32")[:1]),
)
reduction(
    "mean",
    _numpy(np.mean),
    lambda b, node, ct: spread(b, node, b.emit("div_scalar", ct, value=_count(node))),
    {"mean.default": _importer("mean"), "mean.dim": _importer("mean"), "nanmean.default": _import_nanmean},
    combine="mean",
    kinds="fc",
    complex_rule=AS_IT_IS,
)

# --- extrema ------------------------------------------------------------------------------------------


def _extremum_vjp(b: Builder, node: Node, ct: Value) -> Value:
    """Ties share the cotangent evenly; what has a NaN among it gets NaN (0 / 0), as in torch."""
    (x,) = node.inputs
    winners = cast(b, b.emit("eq", x, spread(b, node, node.output)), ct.type.dtype)
    count = reduce(b, "sum", winners, node.attrs["dims"], node.attrs["keepdim"])
    return b.emit("div", mul(b, spread(b, node, ct), winners), spread(b, node, count))


def _import_aminmax(b: Builder, x: Value, *, dim: int | None = None, keepdim: bool = False) -> tuple[Value, Value]:
    return reduce(b, "amin", x, dim, keepdim), reduce(b, "amax", x, dim, keepdim)


def _import_extremum_of_two(op: str) -> Importer:
    def importer(b: Builder, x: Value, y: Value) -> Value:
        dtype = promote_dtypes(x.type.dtype, y.type.dtype)
        return b.emit(op, *broadcast_together(b, cast(b, x, dtype), cast(b, y, dtype)))

    return importer


for _op, _function, _short in (("amax", np.max, "max"), ("amin", np.min, "min")):
    reduction(
        _op,
        _numpy(_function),
        _extremum_vjp,
        {
            f"{_op}.default": _importer(_op),
            f"{_short}.other": _import_extremum_of_two(f"{_op[1:]}imum"),
            **({"aminmax.default": _import_aminmax} if _op == "amax" else {}),
        },
        kinds="bif",
        samples=_samples("distinct"),
        extremum=True,
    )

# --- prod ---------------------------------------------------------------------------------------------


def _decompose_prod(b: Builder, node: Node, x: Value) -> tuple[Value, ...]:
    """A tree of products of halves: its derivative divides by nothing, so zeros do no harm."""
    for dim in node.attrs["dims"]:
        while x.type.shape[dim] != 1:
            size = x.type.shape[dim]
            half = (size + 1) // 2
            padded = pad_dim(b, x, dim, 0, 2 * half - size if size else 1, value=1)
            if half:
                x = mul(b, slice_dim(b, padded, dim, 0, half), slice_dim(b, padded, dim, half, 2 * half))
            else:
                x = padded
    return (reshape(b, x, node.output.type.shape),)


def _lower_prod(node: Node, args: Sequence[str]) -> str:
    """torch multiplies over one axis at a time."""
    dtype = f", dtype={torch_dtype(node.output.type.dtype)}" if node.output.type.is_integer else ""
    result = args[0]
    for dim in reversed(node.attrs["dims"]):
        result = f"torch.prod({result}, dim={dim}, keepdim={node.attrs['keepdim']}{dtype})"
    return result


_PROD = _importer("prod", to_i64=True)
reduction(
    "prod",
    upcast(lambda node, x: np.prod(x, axis=node.attrs["dims"], keepdims=node.attrs["keepdim"], dtype=x.dtype)),
    BY_DECOMPOSITION,
    {"prod.default": _PROD, "prod.dim_int": _PROD},
    lower=_lower_prod,
    decompose=_decompose_prod,
)

# --- variance -----------------------------------------------------------------------------------------


def _variance(node: Node, x: np.ndarray) -> np.ndarray:
    dims = node.attrs["dims"]
    deviation = x - np.mean(x, axis=dims, keepdims=True)
    total = np.sum(deviation * deviation, axis=dims, keepdims=node.attrs["keepdim"])
    return np.divide(total, max(0, _count(node) - node.attrs["correction"]))


def _var_vjp(b: Builder, node: Node, ct: Value) -> Value:
    """``2 (x - mean) ct / (n - correction)``.

    Without freedom left, over all axes, torch has infinities, and NaN where an element is the mean.
    """
    (x,), dims = node.inputs, node.attrs["dims"]
    freedom = _count(node) - node.attrs["correction"]
    mean = broadcast(b, reduce(b, "mean", x, dims, True) if dims else x, x.type.shape)
    if freedom <= 0 and len(dims) == x.type.rank:
        infinite = full(b, math.inf, x.type.shape, x.type.dtype)
        return mul(b, spread(b, node, ct), b.emit("where_scalar", b.emit("ne", x, mean), infinite, value=math.nan))
    deviation = sub(b, x, mean)
    return mul(b, spread(b, node, scale(b, ct, 2 / freedom if freedom else math.inf)), deviation)


def _std_vjp(b: Builder, node: Node, ct: Value) -> Value:
    """That of the variance, times ``ct / (2 std)``; 0 where nothing varies, as in torch."""
    y = node.output
    slope = b.emit("div", ct, scale(b, y, 2.0))
    return _var_vjp(b, node, b.emit("where_scalar", b.emit("ne_scalar", y, value=0), slope, value=0.0))


def _lower_var(node: Node, args: Sequence[str]) -> str:
    return f"torch.{node.op}({args[0]}, {dim_args(node)}, correction={scalar(node.attrs['correction'])})"


def _root(b: Builder, x: Value) -> Value:
    """The square root with derivative 0 at 0."""
    occupied = b.emit("ne_scalar", x, value=0)
    return b.emit("where_scalar", occupied, b.emit("sqrt", b.emit("where_scalar", occupied, x, value=1.0)), value=0.0)


def _var_importers(op: str, with_mean: bool) -> dict[str, Importer]:
    """The overloads of ``var`` or ``std``, alone or with the mean."""
    name = f"{op}_mean" if with_mean else op

    def variance(b: Builder, x: Value, dim: Dims, correction: float, keepdim: bool) -> Value | tuple[Value, ...]:
        if x.type.is_complex:  # that of the parts, added
            parts = (b.emit(part, x) for part in ("real", "imag"))
            result = add(b, *(reduce(b, "var", part, dim, keepdim, correction=correction) for part in parts))
            result = _root(b, result) if op == "std" else result
        else:
            result = reduce(b, op, x, dim, keepdim, correction=correction)
        return (result, reduce(b, "mean", x, dim, keepdim)) if with_mean else result

    def by_correction(
        b: Builder, x: Value, dim: Dims = None, *, correction: float | None = None, keepdim: bool = False
    ) -> Value | tuple[Value, ...]:
        return variance(b, x, dim, 1 if correction is None else correction, keepdim)

    return {
        f"{name}.correction": by_correction,
        f"{name}.dim": lambda b, x, dim, unbiased=True, keepdim=False: variance(b, x, dim, int(unbiased), keepdim),
        f"{name}.default": lambda b, x, unbiased=True: variance(b, x, None, int(unbiased), False),
    }


reduction(
    "var",
    upcast(_variance),
    _var_vjp,
    {**_var_importers("var", with_mean=False), **_var_importers("var", with_mean=True)},
    lower=_lower_var,
    kinds="f",
    flops=4,
    samples=(*_samples(correction=1)[:3], *_samples(correction=0)[:2], *_samples(correction=0.5)[:1]),
)
reduction(
    "std",
    upcast(lambda node, x: np.sqrt(_variance(node, x))),
    _std_vjp,
    {**_var_importers("std", with_mean=False), **_var_importers("std", with_mean=True)},
    lower=_lower_var,
    kinds="f",
    flops=4,
    samples=(*_samples(correction=1)[:2], *_samples(correction=0.5)[:1]),
)

# --- any and all --------------------------------------------------------------------------------------


def _truth(b: Builder, x: Value) -> Value:
    return x if x.type.dtype == "bool" else b.emit("ne_scalar", x, value=0)


def _import_logic(op: str) -> Importer:
    """torch gives a bool, but u8 for u8."""

    def importer(b: Builder, x: Value, dim: Dims = None, keepdim: bool = False) -> Value:
        result = reduce(b, op, _truth(b, x), dim, keepdim)
        return cast(b, result, "u8") if x.type.dtype == "u8" else result

    return importer


for _op, _function in (("any", np.any), ("all", np.all)):
    reduction(
        _op,
        _numpy(_function),
        NOT_DIFFERENTIABLE,
        {f"{_op}.{overload}": _import_logic(_op) for overload in ("default", "dim", "dims")},
        kinds="b",
        samples=_samples("bool", "bool"),
    )

# --- logsumexp ----------------------------------------------------------------------------------------


def _logsumexp(node: Node, x: np.ndarray) -> np.ndarray:
    dims, keepdim = node.attrs["dims"], node.attrs["keepdim"]
    top = np.max(x, axis=dims, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0)
    total = np.log(np.sum(np.exp(x - top), axis=dims, keepdims=True)) + top
    return total if keepdim else total.reshape(node.output.type.shape)


def _import_logsumexp(b: Builder, x: Value, dim: Dims, keepdim: bool = False) -> Value:
    return reduce(b, "logsumexp", cast(b, x, x.type.dtype if x.type.differentiable else "f32"), dim, keepdim)


reduction(
    "logsumexp",
    upcast(_logsumexp),
    lambda b, node, ct: mul(
        b, spread(b, node, ct), b.emit("exp", sub(b, node.inputs[0], spread(b, node, node.output)))
    ),
    {"logsumexp.default": _import_logsumexp},
    kinds="f",
    flops=10,
)
