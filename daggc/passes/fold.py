"""Constant folding of what is exact: integers, bools, and moves of small constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from daggc.interp import evaluate_node
from daggc.ir.attrs import Dense
from daggc.ir.builder import Builder
from daggc.ir.graph import Graph, Node, Program, Value
from daggc.passes.manager import Pass, register_pass
from daggc.passes.rewrite import rebuild

_LIMIT = 64  # elements; larger constants are cheaper to compute than to ship
# Of floats, only what every IEEE implementation rounds alike: NumPy's exp is not torch's in the last bit.
_EXACT = frozenset(
    (
        *("cast", "reshape", "permute", "slice", "concat", "broadcast", "where", "where_scalar"),
        *(
            "neg",
            "abs",
            "conj",
            "real",
            "imag",
            "complex",
            "add",
            "sub",
            "mul",
            "div",
            "add_scalar",
            "sub_scalar",
            "mul_scalar",
            "div_scalar",
        ),
    )
)
_OPAQUE = ("python.call", "torch.call", "call", "transfer")


def fold_constants(graph: Graph) -> Graph:
    """Replace small nodes whose inputs are all constants by ``full`` or ``constant``."""
    known: dict[str, np.ndarray] = {}

    def visit(b: Builder, node: Node, inputs: Sequence[Value]) -> Sequence[Value] | None:
        if node.op in _OPAQUE or node.attrs.graphs or any(value.name not in known for value in inputs):
            return None
        if any(value.type.numel > _LIMIT for value in node.outputs):
            return None
        if not node.inputs and node.op not in ("full", "constant", "iota"):
            return None
        if any(value.type.differentiable for value in node.outputs) and node.inputs and node.op not in _EXACT:
            return None
        results = evaluate_node(node, [known[value.name] for value in inputs])
        if node.op in ("full", "constant", "iota"):
            outputs = b.append(node, inputs)
        else:
            outputs = tuple(emit_constant(b, array) for array in results)
        known.update({value.name: array for value, array in zip(outputs, results, strict=True)})
        return outputs

    return rebuild(graph, visit)


def emit_constant(b: Builder, array: np.ndarray) -> Value:
    """A node that gives the array: ``full`` if one number fills it, else ``constant``."""
    dense = Dense.of(array)
    flat = array.reshape(-1)
    if (
        array.size
        and array.dtype.kind in "iufb"
        and np.isfinite(flat[0])
        and flat.tobytes() == flat[:1].tobytes() * array.size
    ):
        return b.emit("full", value=flat[0].item(), shape=dense.type.shape, dtype=dense.type.dtype)
    return b.emit("constant", value=dense)


@register_pass
@dataclass(frozen=True)
class Fold(Pass):
    """Fold constants where the result is exact."""

    name: ClassVar[str] = "fold"

    def apply(self, program: Program) -> Program:
        return program.map_graphs(fold_constants, str(self))
