"""What is not a program is an IRError that names the line, never another exception."""

from __future__ import annotations

import contextlib
import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daggc.errors import IRError
from daggc.ir.attrs import NO_ATTRS
from daggc.ir.graph import Graph, Node, Port, Program, Value
from daggc.ir.parser import parse, parse_type
from daggc.ir.printer import print_program
from daggc.ir.serialize import from_json, to_json
from daggc.ir.types import TensorType
from daggc.ir.verifier import verify
from daggc.ops import REGISTRY
from daggc.testing import programs

GOOD = """daggc 1
provenance "capture"
in_tree {"tuple": [{"tuple": ["*"]}, {"dict": []}]}
out_tree "*"
tied "a" = "b"

graph @forward(
  %x: f32[2,3] input "0"
) -> (
  %z output "0"
) {
  %y: f32[2,3] = mul_scalar(%x) {value=2.5} !path "fc" !src "mlp.py:12"
  %c: f32[2,3] = constant() {value=dense<f32[2,3]> [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
  %z: f32[2,3] = add(%y, %c)
}
"""
_TOKENS = re.compile(r"\s+|[\w.%@!]+|.", re.DOTALL)
_COMPLEX = '  %w: c64[2] = full() {dtype="c64", shape=[2], value=complex<1.0, -2.5>}\n'
_JUNK = (
    "complex<",
    "%",
    "@x",
    "1e999",
    "-",
    "{",
    "}",
    "[",
    ")",
    '"',
    '"\\',
    "nan",
    "inf",
    "dense<",
    "!of",
    "\0",
    "é",
    "9" * 5000,
    "//",
)
_MUTATIONS = 8  # mutants of one program


def mutate(parts: list[str], rng: random.Random) -> str:
    """Delete, duplicate, swap or replace one to three parts."""
    parts = list(parts)
    for _ in range(rng.randint(1, 3)):
        if not parts:
            break
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        action = rng.randrange(5)
        if action == 0:
            del parts[at]
        elif action == 1:
            parts.insert(other, parts[at])
        elif action == 2:
            parts[at], parts[other] = parts[other], parts[at]
        elif action == 3:
            parts[at] = rng.choice(_JUNK)
        else:
            del parts[min(at, other) : max(at, other)]
    return "".join(parts)


def reads_or_refuses(text: str) -> None:
    try:
        program = parse(text)
    except IRError as wrong:
        assert re.match(r"line \d+: ", str(wrong)), f"no line number in {wrong}"
        return
    assert parse(print_program(program)) == program
    with contextlib.suppress(IRError):
        verify(program, REGISTRY)


@given(programs(max_ops=3, dtypes=("f64", "bf16")), st.integers(0, 2**32))
def test_mutated_texts(program: Program, seed: int):
    text = print_program(program)
    rng = random.Random(seed)
    for _ in range(_MUTATIONS):
        reads_or_refuses(mutate(_TOKENS.findall(text), rng))
        reads_or_refuses(mutate(list(text), rng))


@pytest.mark.parametrize("seed", range(20))
def test_mutated_texts_of_every_syntax(seed: int):
    rng = random.Random(seed)
    for _ in range(40):
        reads_or_refuses(mutate(_TOKENS.findall(GOOD.replace("  %y: ", f"{_COMPLEX}  %y: ")), rng))
        reads_or_refuses(mutate(list(GOOD), rng))


@given(st.text())
def test_arbitrary_text(text: str):
    reads_or_refuses(text)
    reads_or_refuses(f"daggc 1\n{text}")
    with contextlib.suppress(IRError):
        parse_type(text)


@pytest.mark.parametrize("length", range(0, len(GOOD), 7))
def test_truncated_text(length: int):
    reads_or_refuses(GOOD[:length])


def _json_nodes(data: object, path: tuple = ()) -> list[tuple]:
    """Paths of everything inside JSON data."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(inner for key, value in items for inner in _json_nodes(value, (*path, key)))]


_JSON_JUNK = (
    None,
    True,
    -1,
    1.5,
    "",
    "%x",
    "f32[",
    "f32[2]",
    [],
    [[]],
    {},
    {"dense": ["f32[2]", "00"]},
    {"float": "x"},
    {"complex": ["1.0"]},
    {"const": 1},
)


@given(programs(max_ops=3), st.integers(0, 2**32))
def test_mutated_json(program: Program, seed: int):
    rng = random.Random(seed)
    for _ in range(4 * _MUTATIONS):
        data = json.loads(json.dumps(to_json(program)))
        path = rng.choice(_json_nodes(data)[1:])
        holder = data
        for key in path[:-1]:
            holder = holder[key]
        if rng.random() < 0.3:
            del holder[path[-1]]
        else:
            holder[path[-1]] = rng.choice(_JSON_JUNK)
        try:
            read = from_json(data)
        except IRError:
            continue
        assert from_json(json.loads(json.dumps(to_json(read)))) == read
        assert parse(print_program(read)) == read, "what JSON can say, text can say"


@pytest.mark.parametrize("data", [None, 3, "x", [], {}, {"daggc": 1}, {"daggc": 2}, {"daggc": "1"}])
def test_json_of_something_else(data: object):
    with pytest.raises(IRError):
        from_json(data)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("daggc 1", "daggc 2", 1, "IR version 2"),
        ("daggc 1", "daggc 1.5", 1, ""),
        ("daggc 1", "dag 1", 1, "'daggc' was expected"),
        ('"capture"', "capture", 2, "a string was expected"),
        ('{"tuple": [{"tuple": ["*"]}, {"dict": []}]}', '{"tuple": ["?"]}', 3, "not a pytree"),
        ('in_tree {"tuple"', 'in_tree {"tuple', 3, "not a pytree"),
        ("%x: f32", "%x: f33", 8, "dtype 'f33'"),
        ("%x: f32[2,3]", "%x", 8, "':' was expected"),
        ("%x: f32[2,3]", "%x: f32[2,-3]", 8, "a tensor type"),
        ("%z output", "%q output", None, "%q is used before it is defined"),
        ("%y: f32[2,3] = mul", "%x: f32[2,3] = mul", 12, "%x is defined twice"),
        ("add(%y, %c)", "add(%y, %w)", 14, "%w is used before it is defined"),
        ("add(%y, %c)", "add(%z, %c)", 14, "%z is used before it is defined"),
        ("{value=2.5}", "{value=}", 12, "an attribute value was expected"),
        ("{value=2.5}", "{value=2.5, value=3}", 12, "given twice"),
        ("{value=2.5}", "{value 2.5}", 12, "'=' was expected"),
        ("!path", "!note", 12, "!note is not one of"),
        ("dense<f32[2,3]> [1.0", 'dense<f32[2,3]> ["a"', 13, "holds numbers of its dtype"),
        ("dense<f32[2,3]> [1.0, ", "dense<f32[2,3]> [", 13, "24 bytes, got 20"),
        ("add(%y, %c)\n}", "add(%y, %c)\n", 16, "the end of the text"),
        ("add(%y, %c)\n}", "add(%y, %c) ~\n}", 14, "unexpected character '~'"),
        ("add(%y, %c)\n}", "add(%y, %c)\n}\ngraph @forward() -> () {}", 16, "defined twice"),
    ],
)
def test_messages_name_the_line(old: str, new: str, line: int | None, message: str):
    assert old in GOOD
    parse(GOOD)
    with pytest.raises(IRError) as caught:
        parse(GOOD.replace(old, new, 1))
    assert message in str(caught.value)
    if line is not None:
        assert str(caught.value).startswith(f"line {line}:")


# --- the verifier -------------------------------------------------------------------------------------

X = Value("x", TensorType("f32", (2,)))
Y = Value("y", TensorType("f32", (2,)))
HEAD = Node("neg", (X,), (Value("head", X.type),))


def program_of(*nodes: Node, outputs: tuple[Value, ...] = (), inputs: tuple[Value, ...] = (X,), **rest) -> Program:
    graph = Graph(
        "forward",
        tuple(Port(value, "input", str(index)) for index, value in enumerate(inputs)),
        nodes,
        tuple(Port(value, "output", str(index)) for index, value in enumerate(outputs)),
    )
    return Program({"forward": graph}, **rest)


def refused(program: Program, message: str, line: str = "") -> None:
    with pytest.raises(IRError) as caught:
        verify(program, REGISTRY)
    assert message in str(caught.value), str(caught.value)
    if line:
        assert f"> {line}" in str(caught.value), "the offending line is marked"


def test_a_good_program_verifies():
    verify(parse(GOOD), REGISTRY)
    verify(program_of(HEAD, outputs=(HEAD.output,)), REGISTRY)


def test_use_of_an_undefined_value():
    refused(program_of(HEAD, Node("neg", (Y,), (Value("z", X.type),))), "before it is defined", "%z: f32[2] = neg(%y)")


def test_use_as_another_type():
    other = Value("x", TensorType("f64", (2,)))
    refused(program_of(HEAD, Node("neg", (other,), (Value("z", other.type),))), "as f64[2], but it is f32[2]", "%z")


def test_declared_type_is_not_the_inferred_one():
    wrong = Node("neg", (X,), (Value("z", TensorType("f32", (3,))),))
    refused(program_of(HEAD, wrong), "gives (f32[2]), but (f32[3]) is declared", "%z: f32[3] = neg(%x)")
    many = Node("neg", (X,), (Y, Value("z", X.type)))
    refused(program_of(many), "is declared")


def test_a_value_defined_twice():
    refused(program_of(HEAD, HEAD), "%head is defined twice", "%head: f32[2] = neg(%x)")
    refused(program_of(Node("neg", (X,), (X,))), "defined twice")
    refused(program_of(inputs=(X, X)), "defined twice")


def test_two_inputs_of_one_name():
    graph = Graph("forward", (Port(X, "param", "w"), Port(Y, "param", "w")), (), ())
    refused(Program({"forward": graph}), "two inputs stand for 'param:w'")


def test_an_output_that_is_not_defined():
    refused(program_of(outputs=(Y,)), "%y")
    refused(program_of(outputs=(Value("x", TensorType("f64", (2,))),)), "%x")


def test_an_unknown_op():
    refused(program_of(Node("nonsense", (X,), (Y,))), "no op named 'nonsense'", "%y: f32[2] = nonsense(%x)")


def test_a_type_rule_is_broken():
    refused(program_of(HEAD, Node("add", (X,), (Y,))), "add(f32[2])", "%y: f32[2] = add(%x)")


def _call(callee: object, device: str | None = None, result: TensorType = X.type) -> Node:
    attrs = {"callee": callee, "dtypes": [result.dtype], "shapes": [result.shape]}
    if device is not None:
        attrs["device"] = device
    return Node("call", (X,), (Value("z", result.with_(device=device)),), NO_ATTRS.__class__(attrs))


def test_calls():
    body = Graph("body", (Port(X, "input", "0"),), (HEAD,), (Port(HEAD.output, "output", "0"),))
    good = program_of(_call("body"))
    verify(good.with_graphs(body), REGISTRY)
    refused(good, "no graph @body", "%z: f32[2] = call(%x)")
    refused(program_of(_call("body", result=TensorType("f64", (2,)))).with_graphs(body), "@body gives (f32[2])")
    narrow = Graph("body", (), (), ())
    refused(good.with_graphs(narrow), "@body takes ()")


def test_devices():
    placed = Value("x", X.type.with_(device="cpu:0"))
    refused(program_of(Node("neg", (placed,), (Value("z", placed.type),)), inputs=(placed,)), "placed", "%z")
    moved = Value("m", X.type.with_(device="gpu:0"))
    move = Node("transfer", (placed,), (moved,), NO_ATTRS.__class__({"device": "gpu:0"}))
    verify(program_of(move, inputs=(placed,), outputs=(moved,)), REGISTRY)
    wrong = Node("transfer", (placed,), (Value("m", placed.type),), move.attrs)
    refused(program_of(wrong, inputs=(placed,)), "@gpu:0", "%m")
    body = Graph("body", (Port(X, "input", "0"),), (HEAD,), (Port(HEAD.output, "output", "0"),))
    call = Node("call", (placed,), (Value("z", moved.type),), _call("body", "gpu:0").attrs)
    refused(program_of(call, inputs=(placed,)).with_graphs(body), "transfer it", "%z")


def test_trees_and_names():
    verify(program_of(outputs=(X,)), REGISTRY)
    refused(
        Program({"forward": program_of().forward}, in_tree=parse(GOOD).out_tree.__class__("tuple")),  # pyright: ignore
        "the pytree has 0 leaves",
    )
    refused(Program({"other": program_of().forward}), "filed under the name 'other'")
    refused(program_of(tied={"a": "a"}), "tied to itself")
