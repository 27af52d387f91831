"""Run a program's graphs in this process: a graph of ops as one function, a plan call by call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from daggc.backend.codegen import compile_graph
from daggc.ir.graph import Graph, Program

Tensors = Sequence[torch.Tensor]


def run_graph(program: Program, graph: Graph, tensors: Tensors, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Run one graph of a program on tensors in the order of its inputs.

    A placed graph (of ``call`` and ``transfer`` nodes) runs here as it would on workers, one call after the
    other; every device stands for this process's ``device``.
    """
    if not any(node.op == "call" for node in graph.nodes):
        return compile_graph(graph)(tensors, device)
    values = {port.value.name: tensor for port, tensor in zip(graph.inputs, tensors, strict=True)}
    for node in graph.nodes:
        arguments = [values[value.name] for value in node.inputs]
        if node.op == "call":
            results = run_graph(program, program[str(node.attrs["callee"])], arguments, device)
        else:
            results = (arguments[0],)
        values.update(zip((value.name for value in node.outputs), results, strict=True))
    return tuple(values[port.value.name] for port in graph.outputs)
