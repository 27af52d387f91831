"""Peephole rewrites that leave every bit as it was: views of views, moves that move nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from daggc.ir.builder import Builder
from daggc.ir.graph import Graph, Node, Program, Value
from daggc.passes.manager import Pass, register_pass
from daggc.passes.rewrite import rebuild

# (builder, node, its inputs, the node that made the first input or None) -> the value in its place, or None
Rule = Callable[[Builder, Node, Sequence[Value], Node | None], Value | None]


def _reshape(b: Builder, node: Node, inputs: Sequence[Value], maker: Node | None) -> Value | None:
    (x,) = inputs
    shape = node.attrs["shape"]
    if x.type.shape == shape:
        return x
    if maker is not None and maker.op == "reshape":
        source = maker.inputs[0]
        return source if source.type.shape == shape else b.emit("reshape", source, shape=shape)
    return None


def _permute(b: Builder, node: Node, inputs: Sequence[Value], maker: Node | None) -> Value | None:
    dims = node.attrs["dims"]
    (x,) = inputs
    if maker is not None and maker.op == "permute":
        dims = tuple(maker.attrs["dims"][dim] for dim in dims)
        x = maker.inputs[0]
    if dims == tuple(range(len(dims))):
        return x
    return None if x is inputs[0] else b.emit("permute", x, dims=dims)


def _broadcast(b: Builder, node: Node, inputs: Sequence[Value], maker: Node | None) -> Value | None:
    (x,) = inputs
    shape = node.attrs["shape"]
    if x.type.shape == shape:
        return x
    if maker is not None and maker.op == "broadcast":
        return b.emit("broadcast", maker.inputs[0], shape=shape)
    if maker is not None and maker.op == "full":
        return b.emit("full", value=maker.attrs["value"], shape=shape, dtype=maker.attrs["dtype"])
    return None


def _cast(b: Builder, node: Node, inputs: Sequence[Value], maker: Node | None) -> Value | None:
    return inputs[0] if inputs[0].type.dtype == node.attrs["dtype"] else None


def _conj(b: Builder, node: Node, inputs: Sequence[Value], maker: Node | None) -> Value | None:
    return maker.inputs[0] if maker is not None and maker.op == "conj" else None


def _neg(b: Builder, node: Node, inputs: Sequence[Value], maker: Node | None) -> Value | None:
    return maker.inputs[0] if maker is not None and maker.op == "neg" else None


def _unit_scale(b: Builder, node: Node, inputs: Sequence[Value], maker: Node | None) -> Value | None:
    return inputs[0] if node.attrs["value"] == 1 else None


def _concat(b: Builder, node: Node, inputs: Sequence[Value], maker: Node | None) -> Value | None:
    return inputs[0] if len(inputs) == 1 else None


def _slice(b: Builder, node: Node, inputs: Sequence[Value], maker: Node | None) -> Value | None:
    return inputs[0] if node.output.type == inputs[0].type and node.attrs["step"] == 1 else None


RULES: dict[str, Rule] = {
    "reshape": _reshape,
    "permute": _permute,
    "broadcast": _broadcast,
    "cast": _cast,
    "conj": _conj,
    "neg": _neg,
    "mul_scalar": _unit_scale,
    "div_scalar": _unit_scale,
    "concat": _concat,
    "slice": _slice,
}


def simplify_nodes(graph: Graph) -> Graph:
    """Apply the rules once, front to back; a rule sees what earlier ones made of its inputs."""
    makers: dict[str, Node] = {}

    def visit(b: Builder, node: Node, inputs: Sequence[Value]) -> Sequence[Value] | None:
        rule = RULES.get(node.op)
        before = len(b.nodes)
        result = rule(b, node, inputs, makers.get(inputs[0].name)) if rule and inputs else None
        outputs = b.append(node, inputs) if result is None else (result,)
        for made in b.nodes[before:]:
            makers.update((value.name, made) for value in made.outputs)
        return outputs

    return rebuild(graph, visit)


@register_pass
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Views of views become one view; moves that move nothing vanish."""

    name: ClassVar[str] = "canonicalize"

    def apply(self, program: Program) -> Program:
        return program.map_graphs(simplify_nodes, str(self))
