"""Times of a graph's nodes where they run: its generated code with a clock after every line.

A node measured alone, again and again, finds its inputs, its code and the memory of its result in cache, and takes as
little as half of what it takes among others. So whole graphs run here, on random inputs, and each node's time is taken
in passing. Sums of these times agree with the time of the graph without clocks to about a per cent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median_low
from typing import Any

import torch

from daggc.backend import kernels
from daggc.backend.codegen import compile_graph
from daggc.errors import RunError
from daggc.ir.graph import Graph, Port
from daggc.runtime.devices import own_device

_POLLUTION = 1 << 22  # numbers that are touched before each run: between tasks, others use the caches too
_LEAST_ROUNDS = 4  # the first is not counted: kernels are compiled, buffers mapped


@dataclass(frozen=True)
class NodeTimes:
    """Measured seconds of a graph's nodes.

    Attributes:
        seconds: one for each node: the median of the rounds, or the lower of two; empty if the graph could not be
            run on random inputs.
        rounds: how often it ran.
        error: why it could not be run.
    """

    seconds: tuple[float, ...]
    rounds: int = 0
    error: str = ""


def time_graphs(graphs: Sequence[Graph], seconds: float, rounds: int = 7) -> list[NodeTimes]:
    """Run graphs in turn, ``rounds`` times or for so many seconds; runs on a worker.

    Each runs at least four times, however long that takes.
    """
    device = own_device()
    clock = Clock(device)
    clocked: list[Clocked | None] = []
    errors: list[str] = []
    for graph in graphs:
        made, error = _prepared(graph, device, clock)
        clocked.append(made)
        errors.append(error)
    pollution = torch.zeros(_POLLUTION)
    end = time.perf_counter() + seconds
    for number in range(rounds):
        for index, each in enumerate(clocked):
            if each is not None and (number < _LEAST_ROUNDS or time.perf_counter() < end):
                pollution.add_(1)
                try:
                    each.run()
                except Exception as wrong:  # random inputs are not to a graph's liking
                    clocked[index], errors[index] = None, f"{type(wrong).__name__}: {wrong}"
    return [
        NodeTimes((), 0, error) if each is None else each.times() for each, error in zip(clocked, errors, strict=True)
    ]


def _prepared(graph: Graph, device: torch.device, clock: Clock) -> tuple[Clocked | None, str]:
    try:
        return Clocked(graph, device, clock), ""
    except Exception as wrong:
        return None, f"{type(wrong).__name__}: {wrong}"


class Clock:
    """Marks moments on a device.

    On a GPU by events, which are read when all is done. On a CPU by the time that the thread itself has been
    computing, which other processes on the machine do not add to; with several threads, by wall time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mark: Callable[[], Any] = _event if device.type == "cuda" else _cpu_clock()

    def between(self, marks: Sequence[Any]) -> list[float]:
        """Seconds from each mark to the next."""
        if self.device.type != "cuda":
            return [end - start for start, end in pairwise(marks)]
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]


def _cpu_clock() -> Callable[[], float]:
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Clocked:
    """A graph's function with a clock after every node, and inputs for it."""

    def __init__(self, graph: Graph, device: torch.device, clock: Clock) -> None:
        self._graph, self._device, self._clock = graph, device, clock
        self._marks: list[list[Any]] = []
        self._function = with_clocks(graph, clock.mark, self._marks.append)
        generator = torch.Generator().manual_seed(0)
        self._inputs = [random_input(port, generator).to(device) for port in graph.inputs]

    def run(self) -> None:
        """Run once; the results are dropped."""
        with torch.no_grad():
            self._function(self._device, *self._inputs)
        self._marks[-1] = self._clock.between(self._marks[-1])

    def times(self) -> NodeTimes:
        counted = self._marks[1:] or self._marks
        return NodeTimes(tuple(max(median_low(each), 1e-8) for each in zip(*counted, strict=True)), len(self._marks))


def with_clocks(graph: Graph, mark: Callable[[], Any], done: Callable[[list[Any]], None]) -> Callable[..., Any]:
    """The function of a graph, which calls ``mark()`` before the first node and after each, and gives them to ``done``.

    What a node's line leaves to be deleted counts as its own time.

    Raises:
        RunError: the generated code is not one line a node.
    """
    source = compile_graph(graph).source
    *inner, main = source.split("\n\n")
    lines = main.splitlines()
    body = [lines[0], "    marks_ = [mark_()]"]
    nodes = 0
    for index, line in enumerate(lines[1:], 1):
        if line.startswith("    return "):
            body += ["    done_(marks_)", line]
            continue
        body.append(line)
        nodes += not line.startswith("    del ")
        if not lines[index + 1].startswith("    del "):
            body.append("    marks_.append(mark_())")
    if nodes != len(graph.nodes):
        raise RunError(f"@{graph.name} has {len(graph.nodes)} nodes, its code {nodes} lines")
    scope: dict[str, Any] = {"torch": torch, "kernels": kernels, "mark_": mark, "done_": done}
    exec(compile("\n\n".join([*inner, "\n".join(body)]), f"<daggc {graph.name} with clocks>", "exec"), scope)
    return scope[lines[0].removeprefix("def ").partition("(")[0]]


def random_input(port: Port, generator: torch.Generator) -> torch.Tensor:
    """Numbers that any graph is likely to take: floats that neither grow nor vanish on their way, indices 0 and 1."""
    type_ = port.value.type
    dtype: torch.dtype = getattr(torch, _TORCH[type_.dtype])
    if type_.dtype == "bool":
        return torch.rand(type_.shape, generator=generator) < 0.5
    if type_.is_integer:
        return torch.randint(0, 2, type_.shape, generator=generator).to(dtype)
    if not type_.shape:  # a rate, a step's number, a factor
        return torch.ones((), dtype=dtype)
    numbers = torch.randn(type_.shape, generator=generator)
    if port.kind == "param" and type_.rank >= 2:
        numbers *= (type_.shape[0] / max(type_.numel, 1)) ** 0.5
    return (numbers.abs() if port.kind in ("state", "buffer") else numbers).to(dtype)


_TORCH = {
    "f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32",
    "i16": "int16", "i8": "int8", "u8": "uint8", "bool": "bool", "c64": "complex64", "c128": "complex128",
}  # fmt: skip
