"""softmax and log_softmax along one axis, with backward ops that take the result, not the input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import broadcast, cast, mul, norm_dim, sub, sum_dims
from daggc.ops.opdef import (
    BY_DECOMPOSITION,
    Axes,
    Importer,
    OpDef,
    letters,
    reduction_cost,
    register,
    require,
    sample,
    torch_dtype,
    upcast,
)


def softmax(b: Builder, x: Value, dim: int) -> Value:
    return b.emit("softmax", x, dim=norm_dim(dim, x.type.rank))


def log_softmax(b: Builder, x: Value, dim: int) -> Value:
    return b.emit("log_softmax", x, dim=norm_dim(dim, x.type.rank))


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    _check(x, attrs)
    return (x,)


def _infer_backward(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    ct, y = inputs
    _check(y, attrs)
    require(ct == y, "a cotangent of the type of the result is required")
    return (y,)


def _check(x: TensorType, attrs: Attrs) -> None:
    require(x.is_float, f"a float tensor is required, got {x}")
    require(type(attrs["dim"]) is int and 0 <= attrs["dim"] < max(x.rank, 1), f"dim is an axis of {x}")


def _axes(node: Node) -> Axes:
    """Every axis but ``dim`` passes through."""
    labels: list[str | None] = list(letters(node.output.type.rank))
    if labels:
        labels[node.attrs["dim"]] = None
    return Axes((tuple(labels),) * len(node.inputs), (tuple(labels),))


def _axis(node: Node) -> int | None:
    """The axis for NumPy, which has none for a 0-d array."""
    return node.attrs["dim"] if node.output.type.rank else None


def _top(node: Node, x: np.ndarray) -> np.ndarray:
    """The largest number of each row, which may be empty."""
    return x.max(axis=_axis(node), keepdims=True, initial=-np.inf)


def _softmax(node: Node, x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - _top(node, x))
    return exponentials / exponentials.sum(axis=_axis(node), keepdims=True)


def _log_softmax(node: Node, x: np.ndarray) -> np.ndarray:
    shifted = x - _top(node, x)
    return shifted - np.log(np.exp(shifted).sum(axis=_axis(node), keepdims=True))


def _softmax_backward(node: Node, ct: np.ndarray, y: np.ndarray) -> np.ndarray:
    return y * (ct - (ct * y).sum(axis=_axis(node), keepdims=True))


def _log_softmax_backward(node: Node, ct: np.ndarray, y: np.ndarray) -> np.ndarray:
    return ct - np.exp(y) * ct.sum(axis=_axis(node), keepdims=True)


def _total(b: Builder, node: Node, x: Value) -> Value:
    """The sum along the op's axis, broadcast back."""
    dims = (node.attrs["dim"],) if x.type.rank else ()
    return broadcast(b, sum_dims(b, x, dims, keepdim=True), x.type.shape)


def _decompose_softmax_backward(b: Builder, node: Node, ct: Value, y: Value) -> tuple[Value, ...]:
    return (mul(b, y, sub(b, ct, _total(b, node, mul(b, ct, y)))),)


def _decompose_log_softmax_backward(b: Builder, node: Node, ct: Value, y: Value) -> tuple[Value, ...]:
    return (sub(b, ct, mul(b, b.emit("exp", y), _total(b, node, ct))),)


def _import(name: str) -> Importer:
    """``softmax.int(x, dim, dtype)``: the input is cast first."""

    def importer(b: Builder, x: Value, dim: int, dtype: str | None = None, **_: Any) -> Value:
        return b.emit(name, cast(b, x, dtype or x.type.dtype), dim=norm_dim(dim, x.type.rank))

    return importer


def _import_low(name: str) -> Importer:
    """``_softmax(x, dim, half_to_float)``."""

    def importer(b: Builder, x: Value, dim: int, half_to_float: bool) -> Value:
        return b.emit(name, cast(b, x, "f32") if half_to_float else x, dim=norm_dim(dim, x.type.rank))

    return importer


def _import_safe(b: Builder, x: Value, dim: int, dtype: str | None = None) -> Value:
    """``_safe_softmax``: zeros, not NaN, where all of a row is masked by -inf."""
    x = cast(b, x, dtype or x.type.dtype)
    if not x.type.rank:
        raise NotImplementedError("_safe_softmax of a scalar")
    dim = norm_dim(dim, x.type.rank)
    masked = b.emit("all", b.emit("eq_scalar", x, value=-math.inf), dims=(dim,), keepdim=True)
    kept = broadcast(b, b.emit("logical_not", masked), x.type.shape)
    y = b.emit("softmax", b.emit("where_scalar", kept, x, value=0.0), dim=dim)  # finite: a gradient of 0 stays 0
    return b.emit("where_scalar", kept, y, value=0.0)


def _import_backward(name: str) -> Importer:
    def importer(b: Builder, ct: Value, y: Value, dim: int, input_dtype: str) -> Value:
        result = b.emit(f"{name}_backward", cast(b, ct, y.type.dtype), y, dim=norm_dim(dim, y.type.rank))
        return cast(b, result, input_dtype)

    return importer


def _register_pair(
    name: str,
    forward: Callable[..., np.ndarray],
    backward: Callable[..., np.ndarray],
    decompose_backward: Callable[..., tuple[Value, ...]],
) -> None:
    """Register ``name(x) {dim}`` and ``name_backward(ct, result) {dim}``."""

    def vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
        assert cts[0] is not None
        return (b.emit(f"{name}_backward", cts[0], node.output, dim=node.attrs["dim"]),)

    def lower_backward(node: Node, args: Sequence[str]) -> str:
        dtype = torch_dtype(node.output.type.dtype)
        return f"torch.ops.aten._{name}_backward_data({', '.join(args)}, {node.attrs['dim']}, {dtype})"

    register(
        OpDef(
            name=name,
            infer=_infer,
            evaluate=upcast(forward),
            vjp=vjp,
            cost=reduction_cost(12),
            axes=_axes,
            lower=lambda node, args: f"torch.{name}({args[0]}, {node.attrs['dim']})",
            aten={
                f"{name}.int": _import(name),
                f"_{name}.default": _import_low(name),
                **({"_safe_softmax.default": _import_safe} if name == "softmax" else {}),
            },
            samples=(
                sample((3, 4), dim=1),
                sample((3, 4), dim=0),
                sample((2, 3, 1, 5), dim=3),
                sample((), dim=0),
            ),
        )
    )
    register(
        OpDef(
            name=f"{name}_backward",
            infer=_infer_backward,
            evaluate=upcast(backward),
            vjp=BY_DECOMPOSITION,
            cost=reduction_cost(4 if name == "softmax" else 12),
            axes=_axes,
            lower=lower_backward,
            aten={f"_{name}_backward_data.default": _import_backward(name)},
            samples=(sample((3, 4), (3, 4), dim=1), sample((2, 3, 4), (2, 3, 4), dim=1), sample((), (), dim=0)),
            decompose=decompose_backward,
        )
    )


_register_pair("softmax", _softmax, _softmax_backward, _decompose_softmax_backward)
_register_pair("log_softmax", _log_softmax, _log_softmax_backward, _decompose_log_softmax_backward)
