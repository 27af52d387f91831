"""Building graphs: infers types, gives unique names, and keeps provenance of what it emits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from daggc.errors import TypeRuleError, located
from daggc.ir.attrs import Attr, Attrs
from daggc.ir.graph import Graph, Node, Port, Value
from daggc.ir.types import TensorType


class TypeRules(Protocol):
    """What the builder and the verifier need of the op registry."""

    def infer(self, op: str, inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        """The output types. Raises TypeRuleError if the inputs do not fit."""
        ...


class Builder:
    """Appends nodes to a graph under construction.

    ``with builder.at(path=..., source=..., origin=...)`` marks what is emitted inside.
    """

    def __init__(self, rules: TypeRules, name: str) -> None:
        self.rules = rules
        self.name = name
        self._inputs: list[Port] = []
        self._nodes: list[Node] = []
        self._outputs: list[Port] = []
        self._taken: set[str] = set()
        self._reserved: set[str] = set()
        self._counter: dict[str, int] = {}
        self._path = self._source = self._origin = ""
        self._streams = 0

    def input(self, type_: TensorType, kind: str, target: str, name: str = "") -> Value:
        value = Value(self.fresh(name or target or kind), type_)
        self._inputs.append(Port(value, kind, target))
        return value

    def output(self, value: Value, kind: str, target: str) -> None:
        self._outputs.append(Port(value, kind, target))

    def emit(self, op: str, *inputs: Value, name: str = "", **attrs: Attr) -> Value:
        """Append a node of one output."""
        outputs = self.emit_many(op, *inputs, name=name, **attrs)
        if len(outputs) != 1:
            raise TypeRuleError(f"{op} has {len(outputs)} outputs; emit_many is for those")
        return outputs[0]

    def emit_many(self, op: str, *inputs: Value, name: str = "", **attrs: Attr) -> tuple[Value, ...]:
        """Append a node; its output types are inferred. Attributes that are None are kept."""
        frozen = Attrs(attrs)
        try:
            types = self.rules.infer(op, [value.type for value in inputs], frozen)
        except TypeRuleError as wrong:
            raise TypeRuleError(located(str(wrong), self._path, self._source)) from None
        outputs = tuple(Value(self.fresh(name or op), type_) for type_ in types)
        self._nodes.append(Node(op, inputs, outputs, frozen, self._path, self._source, self._origin))
        return outputs

    def append(self, node: Node, inputs: Sequence[Value], rename: bool = False) -> tuple[Value, ...]:
        """Append a copy of a node that reads ``inputs``; output names are kept if free (or not renamed)."""
        outputs = tuple(
            Value(self.fresh(value.name) if rename or value.name in self._taken else self._take(value.name), value.type)
            for value in node.outputs
        )
        self._nodes.append(Node(node.op, tuple(inputs), outputs, node.attrs, node.path, node.source, node.origin))
        self.skip_streams(node)
        return outputs

    def random_key(self) -> Value:
        """The graph's one input of kind ``key``, an ``i64[2]`` of seed and counter; made on first use."""
        for port in self._inputs:
            if port.kind == "key":
                return port.value
        return self.input(TensorType("i64", (2,)), "key", "key")

    def skip_streams(self, node: Node) -> None:
        """Leave out the streams of a node's random numbers in what :meth:`next_stream` gives."""
        self._streams = max(self._streams, node.attrs.get("stream", -1) + 1)
        for graph in node.attrs.graphs:
            for inner in graph.walk():
                self._streams = max(self._streams, inner.attrs.get("stream", -1) + 1)

    def next_stream(self) -> int:
        """A number for the ``stream`` of a random op that no other node of the graph has."""
        self._streams += 1
        return self._streams - 1

    def adopt(self, port: Port) -> Value:
        """Take over an input port of another graph, with its name."""
        name = port.value.name if port.value.name not in self._taken else self.fresh(port.value.name)
        value = Value(self._take(name), port.value.type)
        self._inputs.append(Port(value, port.kind, port.target))
        return value

    def reserve(self, names: Iterable[str]) -> None:
        """Keep names free for values that will be appended later."""
        self._reserved.update(names)

    def fresh(self, hint: str) -> str:
        """A name not in use, made from a hint."""
        stem = re.sub(r"[^\w$]+", "_", hint).strip("_") or "v"
        count = self._counter.get(stem, 0)
        name = stem if count == 0 else f"{stem}_{count}"
        while name in self._taken or name in self._reserved:
            count += 1
            name = f"{stem}_{count}"
        self._counter[stem] = count + 1
        return self._take(name)

    def _take(self, name: str) -> str:
        self._taken.add(name)
        return name

    @contextmanager
    def at(self, path: str = "", source: str = "", origin: str = "") -> Iterator[None]:
        before = self._path, self._source, self._origin
        self._path, self._source, self._origin = path, source, origin
        try:
            yield
        finally:
            self._path, self._source, self._origin = before

    def like(self, name: str) -> Builder:
        """A builder of another graph, of one inside a node of this say."""
        return Builder(self.rules, name)

    @property
    def arity(self) -> int:
        """How many inputs there are so far."""
        return len(self._inputs)

    @property
    def nodes(self) -> Sequence[Node]:
        return self._nodes

    def build(self) -> Graph:
        return Graph(self.name, tuple(self._inputs), tuple(self._nodes), tuple(self._outputs))
