"""Run a program's graphs in this process: a graph of ops as one function, a plan call by call."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch

from daggc.backend.codegen import compile_graph
from daggc.ir.graph import Graph, Node, Program

Tensors = Sequence[torch.Tensor]
Device = torch.device | str
Action = TypeVar("Action")


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

    def act(node: Node, arguments: Tensors, last: Collection[str]) -> Tensors:
        if node.op != "call":
            return arguments
        start = time.time()
        free = [at for at, value in enumerate(node.inputs) if value.name in last and value.name in owned]
        results = run_graph(program, program[str(node.attrs["callee"])], arguments, device, free)
        if ran is not None:
            ran(node, start)
        return results

    steps = [(node, [v.name for v in node.inputs], [v.name for v in node.outputs]) for node in nodes]
    in_turn(steps, values, wanted, act)


def in_turn(
    steps: Sequence[tuple[Action, Sequence[str], Sequence[str]]],
    values: dict[str, torch.Tensor],
    wanted: Collection[str],
    act: Callable[[Action, Tensors, Collection[str]], Tensors],
) -> None:
    """Do one thing after the other, each on values that are there by then, and drop what no later one reads.

    Args:
        steps: what is to be done, the names of the values it reads, and of those it makes.
        values: by name; what is made is added.
        wanted: names of values that are kept.
        act: does it: ``act(what, arguments, names of those that nobody needs any more)``.
    """
    last = {name: index for index, (_, reads, makes) in enumerate(steps) for name in (*makes, *reads)}
    for index, (what, reads, makes) in enumerate(steps):
        over = {name for name in (*reads, *makes) if last[name] == index and name not in wanted}
        results = act(what, [values[name] for name in reads], over)
        values.update(zip(makes, results, strict=True))
        del results
        for name in over:
            values.pop(name, None)
