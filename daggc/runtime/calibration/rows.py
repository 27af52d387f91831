"""From measured times of nodes to what a device keeps: curves by op and op class, rates, and times of exact nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from daggc.ir.graph import Graph
from daggc.plan.cost import Costs, Kind
from daggc.plan.curves import Curve, Row, curve_of

Measured = Iterable[tuple[Graph, Sequence[float]]]  # graphs and the seconds of each of their nodes


def curves_of(measured: Measured) -> dict[str, Curve]:
    """Curves by op, of nodes in f32 where an op has any, and by op class, of all ops in it."""
    rows: dict[Kind, list[Row]] = {}
    for graph, seconds in measured:
        costs = Costs.of(graph.nodes)
        for number, flops, nbytes, each in zip(costs.kinds, costs.flops, costs.bytes, seconds, strict=True):
            rows.setdefault(costs.names[number], []).append((float(flops), float(nbytes), each))
    ops: dict[str, list[Row]] = {}
    classes: dict[str, list[Row]] = {}
    in_f32 = {kind.op for kind in rows if kind.dtype == "f32"}
    for kind, own in rows.items():
        if kind.dtype == "f32" or kind.op not in in_f32:
            ops.setdefault(kind.op, []).extend(own)
            classes.setdefault(kind.op_class, []).extend(own)
    class_of = {kind.op: kind.op_class for kind in rows}
    for kernel in [name for name in ops if " " in name]:  # kernels that were not measured are like those that were
        op = kernel.partition(" ")[0]
        if op not in class_of:
            ops.setdefault(op, []).extend(ops[kernel])
    class_of.update((op, class_of[kernel]) for kernel in [*class_of] if (op := kernel.partition(" ")[0]) in ops)
    extended = {op: [*own, *_beyond(own, classes[class_of[op]])] for op, own in ops.items()}
    return {name: curve_of(own) for name, own in sorted({**classes, **extended}.items())}


def _beyond(own: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """Rows of the op class that are much larger than an op's own: small rows tell nothing of the memory's speed."""
    largest = max(nbytes for _, nbytes, _ in own)
    return [row for row in others if row[1] > 8 * largest] if largest else []


def profile_of(measured: Measured) -> dict[str, float]:
    """Median seconds of exact nodes, by :func:`daggc.plan.cost.node_key`."""
    times: dict[str, list[float]] = {}
    for graph, seconds in measured:
        for key, each in zip(Costs.of(graph.nodes).keys, seconds, strict=True):
            times.setdefault(key, []).append(each)
    return {key: median(own) for key, own in sorted(times.items())}


def rates_of(curves: Mapping[str, Curve], classes: Iterable[str]) -> dict[str, float]:
    """FLOP/s of op classes: the best that was measured; for readers, and where a part asks for one number."""
    best = {name: max(flops / seconds for flops, _, seconds in curves[name].rows) for name in classes if name in curves}
    return {name: rate for name, rate in best.items() if rate > 0}


def bandwidth_of(curves: Mapping[str, Curve]) -> float:
    """Bytes/s of the largest elementwise op that was measured."""
    _, nbytes, seconds = max(curves["elementwise"].rows, key=lambda row: row[1])
    return nbytes / seconds
