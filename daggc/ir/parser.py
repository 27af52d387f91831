"""Text to program: a recursive-descent parser of what the printer writes. Nothing is imported or run."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass

import numpy as np

from daggc.errors import IRError
from daggc.ir.attrs import NO_ATTRS, Attr, Attrs, Dense
from daggc.ir.graph import IR_VERSION, Graph, Node, Port, Program, Value
from daggc.ir.tree import Tree, tree_from_json
from daggc.ir.types import TensorType

_TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*)
      | (?P<string>"(?:[^"\\]|\\.)*")
      | (?P<value>%[\w.$]+)
      | (?P<graph>@[\w.$]+)
      | (?P<note>![a-z]+)
      | (?P<number>-?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|inf\b))
      | (?P<word>[A-Za-z_][\w.]*)
      | (?P<punct>->|[(){}\[\],:=<>@])""",
    re.VERBOSE,
)
_TYPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\](?:@([\w.:-]+))?")
NAME = re.compile(r"[\w.$]+")  # of values and graphs
WORD = re.compile(r"[A-Za-z_][\w.]*")  # of ops, attributes and kinds of ports
_NOTES = {"!path": "path", "!src": "source", "!of": "origin"}


def parse(text: str) -> Program:
    """Read a program. Raises IRError naming the line of the first thing that is wrong."""
    parser = _Parser(text)
    try:
        return parser.program()
    except RecursionError:
        raise parser.error("lists are nested too deeply") from None


def parse_type(text: str) -> TensorType:
    """Read ``f32[8,128]@cpu:0``."""
    match = _TYPE.fullmatch(text)
    if match is None:
        raise IRError(f"not a tensor type: {text!r}; one looks like f32[8,128] or i64[]@cpu:0")
    return _type_of(match)


def _type_of(match: re.Match[str]) -> TensorType:
    dtype, shape, device = match.groups()
    try:
        sizes = tuple(int(size) for size in shape.split(",") if size)
    except ValueError as wrong:  # more digits than Python converts
        raise IRError(str(wrong)) from None
    return TensorType(dtype, sizes, device)


@dataclass(slots=True)
class _Parser:
    text: str
    at: int = 0

    # --- tokens ---------------------------------------------------------------------------------------

    def peek(self) -> tuple[str, str]:
        """The next token's kind and text, comments and white space skipped; kind ``end`` at the end."""
        while True:
            match = _TOKEN.match(self.text, self.at)
            if match is None:
                if self.at >= len(self.text):
                    return "end", "the end of the text"
                raise self.error(f"unexpected character {self.text[self.at]!r}")
            if match.lastgroup != "skip":
                return str(match.lastgroup), match.group()
            self.at = match.end()

    def next(self, kind: str) -> str:
        found, token = self.peek()
        if found != kind:
            raise self.error(f"a {kind} was expected, got {token!r}")
        self.at += len(token)
        return token

    def accept(self, token: str) -> bool:
        if self.peek()[1] != token:
            return False
        self.at += len(token)
        return True

    def expect(self, token: str) -> None:
        if not self.accept(token):
            raise self.error(f"{token!r} was expected, got {self.peek()[1]!r}")

    def string(self) -> str:
        token = self.next("string")
        try:
            return json.loads(token)
        except ValueError:
            raise self.error(f"{token} is not a string") from None

    def error(self, message: str) -> IRError:
        line = self.text.count("\n", 0, self.at) + 1
        shown = self.text.split("\n")[line - 1].strip()
        return IRError(f"line {line}: {message}\n  {line} | {shown[:160]}")

    # --- program --------------------------------------------------------------------------------------

    def program(self) -> Program:
        self.expect("daggc")
        version = self.number()
        if version != IR_VERSION:
            raise self.error(f"this is IR version {version}; this daggc reads version {IR_VERSION}")
        provenance: list[str] = []
        trees: dict[str, Tree] = {}
        tied: dict[str, str] = {}
        while (word := self.peek()[1]) in ("provenance", "in_tree", "out_tree", "tied"):
            self.expect(word)
            if word == "provenance":
                provenance.append(self.string())
            elif word == "tied":
                alias = self.string()
                self.expect("=")
                tied[alias] = self.string()
            else:
                trees[word] = self.tree()
        graphs: dict[str, Graph] = {}
        while self.peek()[0] != "end":
            graph = self.graph()
            if graph.name in graphs:
                raise self.error(f"graph @{graph.name} is defined twice")
            graphs[graph.name] = graph
        return Program(graphs, trees.get("in_tree"), trees.get("out_tree"), tied, tuple(provenance))

    def tree(self) -> Tree:
        self.peek()
        try:
            data, end = json.JSONDecoder().raw_decode(self.text, self.at)
        except ValueError as wrong:
            raise self.error(f"not a pytree: {wrong}") from None
        try:
            tree = tree_from_json(data)
        except IRError as wrong:
            raise self.error(str(wrong)) from None
        self.at = end
        return tree

    def graph(self) -> Graph:
        self.expect("graph")
        name = self.next("graph")[1:]
        values: dict[str, Value] = {}
        inputs: list[Port] = []
        self.expect("(")
        while not self.accept(")"):
            if inputs:
                self.expect(",")
            value = self.definition(values)
            inputs.append(Port(value, self.next("word"), self.string()))
        self.expect("->")
        self.expect("(")
        outputs: list[tuple[str, str, str]] = []
        while not self.accept(")"):
            if outputs:
                self.expect(",")
            outputs.append((self.next("value")[1:], self.next("word"), self.string()))
        self.expect("{")
        nodes: list[Node] = []
        while not self.accept("}"):
            nodes.append(self.node(values))
        ports = tuple(Port(self.lookup(values, name), kind, target) for name, kind, target in outputs)
        return Graph(name, tuple(inputs), tuple(nodes), ports)

    def node(self, values: dict[str, Value]) -> Node:
        outputs: list[Value] = []
        defined: dict[str, Value] = {}
        while not self.accept("="):
            if outputs:
                self.expect(",")
            outputs.append(self.definition(values, defined))
        op = self.next("word")
        self.expect("(")
        inputs: list[Value] = []
        while not self.accept(")"):
            if inputs:
                self.expect(",")
            inputs.append(self.lookup(values, self.next("value")[1:]))
        attrs = self.attrs() if self.accept("{") else NO_ATTRS
        notes: dict[str, str] = {}
        while self.peek()[0] == "note":
            mark = self.next("note")
            if mark not in _NOTES:
                raise self.error(f"{mark} is not one of {', '.join(_NOTES)}")
            notes[_NOTES[mark]] = self.string()
        values.update(defined)
        return Node(op, tuple(inputs), tuple(outputs), attrs, **notes)

    def definition(self, values: dict[str, Value], into: dict[str, Value] | None = None) -> Value:
        """``%name: type``, entered into ``into`` (for a node: after its inputs are read)."""
        into = values if into is None else into
        name = self.next("value")[1:]
        if name in values or name in into:
            raise self.error(f"%{name} is defined twice")
        self.expect(":")
        into[name] = value = Value(name, self.type())
        return value

    def lookup(self, values: dict[str, Value], name: str) -> Value:
        if name not in values:
            raise self.error(f"%{name} is used before it is defined")
        return values[name]

    def type(self) -> TensorType:
        self.peek()
        match = _TYPE.match(self.text, self.at)
        if match is None:
            raise self.error("a tensor type such as f32[8,128] was expected")
        try:
            type_ = _type_of(match)
        except IRError as wrong:
            raise self.error(str(wrong)) from None
        self.at = match.end()
        return type_

    # --- attributes -----------------------------------------------------------------------------------

    def attrs(self) -> Attrs:
        items: dict[str, Attr] = {}
        while not self.accept("}"):
            if items:
                self.expect(",")
            name = self.next("word")
            if name in items:
                raise self.error(f"attribute {name} is given twice")
            self.expect("=")
            items[name] = self.attr()
        return Attrs(items)

    def attr(self) -> Attr:
        kind, token = self.peek()
        if kind == "string":
            return self.string()
        if kind == "number":
            return self.number()
        if token == "[":
            return self.numbers_or_list()
        if token == "dense":
            return self.dense()
        if token == "complex":
            return self.complex_number()
        if token == "graph":
            return self.graph()
        words: dict[str, Attr] = {"None": None, "True": True, "False": False, "nan": math.nan, "inf": math.inf}
        if token in words:
            self.at += len(token)
            return words[token]
        raise self.error(f"an attribute value was expected, got {token!r}")

    def number(self) -> int | float:
        token = self.next("number")
        try:
            return float(token) if any(mark in token for mark in ".eEn") else int(token)
        except ValueError as wrong:  # more digits than Python converts
            raise self.error(str(wrong)) from None

    def numbers_or_list(self) -> tuple[Attr, ...]:
        self.expect("[")
        items: list[Attr] = []
        while not self.accept("]"):
            if items:
                self.expect(",")
            items.append(self.attr())
        return tuple(items)

    def complex_number(self) -> complex:
        """``complex<1.0, -2.5>``."""
        self.expect("complex")
        self.expect("<")
        real = self.attr()
        self.expect(",")
        imag = self.attr()
        self.expect(">")
        if not (isinstance(real, float) and isinstance(imag, float)):
            raise self.error("the parts of a complex attribute are floats")
        return complex(real, imag)

    def dense(self) -> Dense:
        self.expect("dense")
        self.expect("<")
        type_ = self.type()
        self.expect(">")
        if self.peek()[0] == "string":
            try:
                data = bytes.fromhex(self.string())
            except ValueError:
                raise self.error("the bytes of a dense attribute are hexadecimal") from None
        else:
            numbers = self.numbers_or_list()
            allowed = bool | int if type_.is_integer or type_.dtype == "bool" else bool | int | float
            if not all(isinstance(number, allowed) for number in numbers):
                raise self.error(f"a dense {type_} holds numbers of its dtype")
            try:
                data = np.array(numbers, dtype=type_.numpy_dtype).tobytes()
            except (OverflowError, ValueError) as wrong:
                raise self.error(f"a number does not fit {type_}: {wrong}") from None
        try:
            return Dense.from_bytes(type_, data)
        except IRError as wrong:
            raise self.error(str(wrong)) from None
