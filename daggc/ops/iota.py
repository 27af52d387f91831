"""Evenly spaced numbers, and what is made of them: ranges, grids, triangular masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import Operand, Scalar, add, broadcast, cast, full, kind, mul, reshape, sub
from daggc.ops.concat import concat
from daggc.ops.opdef import (
    NOT_DIFFERENTIABLE,
    Axes,
    OpDef,
    Sample,
    copy_cost,
    register,
    require,
    scalar,
    torch_dtype,
)


def _infer_iota(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    require(not inputs, f"no input is required, got {len(inputs)}")
    result = TensorType(attrs["dtype"], (attrs["size"],))
    numbers = (int, float) if result.is_float else (int,)
    for name in ("start", "step"):
        require(type(attrs[name]) in numbers, f"{name} must be a number that fits {result.dtype}, got {attrs[name]!r}")
    require(attrs["step"] != 0, "step must not be 0")
    return (result,)


def _evaluate_iota(node: Node) -> np.ndarray:
    """In f64 or i64, rounded once: torch's CPU kernel accumulates in double."""
    start, step = node.attrs["start"], node.attrs["step"]
    return (start + step * np.arange(node.attrs["size"])).astype(node.output.type.numpy_dtype)


def _lower_iota(node: Node, args: Sequence[str]) -> str:
    """The end lies half a step past the last number, where rounding cannot change the size."""
    start, step, size = (node.attrs[name] for name in ("start", "step", "size"))
    options = f"dtype={torch_dtype(node.attrs['dtype'])}, device=device"
    if size == 0:
        return f"torch.empty((0,), {options})"
    end = start + size * step if isinstance(start, int) and isinstance(step, int) else start + (size - 0.5) * step
    return f"torch.arange({scalar(start)}, {scalar(end)}, {scalar(step)}, {options})"


def iota(b: Builder, size: int, dtype: str = "i64", start: Scalar = 0, step: Scalar = 1) -> Value:
    """``start + step * i`` for i in ``range(size)``."""
    return b.emit("iota", start=start, step=step, size=size, dtype=dtype)


def _real(number: Scalar) -> int | float:
    """The number, without which there is no order; torch has evenly spaced complex numbers too."""
    if isinstance(number, complex):
        raise NotImplementedError(f"a range with the complex number {number}")
    return int(number) if isinstance(number, bool) else number


def _import_arange(b: Builder, *bounds: Scalar, dtype: str | None = None, **_: Any) -> Value:
    given = [_real(number) for number in bounds]
    start, end, step = (0, given[0], 1) if len(given) == 1 else (*given, 1)[:3]
    dtype = dtype or ("f32" if any(isinstance(number, float) for number in (start, end, step)) else "i64")
    if kind(dtype) != "f":
        start, end, step = int(start), int(end), int(step)
        size = -(-(end - start) // step)
    else:
        size = math.ceil((end - start) / step)
    if size < 0:
        raise TypeRuleError(f"arange from {start} to {end} cannot have step {step}")
    return iota(b, size, dtype, start, step)


def _import_linspace(
    b: Builder, start: Scalar, end: Scalar, steps: int, *, dtype: str | None = None, **_: Any
) -> Value:
    """Counted from both ends to the middle, as torch does, so that the last number is exactly ``end``."""
    dtype, start, end = dtype or "f32", _real(start), _real(end)
    if kind(dtype) == "i":  # in f64, between whole numbers
        return cast(b, _import_linspace(b, int(start), int(end), steps, dtype="f64"), dtype)
    if kind(dtype) != "f":
        raise NotImplementedError(f"linspace of dtype {dtype}")
    if steps <= 1 or start == end:
        return full(b, float(start), (steps,), dtype)
    step, half = (float(end) - float(start)) / (steps - 1), steps // 2
    head = iota(b, half, dtype, float(start), step)
    # Descending from the end: start + step * i would miss it by a rounding.
    tail = b.emit("flip", iota(b, steps - half, dtype, float(end), -step), dims=(0,))
    return concat(b, (head, tail), 0)


def _import_linspace_of_tensors(
    b: Builder, start: Operand, end: Operand, steps: int, *, dtype: str | None = None, **_: Any
) -> Value:
    """Bounds of which one at least is a 0-d tensor. torch has no derivative."""
    dtype = dtype or "f32"
    if kind(dtype) != "f":
        raise NotImplementedError(f"linspace of dtype {dtype} between tensors")
    first, last = (
        cast(b, _stopped(b, bound), dtype) if isinstance(bound, Value) else full(b, float(_real(bound)), (), dtype)
        for bound in (start, end)
    )
    if steps <= 1:
        return broadcast(b, first, (1,)) if steps else full(b, 0.0, (0,), dtype)
    half = steps // 2
    width = b.emit("div_scalar", sub(b, last, first), value=steps - 1)
    first, last, width = (broadcast(b, bound, (steps,)) for bound in (first, last, width))
    from_start = add(b, first, mul(b, width, iota(b, steps, dtype)))
    from_end = sub(b, last, mul(b, width, iota(b, steps, dtype, steps - 1, -1)))
    return b.emit("where", b.emit("lt_scalar", iota(b, steps), value=half), from_start, from_end)


def _stopped(b: Builder, x: Value) -> Value:
    return b.emit("stop_gradient", x) if x.type.differentiable else x


def _logspace(linspace: Callable[..., Value]) -> Callable[..., Value]:
    """``base`` to the power of evenly spaced exponents; integers in f32, as in torch."""

    def importer(
        b: Builder,
        start: Operand,
        end: Operand,
        steps: int,
        base: float = 10.0,
        *,
        dtype: str | None = None,
        **_: Any,
    ) -> Value:
        dtype = dtype or "f32"
        whole = kind(dtype) == "i"
        if whole and not isinstance(start, Value) and not isinstance(end, Value):
            start, end = int(_real(start)), int(_real(end))
        exponents = linspace(b, start, end, steps, dtype="f32" if whole else dtype)
        return cast(b, b.emit("rpow_scalar", exponents, value=float(base)), dtype)

    return importer


def _grid(b: Builder, rows: int, columns: int, compare: str, diagonal: int = 0) -> Value:
    """A bool mask of shape (rows, columns): ``column <compare> row + diagonal``."""
    row = broadcast(b, reshape(b, iota(b, rows, start=diagonal), (rows, 1)), (rows, columns))
    return b.emit(compare, broadcast(b, iota(b, columns), (rows, columns)), row)


def _import_eye(b: Builder, rows: int, columns: int | None = None, *, dtype: str | None = None, **_: Any) -> Value:
    return cast(b, _grid(b, rows, rows if columns is None else columns, "eq"), dtype or "f32")


def _import_triangle(compare: str) -> Callable[..., Value]:
    def importer(b: Builder, x: Value, diagonal: int = 0) -> Value:
        rows, columns = x.type.shape[-2:]
        mask = broadcast(b, _grid(b, rows, columns, compare, diagonal), x.type.shape)
        zero = {"b": False, "i": 0}.get(kind(x.type.dtype), 0.0)
        return b.emit("where_scalar", mask, x, value=zero)

    return importer


def _zeros(b: Builder, shape: Sequence[int], dtype: str) -> Value:
    """Uninitialized memory has no meaning of its own; zeros are one that it may have."""
    return full(b, {"b": False, "i": 0}.get(kind(dtype), 0.0), shape, dtype)


def _import_empty(b: Builder, size: Sequence[int], *_args: Any, dtype: str | None = None, **_: Any) -> Value:
    return _zeros(b, size, dtype or "f32")


def _import_new_empty(
    b: Builder, x: Value, size: Sequence[int], *_args: Any, dtype: str | None = None, **_: Any
) -> Value:
    return _zeros(b, size, dtype or x.type.dtype)


def _import_empty_like(b: Builder, x: Value, *, dtype: str | None = None, **_: Any) -> Value:
    return _zeros(b, x.type.shape, dtype or x.type.dtype)


register(
    OpDef(
        name="iota",
        infer=_infer_iota,
        evaluate=_evaluate_iota,
        vjp=NOT_DIFFERENTIABLE,
        cost=copy_cost,
        axes=lambda node: Axes((), ((None,),)),
        lower=_lower_iota,
        aten={
            **dict.fromkeys(("arange.default", "arange.start", "arange.start_step"), _import_arange),
            "linspace.default": _import_linspace,
            **dict.fromkeys(
                ("linspace.Tensor_Tensor", "linspace.Tensor_Scalar", "linspace.Scalar_Tensor"),
                _import_linspace_of_tensors,
            ),
            "logspace.default": _logspace(_import_linspace),
            **dict.fromkeys(
                ("logspace.Tensor_Tensor", "logspace.Tensor_Scalar", "logspace.Scalar_Tensor"),
                _logspace(_import_linspace_of_tensors),
            ),
            "eye.default": _import_eye,
            "eye.m": _import_eye,
            "tril.default": _import_triangle("le"),
            "triu.default": _import_triangle("ge"),
            "empty.memory_format": _import_empty,
            "empty_strided.default": _import_empty,
            "empty_permuted.default": _import_empty,
            "new_empty.default": _import_new_empty,
            "new_empty_strided.default": _import_new_empty,
            "empty_like.default": _import_empty_like,
        },
        samples=(
            Sample((), {"start": 0, "step": 1, "size": 5, "dtype": "i64"}),
            Sample((), {"start": 7, "step": -2, "size": 4, "dtype": "i32"}),
            Sample((), {"start": 0.5, "step": 0.25, "size": 6, "dtype": "f64"}),
            Sample((), {"start": 0, "step": 1, "size": 3, "dtype": "f32"}),
        ),
    )
)
