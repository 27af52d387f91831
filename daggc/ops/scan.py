"""Running sums, products and extrema along an axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import add, cast, full, kind, mul, norm_dim, sub
from daggc.ops.differences import import_cumulative_trapezoid_dx, import_cumulative_trapezoid_x
from daggc.ops.opdef import (
    AS_IT_IS,
    BY_DECOMPOSITION,
    Arg,
    Importer,
    OpDef,
    Sample,
    reduction_cost,
    register,
    require,
    sample,
    t,
    torch_dtype,
    upcast,
)
from daggc.ops.order import selected_vjp, wide
from daggc.ops.shape import Cotangents, flip
from daggc.ops.slicing import axes_but_dim, pad_dim, slice_dim


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,), dim = inputs, attrs["dim"]
    require(0 <= dim < x.rank, f"dim must be an axis of {x}, got {dim}")
    require(x.dtype != "bool", "numbers are required, cast bools first")
    return (x,)


def _cumsum_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """A running sum from the other end."""
    assert cts[0] is not None
    dims = (node.attrs["dim"],)
    return (flip(b, b.emit("cumsum", flip(b, cts[0], dims), dim=dims[0]), dims),)


def _decompose_cumprod(b: Builder, node: Node, x: Value) -> tuple[Value, ...]:
    """Each step multiplies by the tensor shifted twice as far as before; zeros do no harm to the derivative."""
    dim = node.attrs["dim"]
    size, shift = x.type.shape[dim], 1
    while shift < size:
        x = mul(b, x, pad_dim(b, slice_dim(b, x, dim, 0, size - shift), dim, shift, 0, value=1))
        shift *= 2
    return (x,)


def _lower(name: str):
    def lower(node: Node, args: Sequence[str]) -> str:
        dtype = f", dtype={torch_dtype(node.output.type.dtype)}" if node.output.type.is_integer else ""
        return f"torch.{name}({args[0]}, {node.attrs['dim']}{dtype})"

    return lower


def _importer(op: str) -> Importer:
    """Integers are summed as i64, as in torch; a scalar is its own running sum."""

    def importer(b: Builder, x: Value, dim: int, *, dtype: str | None = None, **_: Any) -> Value:
        x = cast(b, x, dtype or ("i64" if kind(x.type.dtype) in "bi" else x.type.dtype))
        return b.emit(op, x, dim=norm_dim(dim, x.type.rank)) if x.type.rank else x

    return importer


for _name, _function, _vjp, _decompose in (
    ("cumsum", np.cumsum, _cumsum_vjp, None),
    ("cumprod", np.cumprod, BY_DECOMPOSITION, _decompose_cumprod),
):
    register(
        OpDef(
            name=_name,
            infer=_infer,
            evaluate=upcast(lambda node, x, function=_function: function(x, axis=node.attrs["dim"], dtype=x.dtype)),
            vjp=_vjp,
            complex=AS_IT_IS,
            cost=reduction_cost(),
            axes=axes_but_dim,
            lower=_lower(_name),
            aten={
                f"{_name}.default": _importer(_name),
                **(
                    {
                        "cumulative_trapezoid.x": import_cumulative_trapezoid_x,
                        "cumulative_trapezoid.dx": import_cumulative_trapezoid_dx,
                    }
                    if _name == "cumsum"
                    else {}
                ),
            },
            samples=(
                sample((3, 4), dim=1),
                sample((5,), dim=0),
                Sample((Arg(t(3, 2, dtype="i64"), "small"),), {"dim": 0}),
            ),
            decompose=_decompose,
        )
    )

# --- extrema ------------------------------------------------------------------------------------------


def _infer_extremum(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,), dim = inputs, attrs["dim"]
    require(0 <= dim < x.rank, f"dim must be an axis of {x}, got {dim}")
    require(not x.is_complex, f"numbers that have an order are required, got {x}")
    return x, x.with_(dtype="i64")


def _evaluate_extremum(function: np.ufunc) -> Callable[[Node, np.ndarray], tuple[np.ndarray, ...]]:
    """The last position of those that tie; NaN, once met, stays."""

    def evaluate(node: Node, x: np.ndarray) -> tuple[np.ndarray, ...]:
        dim, numbers = node.attrs["dim"], wide(x)
        running = function.accumulate(numbers, axis=dim)
        places = np.arange(x.shape[dim]).reshape([-1 if axis == dim else 1 for axis in range(x.ndim)])
        found = (numbers == running) | (numbers != numbers)
        indices = np.maximum.accumulate(np.where(found, places, 0), axis=dim)
        return running.astype(x.dtype), indices

    return evaluate


def _import_extremum(op: str) -> Importer:
    def importer(b: Builder, x: Value, dim: int) -> tuple[Value, ...]:
        if not x.type.rank:
            return x, full(b, 0, (), "i64")
        return b.emit_many(op, x, dim=norm_dim(dim, x.type.rank))

    return importer


for _name, _function in (("cummax", np.maximum), ("cummin", np.minimum)):
    register(
        OpDef(
            name=_name,
            infer=_infer_extremum,
            evaluate=_evaluate_extremum(_function),
            vjp=selected_vjp,
            cost=reduction_cost(),
            axes=axes_but_dim,
            lower=lambda node, args, name=_name: f"torch.{name}({args[0]}, {node.attrs['dim']})",
            aten={f"{_name}.default": _import_extremum(_name)},
            samples=(
                sample((3, 4), domain="distinct", dim=1),
                Sample((Arg(t(6, 2, dtype="i64"), "small"),), {"dim": 0}),
            ),
        )
    )

# --- logcumsumexp -------------------------------------------------------------------------------------


def _infer_logcumsumexp(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    require(inputs[0].is_float, f"a float tensor is required, got {inputs[0]}")
    return _infer(inputs, attrs)


def _logcumsumexp_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """``exp(x) * (the sum from the other end of ct * exp(-y))``, in logarithms, of positive and negative ct apart.

    As torch has it (FunctionsManual.cpp, ``logcumsumexp_backward``): nothing overflows.
    """
    (ct,), (x,), y, dim = cts, node.inputs, node.output, node.attrs["dim"]
    assert ct is not None
    size_of_ct = b.emit("log", b.emit("abs", ct))
    lowest = float(ml_dtypes.finfo(ct.type.numpy_dtype).min)

    def part(compare: str) -> Value:
        chosen = b.emit("where_scalar", b.emit(compare, ct, value=0), size_of_ct, value=lowest)
        backwards = flip(b, sub(b, chosen, y), (dim,))
        return b.emit("exp", add(b, flip(b, b.emit("logcumsumexp", backwards, dim=dim), (dim,)), x))

    return (sub(b, part("gt_scalar"), part("lt_scalar")),)


def _import_logcumsumexp(b: Builder, x: Value, dim: int) -> Value:
    return b.emit("logcumsumexp", x, dim=norm_dim(dim, x.type.rank)) if x.type.rank else x


register(
    OpDef(
        name="logcumsumexp",
        infer=_infer_logcumsumexp,
        evaluate=upcast(lambda node, x: np.logaddexp.accumulate(x, axis=node.attrs["dim"])),
        vjp=_logcumsumexp_vjp,
        cost=reduction_cost(20),
        axes=axes_but_dim,
        lower=lambda node, args: f"torch.logcumsumexp({args[0]}, {node.attrs['dim']})",
        aten={"logcumsumexp.default": _import_logcumsumexp},
        samples=(sample((3, 4), dim=1), sample((5, 2), dim=0)),
    )
)
