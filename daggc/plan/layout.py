"""Which reshapes copy: how values lie in memory, as torch's kernels leave them.

A reshape of a value whose axes were permuted cannot be a view: it moves every element, and takes as long as any
copy does. Strides are followed through views exactly, and through other ops by what torch does: elementwise ops keep
the layout of their inputs, fused attention leaves heads behind positions, everything else is contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType

Strides = tuple[int, ...]

_KEEPING = ("elementwise",)  # op classes whose results lie as their inputs do
_ATTENTION = ("attention", "attention_backward")


def copying(nodes: Sequence[Node], classes: Sequence[str]) -> list[bool]:
    """For each node, whether it is a reshape that copies; values that no node makes are contiguous.

    Args:
        nodes: in SSA order.
        classes: of each node, its op class (:class:`daggc.ops.opdef.Cost`).
    """
    lies: dict[str, Strides] = {}
    copies: list[bool] = []
    for node, op_class in zip(nodes, classes, strict=True):
        copied = False
        if op_class == "view" and node.inputs:
            strides = _strides(node.inputs[0], lies) or contiguous(node.inputs[0].type.shape)
            made = [_view(node, strides, value.type) for value in node.outputs]
            copied = node.op == "reshape" and made[0] is None
        elif op_class in _KEEPING:
            made = [_kept(node.inputs, lies, value.type) for value in node.outputs]
        elif node.op in _ATTENTION:
            made = [_heads_behind(value.type.shape) for value in node.outputs]
        else:
            made = []
        for value in node.outputs:
            lies.pop(value.name, None)
        lies.update(
            (value.name, strides) for value, strides in zip(node.outputs, made, strict=False) if strides is not None
        )
        copies.append(copied)
    return copies


def _strides(value: Value, lies: Mapping[str, Strides]) -> Strides | None:
    """Of a value that is not contiguous; nodes of several graphs, whose names clash, may be asked about at once."""
    strides = lies.get(value.name)
    return strides if strides is not None and len(strides) == value.type.rank else None


def contiguous(shape: Sequence[int]) -> Strides:
    """Strides, in elements, of a tensor in C order."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    return tuple(strides)


def _view(node: Node, strides: Strides, result: TensorType) -> Strides | None:
    """Strides of a view; None of a contiguous copy."""
    source = node.inputs[0].type.shape
    if node.op == "permute":
        return tuple(strides[dim] for dim in node.attrs["dims"])
    if node.op == "broadcast":
        lead = len(result.shape) - len(source)
        axes = zip(strides, source, result.shape[lead:], strict=True)
        return (0,) * lead + tuple(stride if size == wide else 0 for stride, size, wide in axes)
    if node.op == "reshape":
        return reshaped(source, strides, result.shape)
    if len(result.shape) == len(source):  # slices, splits
        return strides
    return None


def reshaped(shape: Sequence[int], strides: Strides, target: Sequence[int]) -> Strides | None:
    """Strides of a tensor seen with another shape, or None if its elements do not lie so.

    Axes that lie one behind the other without a gap form a run; each run must be cut up into target axes.
    """
    if math.prod(shape) <= 1 or not target:
        return contiguous(target)
    runs: list[list[int]] = []  # elements, innermost stride
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == stride * size:
            runs[-1] = [runs[-1][0] * size, stride]
        else:
            runs.append([size, stride])
    made: list[int] = []
    pending = list(reversed(target))
    for elements, stride in reversed(runs):
        left = elements
        while left > 1:
            size = pending.pop(0)
            if left % size:
                return None
            made.append(stride)
            stride, left = stride * size, left // size
    made += [1] * len(pending)  # axes of size 1 are left
    return tuple(reversed(made))


def _kept(inputs: Sequence[Value], lies: Mapping[str, Strides], result: TensorType) -> Strides | None:
    """The layout of the first input of the result's shape, if it is dense."""
    for value in inputs:
        if value.type.shape == result.shape:
            strides = _strides(value, lies)
            dense = strides is not None and _is_dense(result.shape, strides)
            return strides if dense else None
    return None


def _is_dense(shape: Sequence[int], strides: Strides) -> bool:
    """Whether a permutation of the axes makes it contiguous."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _heads_behind(shape: Sequence[int]) -> Strides | None:
    """[batch, heads, positions, width], which lies as [batch, positions, heads, width]."""
    if len(shape) != 4:
        return None
    _, heads, positions, width = shape
    return (heads * positions * width, width, heads * width, 1)
