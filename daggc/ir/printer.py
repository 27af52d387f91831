"""Text of a program. Stable, so that it diffs and serves as a snapshot; ``parse`` reads it back exactly.

daggc 1
provenance "capture"
tied "lm_head.weight" = "wte.weight"

graph @forward(
  %w: f32[4,3] param "fc.weight",
  %x: f32[2,3] input "x"
) -> (
  %y output "0"
) {
  %t: f32[3,4] = permute(%w) {dims=[1, 0]}
  %y: f32[2,4] = matmul(%x, %t) !path "fc" !src "mlp.py:12" !of "y"
}
"""

from __future__ import annotations

import json

from daggc.ir.attrs import Attr, format_attr
from daggc.ir.graph import Graph, Node, Program


def print_program(program: Program) -> str:
    lines = [f"daggc {program.version}"]
    lines += [f"provenance {json.dumps(step)}" for step in program.provenance]
    if program.in_tree is not None:
        lines.append(f"in_tree {program.in_tree}")
    if program.out_tree is not None:
        lines.append(f"out_tree {program.out_tree}")
    lines += [f"tied {json.dumps(alias)} = {json.dumps(name)}" for alias, name in program.tied.items()]
    blocks = ["\n".join(lines)] + [print_graph(graph) for graph in program.graphs.values()]
    return "\n\n".join(blocks) + "\n"


def print_graph(graph: Graph) -> str:
    inputs = ",\n".join(
        f"  {port.value}: {port.value.type} {port.kind} {json.dumps(port.target)}" for port in graph.inputs
    )
    outputs = ",\n".join(f"  {port.value} {port.kind} {json.dumps(port.target)}" for port in graph.outputs)
    header = f"graph @{graph.name}({_block(inputs)}) -> ({_block(outputs)}) {{"
    lines = "\n".join(map(print_node, graph.nodes)).replace("\n", "\n  ")
    return "\n".join([header, *([f"  {lines}"] if lines else []), "}"])


def print_node(node: Node) -> str:
    results = ", ".join(f"{value}: {value.type}" for value in node.outputs)
    text = f"{results} = {node.op}({', '.join(map(str, node.inputs))})"
    if node.attrs:
        text += f" {{{', '.join(f'{name}={_print_attr(value)}' for name, value in node.attrs.items())}}}"
    notes = (("path", node.path), ("src", node.source), ("of", node.origin))
    return text + "".join(f" !{key} {json.dumps(note)}" for key, note in notes if note)


def _print_attr(value: Attr) -> str:
    return print_graph(value) if isinstance(value, Graph) else format_attr(value)


def _block(text: str) -> str:
    return f"\n{text}\n" if text else ""
