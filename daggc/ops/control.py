"""Ops with graphs inside: control flow, ``cond``, ``while_loop`` and ``scan``, and ``checkpoint``.

A ``checkpoint`` runs its graph. Its derivative runs the graph again rather than keep what was computed in it.

A graph inside a node reads its own inputs only: what a branch uses of its surroundings is an operand. Their
derivatives (:mod:`daggc.ops.control_vjp`) are ops of the same kind, so they can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.graph import Graph, Node
from daggc.ir.types import TensorType
from daggc.ops import activation, arithmetic, compare, unary  # noqa: F401  # samples are made of their ops
from daggc.ops.control_vjp import checkpoint_vjp, cond_vjp, scan_vjp, while_vjp
from daggc.ops.opdef import REGISTRY, Arg, Cost, OpDef, Sample, node_bytes, register, require, t, whole

Body = Callable[..., Sequence[np.ndarray]]
PREDICATE = TensorType("bool", ())


def input_types(graph: Graph) -> tuple[TensorType, ...]:
    return tuple(port.value.type for port in graph.inputs)


def output_types(graph: Graph) -> tuple[TensorType, ...]:
    return tuple(port.value.type for port in graph.outputs)


def _graph(attrs: Attrs, name: str) -> Graph:
    require(isinstance(attrs[name], Graph), f"{name} is a graph, got {attrs[name]!r}")
    return attrs[name]


def _types(types: Sequence[TensorType]) -> str:
    return f"({', '.join(map(str, types))})"


def _require_types(got: Sequence[TensorType], wanted: Sequence[TensorType], what: str) -> None:
    require(tuple(got) == tuple(wanted), f"{what} {_types(wanted)}, got {_types(got)}")


# --- type rules ---------------------------------------------------------------------------------------


def _infer_checkpoint(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    body = _graph(attrs, "body")
    _require_types(input_types(body), inputs, "the region must take")
    require(bool(body.outputs), "the region gives something")
    return output_types(body)


def _infer_cond(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    predicate, *operands = inputs
    require(predicate == PREDICATE, f"the predicate is a {PREDICATE}, got {predicate}")
    then, otherwise = _graph(attrs, "true"), _graph(attrs, "false")
    for branch in (then, otherwise):
        _require_types(input_types(branch), operands, f"branch @{branch.name} must take")
    _require_types(output_types(otherwise), output_types(then), "both branches must give")
    return output_types(then)


def _infer_while(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    carries = tuple(inputs[: attrs["carries"]])
    require(0 < attrs["carries"] <= len(inputs), f"carries counts leading inputs, got {attrs['carries']}")
    body, goes_on = _graph(attrs, "body"), _graph(attrs, "cond")
    for graph in (body, goes_on):
        _require_types(input_types(graph), inputs, f"@{graph.name} must take")
    _require_types(output_types(body), carries, "the body must give the carries back:")
    _require_types(output_types(goes_on), (PREDICATE,), "the condition must give")
    return carries


def _infer_scan(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    count, slices, length = attrs["carries"], attrs["xs"], attrs["length"]
    require(count >= 0 and slices >= 0 and count + slices <= len(inputs), "carries and xs count leading inputs")
    require(length > 0, f"length is at least 1, got {length}")
    require(type(attrs["reverse"]) is bool, "reverse is a bool")
    carries, xs, extra = inputs[:count], inputs[count : count + slices], inputs[count + slices :]
    require(all(x.shape[:1] == (length,) for x in xs), f"the first axis of what is scanned is {length} long")
    body = _graph(attrs, "body")
    parts = [x.with_(shape=x.shape[1:]) for x in xs]
    _require_types(input_types(body), (*carries, *parts, *extra), "the body must take")
    results = output_types(body)
    _require_types(results[:count], carries, "the body must first give the carries back:")
    return (*carries, *(result.with_(shape=(length, *result.shape)) for result in results[count:]))


# --- meaning ------------------------------------------------------------------------------------------


def _evaluate_checkpoint(node: Node, body: Body, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(body(*inputs))


def _evaluate_cond(node: Node, otherwise: Body, then: Body, predicate: np.ndarray, *operands: np.ndarray):
    return tuple((then if predicate else otherwise)(*operands))


def _evaluate_while(node: Node, body: Body, goes_on: Body, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
    carries, extra = inputs[: node.attrs["carries"]], inputs[node.attrs["carries"] :]
    while goes_on(*carries, *extra)[0]:
        carries = body(*carries, *extra)
    return tuple(carries)


def _evaluate_scan(node: Node, body: Body, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
    carries, xs, extra = _parts(node, inputs)
    count, steps = len(carries), list[Sequence[np.ndarray]]()
    places = range(node.attrs["length"])
    for index in reversed(places) if node.attrs["reverse"] else places:
        results = body(*carries, *(x[index] for x in xs), *extra)
        carries = results[:count]
        steps.append(results[count:])
    if node.attrs["reverse"]:
        steps.reverse()
    return (*carries, *(np.stack(results) for results in zip(*steps, strict=True)))


def _parts(node: Node, items: Sequence) -> tuple[Sequence, Sequence, Sequence]:
    """Carries, what is scanned, and the rest."""
    count, slices = node.attrs["carries"], node.attrs["xs"]
    return items[:count], items[count : count + slices], items[count + slices :]


def _tuple(items: Sequence[str]) -> str:
    return f"({''.join(f'{item}, ' for item in items).rstrip()})"


def _expression(node: Node, call: str) -> str:
    return f"{call}[0]" if len(node.outputs) == 1 else call


def _lower_checkpoint(node: Node, args: Sequence[str]) -> str:
    body, *inputs = args
    return _expression(node, f"{body}({', '.join(['device', *inputs])})")


def _lower_cond(node: Node, args: Sequence[str]) -> str:
    otherwise, then, predicate, *operands = args
    return _expression(node, f"kernels.cond(device, {otherwise}, {then}, {predicate}, {_tuple(operands)})")


def _lower_while(node: Node, args: Sequence[str]) -> str:
    body, goes_on, *inputs = args
    count = node.attrs["carries"]
    carries, extra = _tuple(inputs[:count]), _tuple(inputs[count:])
    return _expression(node, f"kernels.while_loop(device, {body}, {goes_on}, {carries}, {extra})")


def _lower_scan(node: Node, args: Sequence[str]) -> str:
    body, *inputs = args
    parts = ", ".join(map(_tuple, _parts(node, inputs)))
    length, reverse = node.attrs["length"], node.attrs["reverse"]
    return _expression(node, f"kernels.scan(device, {body}, {parts}, {length!r}, {reverse!r})")


# --- cost ---------------------------------------------------------------------------------------------


def _cost(node: Node) -> Cost:
    """The dearer branch of a ``cond``, every step of a ``scan``, one of a loop, whose number of steps is unknown."""
    flops = nbytes = 0.0
    for graph in node.attrs.graphs:
        costs = [REGISTRY[inner.op].cost(inner) for inner in graph.nodes]
        flops = max(flops, sum(cost.flops for cost in costs))
        nbytes = max(nbytes, sum(cost.bytes for cost in costs))
    steps = node.attrs.get("length", 1)
    return Cost(flops * steps, nbytes * steps + node_bytes(node), "opaque")


# --- samples ------------------------------------------------------------------------------------------


def _sample_graph(name: str, types: Sequence[TensorType], emit: Callable) -> Graph:
    b = REGISTRY.builder(name)
    inputs = [b.input(type_, "input", str(index)) for index, type_ in enumerate(types)]
    for index, value in enumerate(emit(b, *inputs)):
        b.output(value, "output", str(index))
    return b.build()


def _samples() -> tuple[Sample, Sample, Sample]:
    x, w, rows = t(3), t(3), t(4, 3)
    then = _sample_graph("then", (x, w), lambda b, x, w: [b.emit("mul", x, w), x])
    otherwise = _sample_graph("otherwise", (x, w), lambda b, x, w: [b.emit("sin", x), b.emit("add", x, w)])
    count = t(dtype="i64")
    more = _sample_graph("more", (count, x), lambda b, n, x: [b.emit("lt_scalar", n, value=3)])
    double = _sample_graph(
        "double", (count, x), lambda b, n, x: [b.emit("add_scalar", n, value=1), b.emit("mul", x, x)]
    )
    step = _sample_graph(
        "step", (x, x, w), lambda b, h, x, w: [(y := b.emit("tanh", b.emit("add", b.emit("mul", h, w), x))), y]
    )
    operands = (Arg(x), Arg(w))
    return (
        Sample((Arg(PREDICATE, "bool"), *operands), {"true": then, "false": otherwise}),
        Sample((Arg(count, "small"), Arg(x)), {"body": double, "cond": more, "carries": 1 + 1}),
        Sample((Arg(x), Arg(rows), Arg(w)), {"body": step, "carries": 1, "xs": 1, "length": 4, "reverse": False}),
    )


def _register() -> None:
    cond, loop, steps = _samples()
    region = Sample(cond.inputs[1:], {"body": cond.attrs["true"]})
    table = (
        ("checkpoint", _infer_checkpoint, _evaluate_checkpoint, checkpoint_vjp, _lower_checkpoint, (region,)),
        ("cond", _infer_cond, _evaluate_cond, cond_vjp, _lower_cond, (cond,)),
        ("while_loop", _infer_while, _evaluate_while, while_vjp, _lower_while, (loop,)),
        (
            "scan",
            _infer_scan,
            _evaluate_scan,
            scan_vjp,
            _lower_scan,
            (steps, Sample(steps.inputs, {**steps.attrs, "reverse": True})),
        ),
    )
    for name, infer, evaluate, vjp, lower, samples in table:
        register(OpDef(name, infer, evaluate, vjp, _cost, whole, lower, {}, samples))


_register()
