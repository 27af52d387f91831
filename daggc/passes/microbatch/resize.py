"""One forward at another batch size, from two captures of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from daggc.errors import IRError, located
from daggc.ir.attrs import Attr, Dense
from daggc.ir.graph import Graph, Node, Port, Value
from daggc.ops import REGISTRY
from daggc.passes.microbatch.sizes import counting_axis, difference, same_constant


def at_batch(forward: Graph, other: Graph, batched_inputs: Collection[str], batch: int) -> Graph:
    """The graph of ``forward`` and ``other`` for ``batch`` samples, without another capture.

    A batch of one sample is captured as another graph (an axis of size 1 is not broadcast), so microbatches of
    one sample are made in this way. Sizes and numbers are constants, or in proportion to the batch.

    Raises:
        IRError: the two captures are not one graph but for sizes, or a size is neither constant nor in proportion
            to the batch.
    """
    problem = difference(forward, other)
    if problem is not None:
        raise IRError(str(problem))
    sizes = _batches(forward, batched_inputs), _batches(other, batched_inputs)
    b = REGISTRY.builder(forward.name)
    b.reserve(value.name for value in forward.values())
    values: dict[str, Value] = {}
    for port, twin in zip(forward.inputs, other.inputs, strict=True):
        shape = _scaled((port.value.type.shape, twin.value.type.shape), sizes, batch, None)
        value = Value(port.value.name, port.value.type.with_(shape=shape))
        values[port.value.name] = b.adopt(Port(value, port.kind, port.target))
    for node, twin in zip(forward.nodes, other.nodes, strict=True):
        inputs = [values[value.name] for value in node.inputs]
        attrs = {name: _attr(node, (value, twin.attrs[name]), sizes, batch) for name, value in node.attrs.items()}
        with b.at(node.path, node.source, node.origin):
            made = b.emit_many(node.op, *inputs, **attrs)
        for value, result, same in zip(node.outputs, made, twin.outputs, strict=True):
            wanted = _scaled((value.type.shape, same.type.shape), sizes, batch, node)
            if result.type.shape != wanted:
                raise IRError(_located(node, f"{wanted} was expected at batch size {batch}, got {result.type.shape}"))
            values[value.name] = result
    for port in forward.outputs:
        b.output(values[port.value.name], port.kind, port.target)
    return _renamed(b.build(), forward)


def _batches(graph: Graph, batched_inputs: Collection[str]) -> int:
    return next(port.value.type.shape[0] for port in graph.inputs_of("input") if port.target in batched_inputs)


def _attr(node: Node, pair: tuple[Attr, Attr], sizes: tuple[int, int], batch: int) -> Attr:
    """An attribute at the new batch size."""
    first, second = pair
    if str(first) == str(second):
        return first
    if isinstance(first, Dense) and isinstance(second, Dense):
        return _constant(node, first.numpy(), second.numpy(), sizes, batch)
    if isinstance(first, tuple):
        return _scaled(pair, sizes, batch, node)
    return _scaled(((first,), (second,)), sizes, batch, node)[0]


def _constant(node: Node, first: np.ndarray, second: np.ndarray, sizes: tuple[int, int], batch: int) -> Dense:
    if not same_constant(first, second):
        raise IRError(_located(node, "a constant changes with the batch size"))
    shape = _scaled((first.shape, second.shape), sizes, batch, node)
    axis = counting_axis(first)
    if axis is not None:
        counted = np.arange(shape[axis], dtype=first.dtype)
        index = counted.reshape(tuple(-1 if own == axis else 1 for own in range(first.ndim)))
        return Dense.of(np.broadcast_to(index, shape))
    kept = tuple(slice(0, 1) if old != new else slice(None) for old, new in zip(first.shape, shape, strict=True))
    return Dense.of(np.broadcast_to(first[kept], shape))


def _scaled(pair: tuple[Sequence, Sequence], sizes: tuple[int, int], batch: int, node: Node | None) -> tuple:
    """Numbers that are equal stay; those in proportion to the batch are scaled."""
    result = []
    for first, second in zip(*pair, strict=True):
        if first == second:
            result.append(first)
        elif first * sizes[1] == second * sizes[0]:
            scaled = first * batch / sizes[0]
            result.append(int(scaled) if isinstance(first, int) else scaled)
        else:
            raise IRError(
                _located(node, f"{first} at batch size {sizes[0]}, {second} at {sizes[1]}: not in proportion to it")
            )
    return tuple(result)


def _located(node: Node | None, message: str) -> str:
    return located(f"{node.op}: {message}", node.path, node.source) if node else message


def _renamed(graph: Graph, like: Graph) -> Graph:
    """Values under the names of the graph that it was made from."""
    names = {mine.name: theirs.name for mine, theirs in zip(graph.values(), like.values(), strict=True)}

    def named(value: Value) -> Value:
        return Value(names[value.name], value.type)

    nodes = tuple(
        Node(n.op, tuple(map(named, n.inputs)), tuple(map(named, n.outputs)), n.attrs, n.path, n.source, n.origin)
        for n in graph.nodes
    )
    ports = [tuple(Port(named(p.value), p.kind, p.target) for p in ps) for ps in (graph.inputs, graph.outputs)]
    return Graph(graph.name, ports[0], nodes, ports[1])
