"""Programs as text and JSON come back exactly."""

from __future__ import annotations

import json
import math
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daggc.errors import IRError
from daggc.ir.attrs import Attrs, Dense
from daggc.ir.graph import Graph, Node, Port, Program, Value
from daggc.ir.parser import parse, parse_type
from daggc.ir.printer import print_program
from daggc.ir.serialize import from_json, load, load_weights, save, to_json, weights_path
from daggc.ir.tree import LEAF, Tree, tree_from_json
from daggc.ir.types import DTYPES, TensorType
from daggc.testing import programs

MIXED = {"dtypes": ("f64", "f32", "bf16", "f16"), "max_ops": 6}

_types = st.builds(
    TensorType,
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.sampled_from((None, "cpu:0", "gpu:13", "node-a.cpu:0")),
)


@st.composite
def _dense(draw: st.DrawFn) -> Dense:
    type_ = draw(_types).with_(device=None)
    data = draw(st.binary(min_size=type_.nbytes, max_size=type_.nbytes))
    return Dense(type_, bytes(byte & 1 for byte in data) if type_.dtype == "bool" else data)


_atoms = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.sampled_from((math.inf, -math.inf)),
    st.complex_numbers(),
    st.sampled_from((complex(0.0, -0.0), complex(math.nan, -math.inf))),
    _dense(),
)
_attrs = st.dictionaries(
    st.from_regex(r"[a-z_][a-z_0-9]{0,8}", fullmatch=True),
    st.recursive(_atoms, lambda inner: st.lists(inner, max_size=4), max_leaves=8),
    max_size=4,
)


def test_a_printed_program_reads_as_documented():
    x = Value("x", TensorType("f32", (2, 3)))
    y = Value("y", TensorType("f32", (2, 3)))
    node = Node("mul_scalar", (x,), (y,), Attrs({"value": 2.5}), "fc", "mlp.py:12", "y")
    graph = Graph("forward", (Port(x, "input", "0"),), (node,), (Port(y, "output", "0"),))
    program = Program({"forward": graph}, out_tree=LEAF, tied={"a": "b"}, provenance=("capture",))
    assert print_program(program) == (
        "daggc 1\n"
        'provenance "capture"\n'
        'out_tree "*"\n'
        'tied "a" = "b"\n'
        "\n"
        "graph @forward(\n"
        '  %x: f32[2,3] input "0"\n'
        ") -> (\n"
        '  %y output "0"\n'
        ") {\n"
        '  %y: f32[2,3] = mul_scalar(%x) {value=2.5} !path "fc" !src "mlp.py:12" !of "y"\n'
        "}\n"
    )


@given(programs(**MIXED))
def test_text_comes_back_exactly(program: Program):
    text = print_program(program)
    assert parse(text) == program
    assert print_program(parse(text)) == text


@given(programs(**MIXED))
def test_json_comes_back_exactly(program: Program):
    data = json.loads(json.dumps(to_json(program)))
    assert from_json(data) == program
    assert print_program(from_json(data)) == print_program(program)


def _one_node(attrs: Attrs, note: str = "") -> Program:
    out = Value("y", TensorType("f32", ()))
    node = Node("any.op", (), (out,), attrs, note, note, note)
    return Program({"g": Graph("g", (), (node,), (Port(out, "output", note),))}, provenance=(note,), tied={note: note})


@given(_attrs, st.text())
def test_any_attribute_and_note_comes_back_exactly(items: dict, note: str):
    program = _one_node(Attrs(items), note)
    again = parse(print_program(program))
    assert again == program
    assert from_json(json.loads(json.dumps(to_json(program)))) == program
    # 1, 1.0 and True are equal to Python, but not to an op: the text tells them apart
    assert str(again["g"].nodes[0].attrs) == str(Attrs(items))


@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, 1.7976931348623157e308, 0.1])
def test_floats_keep_every_bit(value: float):
    for program in (
        parse(print_program(_one_node(Attrs({"v": value})))),
        from_json(to_json(_one_node(Attrs({"v": value})))),
    ):
        got = program["g"].nodes[0].attrs["v"]
        assert math.isnan(got) if math.isnan(value) else struct.pack("d", got) == struct.pack("d", value)


@pytest.mark.parametrize("real", [0.0, -0.0, math.inf, math.nan, 5e-324, -0.1])
@pytest.mark.parametrize("imag", [0.0, -0.0, -math.inf, math.nan, 1.0])
def test_complex_numbers_keep_every_bit(real: float, imag: float):
    original = _one_node(Attrs({"v": complex(real, imag)}))
    for program in (parse(print_program(original)), from_json(to_json(original)), pickle.loads(pickle.dumps(original))):
        assert program == original
        assert repr(program["g"].nodes[0].attrs["v"]) == repr(complex(real, imag))


@given(_types)
def test_types_come_back(type_: TensorType):
    assert parse_type(str(type_)) == type_


_trees = st.recursive(
    st.one_of(
        st.just(LEAF),
        st.builds(
            lambda value: Tree("const", value=value),
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
        ),
    ),
    lambda inner: st.one_of(
        st.builds(
            lambda kind, items: Tree(kind, tuple(items)),
            st.sampled_from(("tuple", "list")),
            st.lists(inner, max_size=3),
        ),
        st.builds(
            lambda kind, items: Tree(
                kind, tuple(items.values()), tuple(items), "mod.Out" if kind == "object" else None
            ),
            st.sampled_from(("dict", "object")),
            st.dictionaries(st.text(), inner, max_size=3),
        ),
    ),
    max_leaves=6,
)


@given(_trees)
def test_trees_come_back(tree: Tree):
    assert tree_from_json(json.loads(str(tree))) == tree
    graph = Graph("forward", (), (), ())
    program = Program({"forward": graph}, in_tree=tree, out_tree=tree)
    assert parse(print_program(program)) == program
    assert from_json(json.loads(json.dumps(to_json(program)))) == program


def test_tree_paths_and_unflatten():
    tree = tree_from_json({"tuple": ["*", {"dict": [["a", "*"], ["b", {"const": 3}]]}, {"list": ["*"]}]})
    assert list(tree.leaf_paths()) == ["0", "1.a", "2.0"]
    assert tree.unflatten(iter("xyz")) == ("x", {"a": "y", "b": 3}, ["z"])


@given(programs(max_ops=3))
def test_equal_structure_whatever_the_names(program: Program):
    """Renaming values and dropping notes leaves the hash of what a graph computes."""
    graph = program.forward
    names = {value.name: Value(f"renamed{index}", value.type) for index, value in enumerate(graph.values())}
    renamed = Graph(
        "other",
        tuple(Port(names[port.value.name], port.kind, f"t{port.target}") for port in graph.inputs),
        tuple(
            Node(
                node.op,
                tuple(names[value.name] for value in node.inputs),
                tuple(names[value.name] for value in node.outputs),
                node.attrs,
            )
            for node in graph.nodes
        ),
        tuple(Port(names[port.value.name], port.kind, port.target) for port in graph.outputs),
    )
    assert renamed.structure() == graph.structure()


def test_structure_tells_attributes_apart():
    hashes = {
        _one_node(Attrs({"v": value}))["g"].structure() for value in (1, 1.0, 1 + 0j, True, "1", None, (1,), math.nan)
    }
    assert len(hashes) == 8


@pytest.mark.parametrize("suffix", [".dag", ".json"])
def test_save_and_load(tmp_path, suffix: str):
    program = _one_node(Attrs({"v": math.nan, "w": "é"}), "größe")
    weights = {"fc.weight": np.arange(6.0).reshape(2, 3).T, "n": np.array(3)}
    save(program, tmp_path / f"m{suffix}", weights)
    assert load(tmp_path / f"m{suffix}") == program
    loaded = load_weights(weights_path(tmp_path / f"m{suffix}"))
    assert loaded.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"{", b"[]", b"PK\x03\x04"])
@pytest.mark.parametrize("suffix", [".dag", ".json", ".safetensors"])
def test_files_that_hold_something_else(tmp_path, content: bytes, suffix: str):
    path = tmp_path / f"m{suffix}"
    path.write_bytes(content)
    with pytest.raises(IRError):
        load_weights(path) if suffix == ".safetensors" else load(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(IRError, match="cannot read"):
        load(tmp_path / "absent.dag")
    with pytest.raises(IRError, match="cannot read"):
        load_weights(tmp_path / "absent.safetensors")
