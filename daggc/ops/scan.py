"""Running sums and products along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import cast, kind, mul, norm_dim
from daggc.ops.opdef import (
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
            cost=reduction_cost(),
            axes=axes_but_dim,
            lower=_lower(_name),
            aten={f"{_name}.default": _importer(_name)},
            samples=(
                sample((3, 4), dim=1),
                sample((5,), dim=0),
                Sample((Arg(t(3, 2, dtype="i64"), "small"),), {"dim": 0}),
            ),
            decompose=_decompose,
        )
    )
