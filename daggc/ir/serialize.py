"""Programs as JSON and on disk; weights as safetensors. Loading never unpickles, imports or runs anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from daggc.errors import IRError
from daggc.ir.attrs import Attr, Attrs, Dense
from daggc.ir.graph import IR_VERSION, Graph, Node, Port, Program, Value
from daggc.ir.parser import NAME, WORD, parse, parse_type
from daggc.ir.printer import print_program
from daggc.ir.tree import tree_from_json


def to_json(program: Program) -> dict[str, Any]:
    """The program as JSON data; ``from_json`` gives it back exactly."""
    return {
        "daggc": program.version,
        "provenance": list(program.provenance),
        "in_tree": None if program.in_tree is None else program.in_tree.to_json(),
        "out_tree": None if program.out_tree is None else program.out_tree.to_json(),
        "tied": dict(program.tied),
        "graphs": [_graph_to_json(graph) for graph in program.graphs.values()],
    }


def from_json(data: Mapping[str, Any]) -> Program:
    """Read what ``to_json`` wrote. Raises IRError for anything else."""
    try:
        if data["daggc"] != IR_VERSION:
            raise IRError(f"this is IR version {data['daggc']}; this daggc reads version {IR_VERSION}")
        graphs = [_graph_from_json(graph) for graph in data["graphs"]]
        by_name = {graph.name: graph for graph in graphs}
        if len(by_name) != len(graphs):
            raise IRError("two graphs have one name")
        return Program(
            by_name,
            None if data["in_tree"] is None else tree_from_json(data["in_tree"]),
            None if data["out_tree"] is None else tree_from_json(data["out_tree"]),
            {_text(alias): _text(name) for alias, name in dict(data["tied"]).items()},
            tuple(_text(step) for step in data["provenance"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as wrong:
        raise IRError(f"not a daggc program in JSON: {type(wrong).__name__}: {wrong}") from None


def save(program: Program, path: str | Path, weights: Mapping[str, np.ndarray] | None = None) -> None:
    """Write ``path`` (text, or JSON if it ends in ``.json``) and, beside it, ``.safetensors`` weights.

    Args:
        weights: arrays by the model's own names; those of every ``param``, ``buffer`` and ``constant`` port.
    """
    path = Path(path)
    path.write_text(json.dumps(to_json(program)) if path.suffix == ".json" else print_program(program))
    if weights is not None:
        # not ascontiguousarray, which gives an array without axes one
        arrays = {name: np.asarray(array, order="C") for name, array in weights.items()}
        save_file(arrays, weights_path(path))


def load(path: str | Path) -> Program:
    """Read a program that ``save`` wrote. Raises IRError naming the line of what is wrong."""
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as wrong:
        raise IRError(f"cannot read a program from {path}: {wrong}") from None
    if path.suffix != ".json":
        return parse(text)
    try:
        return from_json(json.loads(text))
    except json.JSONDecodeError as wrong:
        raise IRError(f"{path} is not JSON: {wrong}") from None


def weights_path(path: str | Path) -> Path:
    """Where the weights of a program file lie: the same name with the suffix ``.safetensors``."""
    return Path(path).with_suffix(".safetensors")


def load_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Read a safetensors file. Raises IRError if it is none."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as wrong:
        raise IRError(f"cannot read weights from {path}: {wrong}") from None


def _graph_to_json(graph: Graph) -> dict[str, Any]:
    return {
        "name": graph.name,
        "inputs": [[p.value.name, str(p.value.type), p.kind, p.target] for p in graph.inputs],
        "nodes": [
            {
                "op": node.op,
                "inputs": [value.name for value in node.inputs],
                "outputs": [[value.name, str(value.type)] for value in node.outputs],
                "attrs": {name: _attr_to_json(value) for name, value in node.attrs.items()},
                "path": node.path,
                "source": node.source,
                "origin": node.origin,
            }
            for node in graph.nodes
        ],
        "outputs": [[p.value.name, p.kind, p.target] for p in graph.outputs],
    }


def _graph_from_json(data: Mapping[str, Any]) -> Graph:
    values: dict[str, Value] = {}

    def define(name: str, type_: str) -> Value:
        if name in values:
            raise IRError(f"%{name} is defined twice")
        values[name] = Value(_name(name), parse_type(type_))
        return values[name]

    inputs = tuple(
        Port(define(name, type_), _word(kind), _text(target)) for name, type_, kind, target in data["inputs"]
    )
    nodes: list[Node] = []
    for item in data["nodes"]:
        arguments = tuple(values[name] for name in item["inputs"])
        outputs = tuple(define(name, type_) for name, type_ in item["outputs"])
        attrs = Attrs({_word(name): _attr_from_json(value) for name, value in item["attrs"].items()})
        notes = (_text(item[note]) for note in ("path", "source", "origin"))
        nodes.append(Node(_word(item["op"]), arguments, outputs, attrs, *notes))
    outputs = tuple(Port(values[name], _word(kind), _text(target)) for name, kind, target in data["outputs"])
    return Graph(_name(data["name"]), inputs, tuple(nodes), outputs)


def _text(data: Any) -> str:
    if not isinstance(data, str):
        raise IRError(f"a string is required, got {data!r}")
    return data


def _name(data: Any) -> str:
    if not NAME.fullmatch(_text(data)):
        raise IRError(f"not the name of a value or graph: {data!r}")
    return data


def _word(data: Any) -> str:
    if not WORD.fullmatch(_text(data)):
        raise IRError(f"not the name of an op, an attribute or a kind of port: {data!r}")
    return data


def _attr_to_json(value: Attr) -> Any:
    """Floats go as strings (JSON has no inf and nan), so that every attribute comes back with its type."""
    if isinstance(value, float):
        return {"float": repr(value)}
    if isinstance(value, complex):
        return {"complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, Graph):
        return {"graph": _graph_to_json(value)}
    if isinstance(value, Dense):
        return {"dense": [str(value.type), value.data.hex()]}
    return [_attr_to_json(item) for item in value] if isinstance(value, tuple) else value


def _attr_from_json(data: Any) -> Attr:
    if isinstance(data, dict):
        if "float" in data:
            return float(data["float"])
        if "complex" in data:
            real, imag = data["complex"]
            return complex(float(real), float(imag))
        if "graph" in data:
            return _graph_from_json(data["graph"])
        type_, digits = data["dense"]
        return Dense.from_bytes(parse_type(type_), bytes.fromhex(digits))
    return tuple(_attr_from_json(item) for item in data) if isinstance(data, list) else data
