"""Graphs that the tests of the planner share: random ones and layered ones."""

from __future__ import annotations

import networkx as nx
import numpy as np
from hypothesis import strategies as st

from daggc.ir.graph import Graph
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.build import cast

SQUARE = TensorType("f64", (3, 3))
VIEWS = ("view",) if "permute" in REGISTRY else ()


@st.composite
def random_graphs(draw: st.DrawFn) -> Graph:
    """A small forward graph over 3x3 matrices with shared parameters, masks and views."""
    b = REGISTRY.builder("forward")
    floats = [b.input(SQUARE, "input", "0"), b.input(SQUARE, "buffer", "scale")]
    floats += [b.input(SQUARE, "param", f"w{index}") for index in range(draw(st.integers(1, 3)))]
    ids = b.input(TensorType("i64", (3, 3)), "input", "1")
    integers = [ids]
    for _ in range(draw(st.integers(2, 18))):
        kind = draw(st.sampled_from(("unary", "binary", "binary", *VIEWS, "mask", "integer", "where")))
        x = draw(st.sampled_from(floats))
        with b.at(path=f"layers.{draw(st.integers(0, 3))}"):
            if kind == "unary":
                floats.append(b.emit(draw(st.sampled_from(("cos", "sin", "neg"))), x))
            elif kind == "binary":
                floats.append(b.emit(draw(st.sampled_from(("add", "mul", "sub"))), x, draw(st.sampled_from(floats))))
            elif kind == "view":
                floats.append(b.emit("permute", x, dims=(1, 0)))
            elif kind == "integer":
                i, j = draw(st.sampled_from(integers)), draw(st.sampled_from(integers))
                integers.append(b.emit("add", i, j))
            else:
                i, j = draw(st.sampled_from(integers)), draw(st.sampled_from(integers))
                mask = b.emit("ge", i, j)
                if kind == "mask":
                    floats.append(b.emit("mul", x, cast(b, mask, "f64")))
                else:
                    floats.append(b.emit("where", mask, x, draw(st.sampled_from(floats))))
    made = [value for node in b.nodes for value in node.outputs if value.type == SQUARE]
    outputs = draw(st.lists(st.sampled_from(made), min_size=1, max_size=3)) if made else [floats[0]]
    for index, value in enumerate(outputs):
        b.output(value, "output", str(index))
    if made and draw(st.booleans()):
        b.output(draw(st.sampled_from(made)), "buffer", "scale")
    return b.build()


@st.composite
def monotone_stages(draw: st.DrawFn, graph: Graph, most: int = 4) -> dict[str, int]:
    """A stage for each node that never falls along an edge: segments of a random topological order."""
    order = draw(topological_orders(graph))
    cuts = sorted(draw(st.lists(st.integers(0, len(order)), max_size=most - 1)))
    return {name: sum(cut <= index for cut in cuts) for index, name in enumerate(order)}


@st.composite
def topological_orders(draw: st.DrawFn, graph: Graph) -> list[str]:
    """First output names of the nodes in some topological order."""
    edges = dependences(graph)
    ready = [name for name in edges if not edges.in_degree(name)]
    order: list[str] = []
    while ready:
        name = ready.pop(draw(st.integers(0, len(ready) - 1)))
        order.append(name)
        edges_out = list(edges.successors(name))
        edges.remove_node(name)
        ready += [user for user in edges_out if not edges.in_degree(user)]
    return order


def dependences(graph: Graph) -> nx.DiGraph:
    """Nodes by first output name, an edge from a maker to a user."""
    makers = {value.name: node.outputs[0].name for node in graph.nodes for value in node.outputs}
    edges = nx.DiGraph()
    edges.add_nodes_from(node.outputs[0].name for node in graph.nodes)
    for node in graph.nodes:
        edges.add_edges_from(
            (makers[value.name], node.outputs[0].name) for value in node.inputs if value.name in makers
        )
    return edges


def arrays_for(graph: Graph, seed: int = 0) -> list[np.ndarray]:
    """Random arrays for a graph's inputs."""
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=port.value.type.shape).astype(port.value.type.numpy_dtype)
        if port.value.type.differentiable
        else rng.integers(0, 3, port.value.type.shape).astype(port.value.type.numpy_dtype)
        for port in graph.inputs
    ]
