"""The structural difference of two programs: what they compute, not how their values are named.

Nodes are matched in order by op, attributes and types (:mod:`difflib`), so that a renamed value is no
difference; nodes that match but read other values are reported as rewired.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher

from daggc.ir.graph import Graph, Node, Program
from daggc.ir.printer import print_node


def diff_programs(a: Program, b: Program) -> list[str]:
    """Lines of the difference: ``-`` only in ``a``, ``+`` only in ``b``, ``~`` rewired. Empty if there is none."""
    lines: list[str] = []
    for name in dict.fromkeys((*a.graphs, *b.graphs)):
        if name not in b.graphs or name not in a.graphs:
            mark, graphs = ("-", a.graphs) if name in a.graphs else ("+", b.graphs)
            lines.append(f"{mark} graph @{name}, {len(graphs[name].nodes)} nodes")
            continue
        changes = list(_diff_graphs(a.graphs[name], b.graphs[name]))
        if changes:
            lines += [f"graph @{name}", *(f"  {change}" for change in changes)]
    for role, before, after in (("in_tree", a.in_tree, b.in_tree), ("out_tree", a.out_tree, b.out_tree)):
        if before != after:
            lines += [f"- {role} {before}", f"+ {role} {after}"]
    if dict(a.tied) != dict(b.tied):
        lines += [f"- tied {dict(a.tied)}", f"+ tied {dict(b.tied)}"]
    return lines


def _diff_graphs(a: Graph, b: Graph) -> Iterator[str]:
    same: dict[str, str] = {}  # value of a -> value of b
    inputs = {port.ref: port for port in b.inputs}
    for port in a.inputs:
        other = inputs.pop(port.ref, None)
        if other is None or other.value.type != port.value.type:
            yield f"- input {port.ref}: {port.value.type}"
            if other is not None:
                yield f"+ input {other.ref}: {other.value.type}"
        if other is not None:
            same[port.value.name] = other.value.name
    yield from (f"+ input {port.ref}: {port.value.type}" for port in inputs.values())
    matcher = SequenceMatcher(None, [_kind(n) for n in a.nodes], [_kind(n) for n in b.nodes], autojunk=False)
    for tag, first, last, start, end in matcher.get_opcodes():
        if tag != "equal":
            yield from (f"- {print_node(node)}" for node in a.nodes[first:last])
            yield from (f"+ {print_node(node)}" for node in b.nodes[start:end])
            continue
        for before, after in zip(a.nodes[first:last], b.nodes[start:end], strict=True):
            for old, new in zip(before.outputs, after.outputs, strict=True):
                same[old.name] = new.name
            if [same.get(value.name) for value in before.inputs] != [value.name for value in after.inputs]:
                yield f"~ {print_node(before)}  ->  ({', '.join(map(str, after.inputs))})"
    outputs = {port.ref: port for port in b.outputs}
    for port in a.outputs:
        other = outputs.pop(port.ref, None)
        if other is None:
            yield f"- output {port.ref}"
        elif same.get(port.value.name) != other.value.name:
            yield f"~ output {port.ref} {port.value}  ->  {other.value}"
    yield from (f"+ output {ref}" for ref in outputs)


def _kind(node: Node) -> tuple[object, ...]:
    types = tuple(str(value.type) for value in (*node.inputs, *node.outputs))
    return node.op, str(node.attrs), types
