"""Derivatives of control flow: each is control flow again, over the pullbacks of the graphs inside.

Branches and steps are computed again from what entered them, so nothing of their inside is a residual.

* ``checkpoint``: a ``checkpoint`` of the pullback.
* ``cond``: a ``cond`` on the same predicate, of the branches' pullbacks.
* ``scan``: a ``scan`` the other way round that carries the cotangents of the carries and the sums of those of
  what every step reads. It scans what the carries were before each step.
* ``while_loop``: the number of steps is not known, so nothing can be stacked. A loop counts them, and another
  goes back over them; what the carries were before step k is computed again from the start, k steps. Slow (the
  square of the steps) and exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from daggc.ir.builder import Builder
from daggc.ir.graph import Graph, Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import full, zeros_like
from daggc.ops.opdef import Pullbacks

COUNT = TensorType("i64", ())
Cotangents = Sequence[Value | None]


def checkpoint_vjp(b: Builder, node: Node, cts: Cotangents, pullback: Pullbacks) -> Cotangents:
    given = [index for index, ct in enumerate(cts) if ct is not None]
    wrt = pullback.reached(node.attrs["body"], [i for i, wanted in enumerate(pullback.wanted) if wanted], given)
    if not wrt:
        return [None] * len(node.inputs)
    graph = pullback(node.attrs["body"], wrt, given)
    inputs = [*node.inputs, *(ct for ct in cts if ct is not None)]
    read = _reads([graph])
    results = b.emit_many("checkpoint", *(inputs[index] for index in read), body=_with_inputs(graph, read))
    return _placed(results, wrt, len(node.inputs))


def cond_vjp(b: Builder, node: Node, cts: Cotangents, pullback: Pullbacks) -> Cotangents:
    operands = node.inputs[1:]
    wrt = [index for index, wanted in enumerate(pullback.wanted[1:]) if wanted]
    given = [index for index, ct in enumerate(cts) if ct is not None]
    wrt = sorted({index for graph in node.attrs.graphs for index in pullback.reached(graph, wrt, given)})
    if not wrt:
        return [None] * len(node.inputs)
    branches: dict[str, Any] = {name: pullback(node.attrs[name], wrt, given) for name in ("true", "false")}
    inputs = [*operands, *(ct for ct in cts if ct is not None)]
    read = _reads(branches.values())
    branches = {name: _with_inputs(graph, read) for name, graph in branches.items()}
    results = b.emit_many("cond", node.inputs[0], *(inputs[index] for index in read), **branches)
    return [None, *_placed(results, wrt, len(operands))]


def scan_vjp(b: Builder, node: Node, cts: Cotangents, pullback: Pullbacks) -> Cotangents:
    count, slices = node.attrs["carries"], node.attrs["xs"]
    body: Graph = node.attrs["body"]
    carries = node.inputs[:count]
    smooth = [index for index, value in enumerate(carries) if value.type.differentiable]
    wanted = [index for index in range(count, len(node.inputs)) if pullback.wanted[index]]
    scanned, summed = [i for i in wanted if i < count + slices], [i for i in wanted if i >= count + slices]
    stacked = [index for index in range(count, len(cts)) if cts[index] is not None]
    step = pullback(body, [*smooth, *scanned, *summed], [*smooth, *stacked])
    read = set(_reads([step]))
    kept = [index for index in range(count) if index in read]
    used = [index for index in range(count, count + slices) if index in read]
    others = [index for index in range(count + slices, len(node.inputs)) if index in read]
    histories = _histories(b, node, kept)

    inner = b.like(body.name)
    types = [port.value.type for port in body.inputs]
    cotangent = [inner.input(types[index], "input", str(place)) for place, index in enumerate(smooth)]
    sums = [_next_input(inner, types[index]) for index in summed]
    values: dict[int, Value] = {index: _next_input(inner, types[index]) for index in (*kept, *used)}
    slopes = [_next_input(inner, body.outputs[index].value.type) for index in stacked]
    values |= {index: _next_input(inner, types[index]) for index in others}
    values |= dict(enumerate((*cotangent, *slopes), len(types)))
    results = inline(inner, step, values)
    before, parts, terms = _cut(results, len(smooth), len(scanned))
    totals = [inner.emit("add", total, term) for total, term in zip(sums, terms, strict=True)]
    _finish(inner, (*before, *totals, *parts))

    start = [_or_zeros(b, cts[index], carries[index]) for index in smooth]
    start += [zeros_like(b, node.inputs[index]) for index in summed]
    outer = [*histories, *(node.inputs[index] for index in used), *(ct for ct in cts[count:] if ct is not None)]
    outputs = b.emit_many(
        "scan",
        *start,
        *outer,
        *(node.inputs[index] for index in others),
        body=inner.build(),
        carries=len(start),
        xs=len(outer),
        length=node.attrs["length"],
        reverse=not node.attrs["reverse"],
    )
    return _placed(outputs, [*smooth, *summed, *scanned], len(node.inputs))


def _histories(b: Builder, node: Node, kept: Sequence[int]) -> list[Value]:
    """What carries were before each step, stacked; shifted results where they are among them, else computed again."""
    count, body = node.attrs["carries"], node.attrs["body"]
    found: dict[int, Value] = {}
    results = [port.value.name for port in body.outputs]
    for index in kept:
        if results[index] in results[count:]:
            stack = node.outputs[count + results[count:].index(results[index])]
            found[index] = _shifted(b, node.inputs[index], stack, node.attrs["reverse"])
    missing = [index for index in kept if index not in found]
    if missing:
        inner = b.like(body.name)
        values = [inner.input(port.value.type, "input", str(place)) for place, port in enumerate(body.inputs)]
        new = inline(inner, body, dict(enumerate(values)))
        _finish(inner, (*new[:count], *(values[index] for index in missing)))
        outputs = b.emit_many("scan", *node.inputs, **{**node.attrs, "body": inner.build()})
        found.update(zip(missing, outputs[count:], strict=True))
    return [found[index] for index in kept]


def _shifted(b: Builder, first: Value, stack: Value, reverse: bool) -> Value:
    """What a carry was before each step, from what it was after it."""
    length = stack.type.shape[0]
    start = b.emit("reshape", first, shape=(1, *first.type.shape))
    if length == 1:
        return start
    rest = b.emit("slice", stack, dim=0, start=int(reverse), end=length - 1 + int(reverse), step=1)
    return b.emit("concat", *((rest, start) if reverse else (start, rest)), dim=0)


def while_vjp(b: Builder, node: Node, cts: Cotangents, pullback: Pullbacks) -> Cotangents:
    count = node.attrs["carries"]
    body, goes_on = node.attrs["body"], node.attrs["cond"]
    types = [value.type for value in node.inputs]
    smooth = [index for index in range(count) if types[index].differentiable]
    summed = [index for index in range(count, len(types)) if pullback.wanted[index]]
    step = pullback(body, [*smooth, *summed], smooth)
    zero = full(b, 0, (), "i64")

    def one_more(inner: Builder, n: Value, *x: Value) -> list[Value]:
        return [_plus(inner, n, 1), *inline(inner, body, x)]

    counting: dict[str, Any] = {
        "cond": _loop_graph(b, goes_on.name, [COUNT, *types], lambda inner, n, *x: inline(inner, goes_on, x)),
        "body": _loop_graph(b, body.name, [COUNT, *types], one_more),
    }
    steps = b.emit_many("while_loop", zero, *node.inputs, carries=1 + count, **counting)[0]

    # The carries before step ``last``, from the start.
    again_types = [COUNT, *types[:count], COUNT, *types[count:]]

    def again(inner: Builder, n: Value, *rest: Value) -> list[Value]:
        return [_plus(inner, n, 1), *inline(inner, body, [*rest[:count], *rest[count + 1 :]])]

    repeat: dict[str, Any] = {
        "cond": _loop_graph(b, goes_on.name, again_types, lambda inner, n, *x: [inner.emit("lt", n, x[count])]),
        "body": _loop_graph(b, body.name, again_types, again),
    }
    moving = [COUNT, *(types[index] for index in (*smooth, *summed))]

    def back(inner: Builder, left: Value, *rest: Value) -> list[Value]:
        cotangents, sums, inputs = _cut(rest, len(smooth), len(summed))
        last = _plus(inner, left, -1)
        start = full(inner, 0, (), "i64")
        state = inner.emit_many(
            "while_loop", start, *inputs[:count], last, *inputs[count:], carries=1 + count, **repeat
        )[1:]
        results = inline(inner, step, [*state, *inputs[count:], *cotangents])
        totals = [inner.emit("add", total, term) for total, term in zip(sums, results[len(smooth) :], strict=True)]
        return [last, *results[: len(smooth)], *totals]

    start = [_or_zeros(b, cts[index], node.inputs[index]) for index in smooth]
    outputs = b.emit_many(
        "while_loop",
        steps,
        *start,
        *(zeros_like(b, node.inputs[index]) for index in summed),
        *node.inputs,
        carries=len(moving),
        cond=_loop_graph(b, "more", [*moving, *types], lambda inner, n, *_: [inner.emit("gt_scalar", n, value=0)]),
        body=_loop_graph(b, "back", [*moving, *types], back),
    )
    return _placed(outputs[1:], [*smooth, *summed], len(node.inputs))


def _loop_graph(b: Builder, name: str, types: Sequence[TensorType], emit: Callable[..., Sequence[Value]]) -> Graph:
    inner = b.like(name)
    inputs = [_next_input(inner, type_) for type_ in types]
    _finish(inner, emit(inner, *inputs))
    return inner.build()


def _plus(b: Builder, x: Value, number: int) -> Value:
    return b.emit("add_scalar", x, value=number)


# --- graphs in graphs ---------------------------------------------------------------------------------


def inline(b: Builder, graph: Graph, inputs: Sequence[Value] | dict[int, Value]) -> list[Value]:
    """Append a graph's nodes; returns its outputs. Inputs that it does not read need not be given."""
    known = dict(enumerate(inputs)) if not isinstance(inputs, dict) else inputs
    values = {port.value.name: known[place] for place, port in enumerate(graph.inputs) if place in known}
    for node in graph.nodes:
        outputs = b.append(node, [values[value.name] for value in node.inputs], rename=True)
        values.update(zip((value.name for value in node.outputs), outputs, strict=True))
    return [values[port.value.name] for port in graph.outputs]


def _next_input(b: Builder, type_: TensorType) -> Value:
    return b.input(type_, "input", str(b.arity))


def _finish(b: Builder, outputs: Sequence[Value]) -> None:
    for place, value in enumerate(outputs):
        b.output(value, "output", str(place))


def _reads(graphs: Iterable[Graph]) -> list[int]:
    """Positions of inputs that at least one of the graphs reads or gives back."""
    read: set[int] = set()
    for graph in graphs:
        names = {value.name for node in graph.nodes for value in node.inputs}
        names |= {port.value.name for port in graph.outputs}
        read |= {place for place, port in enumerate(graph.inputs) if port.value.name in names}
    return sorted(read)


def _with_inputs(graph: Graph, places: Sequence[int]) -> Graph:
    """The graph with these inputs only."""
    ports = [replace(graph.inputs[place], target=str(new)) for new, place in enumerate(places)]
    return replace(graph, inputs=tuple(ports))


def _or_zeros(b: Builder, ct: Value | None, like: Value) -> Value:
    return zeros_like(b, like) if ct is None else ct


def _cut(items: Sequence[Value], first: int, second: int) -> tuple[Sequence[Value], Sequence[Value], Sequence[Value]]:
    return items[:first], items[first : first + second], items[first + second :]


def _placed(values: Sequence[Value], places: Sequence[int], count: int) -> list[Value | None]:
    """One entry for each of ``count`` inputs; there may be more values than places."""
    found: list[Value | None] = [None] * count
    for place, value in zip(places, values, strict=True):
        found[place] = value
    return found
