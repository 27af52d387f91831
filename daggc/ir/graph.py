"""Values, nodes, ports, graphs and programs: the immutable data that every stage passes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from daggc.errors import IRError
from daggc.ir.attrs import NO_ATTRS, Attrs, Nested
from daggc.ir.tree import Tree
from daggc.ir.types import TensorType

IR_VERSION = 1


@dataclass(frozen=True, slots=True)
class Value:
    """An SSA value: a name, unique in its graph, and a type."""

    name: str
    type: TensorType

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True, slots=True)
class Node:
    """``outputs = op(inputs) {attrs}``.

    Attributes:
        path: the user's module path, such as ``blocks.3.mlp``; empty if unknown.
        source: the user's source line, such as ``gpt.py:41``; empty if unknown.
        origin: the name of the first output of the forward node this one computes or differentiates.
            A planner places a cotangent where its primal is, by this name.
    """

    op: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    attrs: Attrs = NO_ATTRS
    path: str = ""
    source: str = ""
    origin: str = ""

    @property
    def output(self) -> Value:
        """The only output. Raises IRError if there are more."""
        if len(self.outputs) != 1:
            raise IRError(f"{self.op} has {len(self.outputs)} outputs, one was asked for")
        return self.outputs[0]

    def holds(self, *ops: str) -> bool:
        """Whether the node, or one in the graphs inside it, is of one of these ops."""
        return self.op in ops or any(node.holds(*ops) for graph in self.attrs.graphs for node in graph.nodes)


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a graph: a value and what it stands for.

    ``kind`` and ``target`` of an input: ``param`` or ``buffer`` or ``constant`` and the model's own name;
    ``input`` and its path in the arguments' pytree; ``cotangent`` and the ``ref`` of the output it belongs
    to; ``residual``; ``key`` (of random ops); ``state`` (of an optimizer); ``scalar`` (a number fixed when a
    step is submitted). Of an output: ``output``, ``buffer`` and ``input`` (their new values), ``attribute`` (what a
    call leaves on the model) and the attribute's path, ``grad`` and the ``ref`` of the input it belongs to,
    ``residual``, ``param`` and ``state`` (their new values).
    """

    value: Value
    kind: str
    target: str

    @property
    def ref(self) -> str:
        return f"{self.kind}:{self.target}"


@dataclass(frozen=True)
class Graph(Nested):
    """Nodes in SSA order between input and output ports.

    A graph may be an attribute of a node of another (a branch of ``cond``): it reads its own inputs only.
    """

    name: str
    inputs: tuple[Port, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Port, ...]

    def values(self) -> Iterator[Value]:
        """Every value, in order of definition."""
        for port in self.inputs:
            yield port.value
        for node in self.nodes:
            yield from node.outputs

    def walk(self) -> Iterator[Node]:
        """Every node, those of graphs inside a node after it."""
        for node in self.nodes:
            yield node
            for graph in node.attrs.graphs:
                yield from graph.walk()

    def map_nested(self, function: Callable[[Graph], Graph]) -> Graph:
        """The graph with ``function`` applied to all graphs inside its nodes, innermost first."""
        if not any(node.attrs.graphs for node in self.nodes):
            return self

        def mapped(node: Node) -> Node:
            if not node.attrs.graphs:
                return node
            graphs = {
                name: function(value.map_nested(function))
                for name, value in node.attrs.items()
                if isinstance(value, Graph)
            }
            return replace(node, attrs=Attrs({**node.attrs, **graphs}))

        return replace(self, nodes=tuple(map(mapped, self.nodes)))

    def inputs_of(self, *kinds: str) -> tuple[Port, ...]:
        return tuple(port for port in self.inputs if port.kind in kinds)

    def outputs_of(self, *kinds: str) -> tuple[Port, ...]:
        return tuple(port for port in self.outputs if port.kind in kinds)

    def users(self) -> dict[str, list[Node]]:
        """For each value's name, the nodes that read it, each once, in order."""
        users: dict[str, list[Node]] = {value.name: [] for value in self.values()}
        for node in self.nodes:
            for name in dict.fromkeys(value.name for value in node.inputs):
                users[name].append(node)
        return users

    def structure(self) -> str:
        """A hash of what the graph computes: no names of values, no paths, no sources, no targets.

        Two transformer blocks have the same structure, and share one compiled function.
        """
        return self._structure

    @cached_property
    def _structure(self) -> str:
        number: dict[str, int] = {}
        lines: list[str] = []
        for port in self.inputs:
            number[port.value.name] = len(number)
            lines.append(str(port.value.type))
        for node in self.nodes:
            args = ",".join(str(number[value.name]) for value in node.inputs)
            types = ",".join(str(value.type) for value in node.outputs)
            for value in node.outputs:
                number[value.name] = len(number)
            lines.append(f"{types}={node.op}({args}){{{node.attrs}}}")
        lines.append(",".join(str(number[port.value.name]) for port in self.outputs))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Program:
    """Named graphs and what is needed to call them.

    Attributes:
        graphs: by name; ``forward`` and, after ``vjp``, ``backward``; a plan has ``main`` and task bodies.
        in_tree: the pytree of ``(args, kwargs)``, whose leaves are ``forward``'s ``input`` ports in order.
        out_tree: the pytree of the result, whose leaves are the ``output`` ports in order.
        tied: other names of a parameter or buffer -> the one name that has a port.
        provenance: the passes that made this program, oldest first.
        codegen: what makes code of the graphs: ``torch``, or ``inductor`` on top; says how they run, not what they
            compute, and is not part of a file.
    """

    graphs: Mapping[str, Graph]
    in_tree: Tree | None = None
    out_tree: Tree | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    provenance: tuple[str, ...] = ()
    version: int = IR_VERSION
    codegen: str = "torch"

    def __getitem__(self, name: str) -> Graph:
        try:
            return self.graphs[name]
        except KeyError:
            raise IRError(f"the program has no graph @{name}; it has {', '.join(self.graphs) or 'none'}") from None

    @property
    def forward(self) -> Graph:
        return self["forward"]

    @property
    def backward(self) -> Graph:
        return self["backward"]

    @property
    def portable(self) -> bool:
        """Whether no node needs torch's op set or a Python function of the user's."""
        return not any(node.holds("torch.call", "python.call") for g in self.graphs.values() for node in g.nodes)

    def with_graphs(self, *graphs: Graph, provenance: str = "") -> Program:
        """A copy with graphs added, or replaced by name."""
        merged = {**self.graphs, **{graph.name: graph for graph in graphs}}
        history = (*self.provenance, provenance) if provenance else self.provenance
        return replace(self, graphs=merged, provenance=history)

    def map_graphs(self, function: Callable[[Graph], Graph], provenance: str) -> Program:
        """A copy whose every graph, those inside nodes first, went through ``function``."""
        graphs = {name: function(graph.map_nested(function)) for name, graph in self.graphs.items()}
        return replace(self, graphs=graphs, provenance=(*self.provenance, provenance))
