"""Models whose parts are independent: two towers, and parallel branches. Layers are ``linear`` and ``tanh``."""

from __future__ import annotations

from daggc.ir.builder import Builder
from daggc.ir.graph import Program, Value
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY


def two_towers(depth: int = 6, width: int = 512, rows: int = 256, other: int | None = None) -> Program:
    """``sum(a * b)`` of towers over inputs of their own; ``other``: layers of the second, by default as many."""
    b = REGISTRY.builder("forward")
    tops: list[Value] = []
    for index, layers in enumerate((depth, depth if other is None else other)):
        x = b.input(TensorType("f32", (rows, width)), "input", str(index))
        for layer in range(layers):
            x = _layer(b, x, f"towers.{index}.{layer}", width)
        tops.append(x)
    _loss(b, "join", b.emit("mul", *tops))
    return Program({"forward": b.build()})


def parallel_branches(count: int = 8, depth: int = 3, width: int = 384, rows: int = 256, stem: bool = True) -> Program:
    """A stem, branches that all read it, and the sum of what they give."""
    b = REGISTRY.builder("forward")
    x = b.input(TensorType("f32", (rows, width)), "input", "0")
    if stem:
        x = _layer(b, x, "stem", width)
    total: Value | None = None
    for index in range(count):
        y = x
        for layer in range(depth):
            y = _layer(b, y, f"branches.{index}.{layer}", width, last=layer == depth - 1)
        with b.at(path="join"):
            total = y if total is None else b.emit("add", total, y)
    assert total is not None
    _loss(b, "join", total)
    return Program({"forward": b.build()})


def _layer(b: Builder, x: Value, path: str, width: int, last: bool = False) -> Value:
    weight = b.input(TensorType("f32", (width, width)), "param", f"{path}.weight")
    bias = b.input(TensorType("f32", (width,)), "param", f"{path}.bias")
    with b.at(path=path):
        y = b.emit("linear", x, weight, bias)
        return y if last else b.emit("tanh", y)


def _loss(b: Builder, path: str, x: Value) -> None:
    with b.at(path=path):
        b.output(b.emit("sum", x, dims=tuple(range(x.type.rank)), keepdim=False), "output", "0")
