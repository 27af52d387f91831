"""Tensors filled with one number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import (
    Scalar,
    full,
    result_dtype,
)
from daggc.ops.opdef import (
    NOT_DIFFERENTIABLE,
    Axes,
    Importer,
    OpDef,
    Sample,
    copy_cost,
    letters,
    register,
    require,
    scalar,
    torch_dtype,
)


def _infer_full(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    value, result = attrs["value"], TensorType(attrs["dtype"], attrs["shape"])
    fits = isinstance(value, bool | int | float) or (isinstance(value, complex) and result.is_complex)
    require(not inputs and fits, f"no input and a number that {result} can hold are required, got {value!r}")
    return (result,)


def _evaluate_full(node: Node) -> np.ndarray:
    """Numbers that an integer dtype does not hold wrap around, as in torch."""
    number = np.asarray(node.attrs["value"]).astype(node.output.type.numpy_dtype)
    return np.full(node.attrs["shape"], number)


def _import_full(b: Builder, size: Sequence[int], value: Scalar, *, dtype: str | None = None, **_: Any) -> Value:
    return full(b, value, size, dtype or result_dtype(value))


def _import_full_like(b: Builder, x: Value, value: Scalar, *, dtype: str | None = None, **_: Any) -> Value:
    return full(b, value, x.type.shape, dtype or x.type.dtype)


def _constant_importers(value: int) -> dict[str, Importer]:
    name = "zeros" if value == 0 else "ones"
    return {
        f"{name}.default": lambda b, size, *, dtype=None, **_: full(b, value, size, dtype or "f32"),
        f"new_{name}.default": lambda b, x, size, *, dtype=None, **_: full(b, value, size, dtype or x.type.dtype),
        f"{name}_like.default": lambda b, x, *, dtype=None, **_: full(b, value, x.type.shape, dtype or x.type.dtype),
    }


register(
    OpDef(
        name="full",
        infer=_infer_full,
        evaluate=_evaluate_full,
        vjp=NOT_DIFFERENTIABLE,
        cost=copy_cost,
        axes=lambda node: Axes((), (letters(node.output.type.rank),)),
        lower=lambda node, args: (
            f"torch.full({node.attrs['shape']}, {scalar(node.attrs['value'])}, "
            f"dtype={torch_dtype(node.attrs['dtype'])}, device=device)"
        ),
        aten={
            "full.default": _import_full,
            "full_like.default": _import_full_like,
            "new_full.default": lambda b, x, size, value, *, dtype=None, **_: full(
                b, value, size, dtype or x.type.dtype
            ),
            "scalar_tensor.default": lambda b, value, *, dtype=None, **_: full(
                b, value, (), dtype or result_dtype(value)
            ),
            **_constant_importers(0),
            **_constant_importers(1),
        },
        samples=(Sample((), {"value": 1.5, "shape": (3, 4), "dtype": "f64"}),),
    )
)
