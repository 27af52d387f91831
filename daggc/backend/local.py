"""Run a program's graphs in this process: a graph of ops as one function, a plan call by call."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

import torch

from daggc.backend.codegen import compile_graph
from daggc.ir.graph import Graph, Node, Program

Tensors = Sequence[torch.Tensor]
Device = torch.device | str


def run_graph(
    program: Program, graph: Graph, tensors: Tensors, device: Device = "cpu", donated: Sequence[int] = ()
) -> tuple[torch.Tensor, ...]:
    """Run one graph of a program on tensors in the order of its inputs.

    A placed graph (of ``call`` and ``transfer`` nodes) runs here as it would on workers, one call after the
    other; every device stands for this process's ``device``. A graph of ops may overwrite the tensors at the positions
    ``donated``.
    """
    if not any(node.op == "call" for node in graph.nodes):
        return compile_graph(graph, donated, program.codegen)(tensors, device)
    values = {port.value.name: tensor for port, tensor in zip(graph.inputs, tensors, strict=True)}
    run_calls(program, graph.nodes, values, {port.value.name for port in graph.outputs}, device)
    return tuple(values[port.value.name] for port in graph.outputs)


def run_calls(
    program: Program,
    nodes: Sequence[Node],
    values: dict[str, torch.Tensor],
    wanted: Collection[str],
    device: Device,
    owned: Collection[str] = (),
    ran: Callable[[Node, float], None] | None = None,
) -> None:
    """Run ``call`` and ``transfer`` nodes one after the other.

    Args:
        values: by name; results are added, and what no later node reads is dropped.
        wanted: names of values that are kept.
        owned: names of values whose memory the last call that reads them may overwrite.
        ran: is told each call that has run, and when it began (seconds since the epoch).
    """
    last = {value.name: index for index, node in enumerate(nodes) for value in (*node.outputs, *node.inputs)}
    for index, node in enumerate(nodes):
        arguments = [values[value.name] for value in node.inputs]
        start = time.time()
        if node.op == "call":
            last_reads = (at for at, value in enumerate(node.inputs) if last[value.name] == index)
            donated = [at for at in last_reads if (name := node.inputs[at].name) in owned and name not in wanted]
            results = run_graph(program, program[str(node.attrs["callee"])], arguments, device, donated)
            if ran is not None:
                ran(node, start)
        else:
            results = (arguments[0],)
        del arguments
        values.update(zip((value.name for value in node.outputs), results, strict=True))
        del results
        for value in (*node.inputs, *node.outputs):
            if last[value.name] == index and value.name not in wanted:
                values.pop(value.name, None)
