"""Graph -> Python source over torch -> a function.

The source is readable, one line a node with the user's module path and source line beside it; values are
deleted after their last use; tracebacks show it (``linecache``), and an error in it names the user's line.
Graphs of one structure share one function.
"""

from __future__ import annotations

import builtins
import keyword
import linecache
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from daggc.backend import kernels
from daggc.backend.inductor import inductor
from daggc.backend.inplace import in_place, written
from daggc.errors import DaggcError, IRError, RunError, located
from daggc.ir.graph import Graph, Node, Value
from daggc.ops import REGISTRY


@dataclass(frozen=True)
class Compiled:
    """A graph as a function of torch tensors.

    Attributes:
        source: the generated Python.
        function: ``(device, *inputs) -> tuple of outputs``, in the order of the graph's ports.
    """

    graph: Graph
    source: str
    filename: str
    function: Callable[..., tuple[torch.Tensor, ...]]

    def __call__(self, inputs: Sequence[torch.Tensor], device: torch.device | str = "cpu") -> tuple[torch.Tensor, ...]:
        """Run on tensors in the order of the graph's input ports.

        Raises RunError naming the user's module and source line of the node that failed.
        """
        try:
            # casts are in the graph: autocast around the call has nothing to add
            with torch.no_grad(), torch._C._DisableAutocast():
                return self.function(torch.device(device), *inputs)
        except DaggcError:
            raise
        except Exception as wrong:
            raise RunError(f"{type(wrong).__name__}: {wrong}{self._blame(wrong)}") from wrong

    def _blame(self, wrong: BaseException) -> str:
        """The node whose generated line is in the traceback."""
        trace = wrong.__traceback__
        lines = self.source.splitlines()
        found = ""
        while trace is not None:  # the innermost: inside a branch, not at the node that has it
            if trace.tb_frame.f_code.co_filename == self.filename:
                found = f"\n  in generated code, line {trace.tb_lineno}: {lines[trace.tb_lineno - 1].strip()}"
            trace = trace.tb_next
        return found


_CACHE: OrderedDict[str, Compiled] = OrderedDict()
_CACHE_SIZE = 1024  # functions kept in one process, the latest used


def compile_graph(graph: Graph, donated: Sequence[int] = (), codegen: str = "torch") -> Compiled:
    """The function of a graph; graphs of one structure share it.

    Args:
        donated: positions of inputs that the function may overwrite; see :func:`daggc.backend.inplace.in_place`.
        codegen: ``inductor`` passes the code through ``torch.compile``; see :mod:`daggc.backend.inductor`.
    """
    key = graph.structure() + "".join(f" {at}" for at in donated) + ("" if codegen == "torch" else f" {codegen}")
    if key not in _CACHE:
        source = generate(graph, donated)
        filename = f"<daggc {graph.name} {key}>"

        def build(namespace: object) -> Callable[..., tuple[torch.Tensor, ...]]:
            scope: dict[str, object] = {"torch": torch, "kernels": namespace}
            exec(compile(source, filename, "exec"), scope)
            return cast(Callable[..., tuple[torch.Tensor, ...]], scope[_function_name(graph)])

        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        function = build(kernels)
        if codegen == "inductor":
            function = inductor(graph, function, build)
        _CACHE[key] = Compiled(graph, source, filename, function)
        if len(_CACHE) > _CACHE_SIZE:
            _, oldest = _CACHE.popitem(last=False)
            linecache.cache.pop(oldest.filename, None)
    _CACHE.move_to_end(key)
    return _CACHE[key]


def generate(graph: Graph, donated: Sequence[int] = ()) -> str:
    """The Python source of a graph: ``def name(device, *inputs)`` that returns a tuple.

    Graphs inside its nodes are functions of their own, defined before it. Inputs are not changed, but those at the
    positions ``donated``.
    """
    functions: list[str] = []
    _generate(graph, _function_name(graph), functions, donated)
    return "\n\n".join(functions)


def _generate(graph: Graph, function: str, functions: list[str], donated: Sequence[int] = ()) -> None:
    """Append the source of a graph's function, after those of the graphs inside."""
    inner: dict[int, list[str]] = {}
    for index, node in enumerate(graph.nodes):
        for nested in node.attrs.graphs:
            inner.setdefault(index, []).append(f"{function}__{sum(map(len, inner.values()))}")
            _generate(nested, inner[index][-1], functions)
    names = _names(graph, {name for nested in inner.values() for name in nested})
    last_use = _last_uses(graph)
    into = in_place(graph, {graph.inputs[at].value.name for at in donated})
    parameters = ", ".join(["device", *(names[port.value.name] for port in graph.inputs)])
    lines = [f"def {function}({parameters}):"]
    for index, node in enumerate(graph.nodes):
        op = REGISTRY[node.op]
        _refuse_code(node)
        arguments = [*inner.get(index, ()), *(names[value.name] for value in node.inputs)]
        expression = op.lower(node, arguments)
        if index in into:
            expression = written(node, arguments, expression)
        targets = ", ".join(names[value.name] for value in node.outputs)
        if len(node.outputs) == 1 and expression.startswith("("):
            expression = expression.strip()
        comment = _printable(located("", node.path, node.source).strip(" ()"))
        lines.append(f"    {targets} = {expression}" + (f"  # {comment}" if comment else ""))
        dead = [names[name] for name in last_use.get(index, ())]
        if dead:
            lines.append(f"    del {', '.join(dead)}")
    results = "".join(f"{names[port.value.name]}, " for port in graph.outputs)
    lines.append(f"    return ({results.rstrip()})" if results else "    return ()")
    functions.append("\n".join(lines) + "\n")


# Programs come from files, and attributes end up in source: no text that could call anything may get there.
_HARMLESS = re.compile(r"[\w.,:>\- ]*")
_QUOTED = ("call", "check", "python.call", "torch.call")  # their lowering writes attributes as literals only


def _refuse_code(node: Node) -> None:
    if node.op in _QUOTED:
        return
    pending = list(node.attrs.values())
    while pending:
        value = pending.pop()
        if isinstance(value, tuple):
            pending += value
        elif isinstance(value, str) and not _HARMLESS.fullmatch(value):
            raise IRError(located(f"{node.op}: not an attribute of any op: {value!r}", node.path, node.source))


def _last_uses(graph: Graph) -> dict[int, list[str]]:
    """For each node's index, the values that nothing reads after it."""
    last: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        for value in (*node.outputs, *node.inputs):
            last[value.name] = index
    for port in graph.outputs:
        last.pop(port.value.name, None)
    dead: dict[int, list[str]] = {}
    for name, index in last.items():
        dead.setdefault(index, []).append(name)
    return dead


_RESERVED = frozenset((*dir(builtins), "device", "graphs", "kernels", "torch"))  # what generated code refers to


def _names(graph: Graph, functions: set[str]) -> dict[str, str]:
    """A distinct Python identifier for each value, none of them a function's."""
    names: dict[str, str] = {}
    taken = {*_RESERVED, *functions}
    for value in graph.values():
        names[value.name] = name = _distinct(value, taken)
        taken.add(name)
    return names


def _distinct(value: Value, taken: set[str]) -> str:
    stem = _identifier(value.name)
    name, count = stem, 1
    while name in taken:
        name, count = f"{stem}_{count}", count + 1
    return name


def _function_name(graph: Graph) -> str:
    name = _identifier(graph.name)
    return f"{name}_" if name in _RESERVED else name


def _printable(note: str) -> str:
    """Notes come from files: a line break in one must not end its comment."""
    return "".join(letter if letter.isprintable() else " " for letter in note)


def _identifier(name: str) -> str:
    # ASCII only: Python takes some different letters in identifiers for the same
    name = re.sub(r"\W", "_", name, flags=re.ASCII)
    return f"_{name}" if not name or name[0].isdigit() or keyword.iskeyword(name) else name
