"""One-hot vectors of indices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.indexing import bounded, index_arg
from daggc.ops.opdef import NOT_DIFFERENTIABLE, Axes, OpDef, Sample, copy_cost, letters, register, require


def _infer_one_hot(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (index,) = inputs
    require(index.dtype == "i64", f"i64 indices are required, got {index}")
    require(attrs["num_classes"] > 0, f"at least one class is required, got {attrs['num_classes']}")
    return (index.with_(shape=(*index.shape, attrs["num_classes"])),)


def _evaluate_one_hot(node: Node, index: np.ndarray) -> np.ndarray:
    count = node.attrs["num_classes"]
    return (bounded(index, count)[..., None] == np.arange(count)).astype(np.int64)


def _import_one_hot(b: Builder, index: Value, num_classes: int = -1) -> Value:
    if num_classes < 0:
        raise TypeRuleError("one_hot without num_classes has a data-dependent shape; give num_classes")
    return b.emit("one_hot", index, num_classes=num_classes)


def _one_hot_axes(node: Node) -> Axes:
    labels = letters(node.inputs[0].type.rank)
    return Axes((labels,), ((*labels, None),))


register(
    OpDef(
        name="one_hot",
        infer=_infer_one_hot,
        evaluate=_evaluate_one_hot,
        vjp=NOT_DIFFERENTIABLE,
        cost=copy_cost,
        axes=_one_hot_axes,
        lower=lambda node, args: f"torch.nn.functional.one_hot({args[0]}, {node.attrs['num_classes']})",
        aten={"one_hot.default": _import_one_hot},
        samples=(Sample((index_arg(2, 3, below=5),), {"num_classes": 5}),),
    )
)
