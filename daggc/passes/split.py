"""Between one joint graph and the pair ``@forward``, ``@backward`` joined by residuals."""

from __future__ import annotations

from dataclasses import replace

from daggc.ir.graph import Graph, Node, Port, Value
from daggc.ops import REGISTRY
from daggc.passes.dce import live_nodes

# Ops whose result the backward makes again rather than keeps: they cost nothing, or next to nothing.
RECOMPUTED = frozenset(("reshape", "permute", "broadcast", "full", "constant", "iota"))


def split(joint: Graph, primal: Graph) -> tuple[Graph, Graph]:
    """Cut a joint graph: what the outputs of ``primal`` need is ``@forward``, the rest ``@backward``.

    Values that cross are ``residual`` outputs of forward and inputs of backward. Inputs are never residuals:
    backward takes them as inputs itself. Views and constants are made again rather than kept.

    Args:
        joint: what ``differentiate`` made of ``primal``.
        primal: the graph that was differentiated; its ports tell cotangents and gradients from the rest.
    """
    primal_inputs = {port.ref for port in primal.inputs}
    primal_outputs = {port.ref for port in primal.outputs}
    outputs = [port for port in joint.outputs if port.ref in primal_outputs]
    gradients = tuple(port for port in joint.outputs if port.ref not in primal_outputs)
    primal_effects = {value.name for node in primal.nodes if node.holds("python.call") for value in node.outputs}
    forward_nodes = live_nodes(joint, {port.value.name for port in outputs} | primal_effects)
    makers = {value.name: node for node in forward_nodes for value in node.outputs}
    own = [
        node
        for node in live_nodes(joint, {port.value.name for port in gradients})
        if node.outputs[0].name not in makers
    ]
    reads = {port.value.name for port in gradients} | {value.name for node in own for value in node.inputs}
    again, residuals = _recompute(joint, reads, makers)
    reads |= {value.name for node in again for value in node.inputs}
    ports = tuple(Port(value, "residual", value.name) for value in residuals)
    forward_inputs = tuple(port for port in joint.inputs if port.ref in primal_inputs)
    backward_inputs = tuple(port for port in joint.inputs if port.value.name in reads or port.ref not in primal_inputs)
    order = {value.name: index for index, node in enumerate(joint.nodes) for value in node.outputs}
    nodes = sorted((*again, *own), key=lambda node: order[node.outputs[0].name])
    return (
        Graph("forward", forward_inputs, tuple(forward_nodes), (*outputs, *ports)),
        Graph("backward", (*ports, *backward_inputs), tuple(nodes), gradients),
    )


def _recompute(joint: Graph, reads: set[str], makers: dict[str, Node]) -> tuple[list[Node], list[Value]]:
    """Split what backward reads of forward into nodes to run again and values to keep."""
    again: dict[str, Node] = {}
    residuals: dict[str, Value] = {}
    pending = [value for value in joint.values() if value.name in reads and value.name in makers]
    while pending:
        value = pending.pop()
        node = makers[value.name]
        if node.op not in RECOMPUTED:
            residuals[value.name] = value
        elif value.name not in again:
            again[value.name] = node
            pending += [source for source in node.inputs if source.name in makers]
    order = {value.name: index for index, value in enumerate(joint.values())}
    return list(again.values()), sorted(residuals.values(), key=lambda value: order[value.name])


def join(forward: Graph, backward: Graph) -> Graph:
    """The inverse of :func:`split`: one graph that gives forward's outputs and the gradients."""
    b = REGISTRY.builder("forward")
    b.reserve(value.name for value in forward.values())
    values = {port.value.name: b.adopt(port) for port in forward.inputs}
    by_ref = {port.ref: values[port.value.name] for port in forward.inputs}
    for node in forward.nodes:
        outputs = b.append(replace(node, origin=""), [values[value.name] for value in node.inputs])
        values.update(zip((value.name for value in node.outputs), outputs, strict=True))
    by_ref |= {port.ref: values[port.value.name] for port in forward.outputs_of("residual")}
    for port in forward.outputs:
        if port.kind != "residual":
            b.output(values[port.value.name], port.kind, port.target)
    values = {port.value.name: by_ref.get(port.ref) or b.adopt(port) for port in backward.inputs}
    for node in backward.nodes:
        outputs = b.append(replace(node, origin=""), [values[value.name] for value in node.inputs])
        values.update(zip((value.name for value in node.outputs), outputs, strict=True))
    for port in backward.outputs:
        b.output(values[port.value.name], port.kind, port.target)
    return b.build()
