"""Reverse-mode differentiation: from ``@forward`` to one joint graph of primals and cotangents, then split.

For each node, last to first, its op's VJP rule emits ordinary IR that turns the cotangents of its outputs
into cotangents of its inputs; contributions to one value are added in :func:`_accumulate` and nowhere else.
The result is ordinary IR, so it can be differentiated again: ``vjp(vjp(p))`` joins ``@forward`` and
``@backward`` first and differentiates both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from daggc.errors import DifferentiationError, IRError, located
from daggc.interp import decomposition
from daggc.ir.builder import Builder
from daggc.ir.graph import Graph, Node, Port, Program, Value
from daggc.ops import REGISTRY
from daggc.ops.build import conj, zeros_like
from daggc.ops.opdef import AS_IT_IS, HOLOMORPHIC, NOT_DIFFERENTIABLE, REAL_ONLY, Derivative
from daggc.passes.canonicalize import simplify_nodes
from daggc.passes.cse import merge_equal
from daggc.passes.dce import eliminate, live_nodes
from daggc.passes.manager import Pass, register_pass, same_ports
from daggc.passes.split import join, split

DIFFERENTIATED_OUTPUTS = ("output", "grad", "input", "attribute")
WRT = {
    "all": ("param", "input", "cotangent"),
    "params": ("param",),
    "inputs": ("input", "cotangent"),
}


def differentiate(forward: Graph, wrt: Iterable[str] | None = None) -> Graph:
    """The joint graph: ``forward``'s nodes, then those of its VJP.

    Args:
        wrt: refs of input ports (``param:fc.weight``, ``input:0``) to differentiate with respect to; by
            default all parameters, inputs and cotangents of a differentiable dtype.

    Returns:
        A graph with a ``cotangent`` input for each output that depends on ``wrt`` and, beside forward's
        outputs, a ``grad`` output for each port of ``wrt`` that reaches an output.
    """
    return _differentiate(forward, wrt)[0]


def counterparts(forward: Graph, wrt: Iterable[str] | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """Which ports belong together in ``differentiate(forward, wrt)``.

    Names do not tell in higher derivatives: ``cotangent:grad:param:w'`` may belong to ``grad:param:w`` or to
    ``grad:param:w'``.

    Returns:
        Ref of each new cotangent -> ref of its output; ref of each new gradient -> ref of its input.
    """
    return _differentiate(forward, wrt)[1:]


def _differentiate(forward: Graph, wrt: Iterable[str] | None) -> tuple[Graph, dict[str, str], dict[str, str]]:
    b = REGISTRY.builder(forward.name)
    b.reserve(value.name for value in forward.values())
    values = {port.value.name: b.adopt(port) for port in forward.inputs}
    nodes: list[Node] = []
    for node in forward.nodes:
        marked = node if node.origin else replace(node, origin=node.outputs[0].name)
        values.update(zip((v.name for v in node.outputs), b.append(marked, node.inputs), strict=True))
        nodes.append(marked)
    chosen = _chosen(forward, wrt)
    active = _active_values(nodes, {port.value.name for port in chosen})
    cotangents: dict[str, Value] = {}
    refs = {port.ref for port in forward.inputs}
    output_of: dict[str, str] = {}
    input_of: dict[str, str] = {}
    for port in forward.outputs:
        if port.kind in DIFFERENTIATED_OUTPUTS and port.value.name in active:
            target = _unused(refs, "cotangent", port.ref)
            output_of[f"cotangent:{target}"] = port.ref
            ct = b.input(port.value.type, "cotangent", target, name=f"ct_{port.value.name}")
            _accumulate(b, cotangents, port.value, ct)
    _reverse(b, nodes, cotangents, active)
    for port in forward.outputs:
        b.output(values[port.value.name], port.kind, port.target)
    taken = {port.ref for port in forward.outputs}
    for port in chosen:
        if port.value.name in cotangents:
            target = _unused(taken, "grad", port.ref)
            input_of[f"grad:{target}"] = port.ref
            b.output(cotangents[port.value.name], "grad", target)
    return b.build(), output_of, input_of


def _chosen(forward: Graph, wrt: Iterable[str] | None) -> list[Port]:
    if wrt is None:
        return [port for port in forward.inputs_of(*WRT["all"]) if port.value.type.differentiable]
    wanted = set(wrt)
    unknown = wanted - {port.ref for port in forward.inputs if port.value.type.differentiable}
    if unknown:
        raise DifferentiationError(f"@{forward.name} has no differentiable inputs {', '.join(sorted(unknown))}")
    return [port for port in forward.inputs if port.ref in wanted]


def has_gradient(program: Program, wrt: Iterable[str]) -> bool:
    """Whether any output of ``@forward`` depends differentiably on one of these inputs."""
    wanted = set(wrt)
    roots = {port.value.name for port in program.forward.inputs if port.ref in wanted}
    active = _active_values(program.forward.nodes, roots)
    return any(p.kind in DIFFERENTIATED_OUTPUTS and p.value.name in active for p in program.forward.outputs)


def reached(program: Program, outputs: Iterable[str]) -> frozenset[str]:
    """Refs of the inputs of ``@forward`` that any of these outputs depends on differentiably."""
    forward, wanted = program.forward, set(outputs)
    after = {port.value.name for port in forward.outputs if port.ref in wanted}
    for node in reversed(forward.nodes):
        if REGISTRY[node.op].vjp is not NOT_DIFFERENTIABLE and any(value.name in after for value in node.outputs):
            after.update(value.name for value in node.inputs if value.type.differentiable)
    return frozenset(port.ref for port in forward.inputs if port.value.name in after)


def _unused(refs: set[str], kind: str, target: str) -> str:
    """A target whose ref is new; a second derivative's cotangents get a prime."""
    while f"{kind}:{target}" in refs:
        target += "'"
    refs.add(f"{kind}:{target}")
    return target


def _active_values(nodes: Sequence[Node], roots: set[str]) -> set[str]:
    """Names of values that depend differentiably on the roots."""
    active = set(roots)
    for node in nodes:
        if REGISTRY[node.op].vjp is NOT_DIFFERENTIABLE:
            continue
        if any(value.name in active for value in node.inputs):
            outputs = _active_outputs(node, active) if node.attrs.graphs else node.outputs
            active.update(value.name for value in outputs if value.type.differentiable)
    return active


def _active_outputs(node: Node, active: set[str]) -> Sequence[Value]:
    """The outputs of a node with graphs inside that depend on active inputs there; once round a loop or often."""
    known = {place for place, value in enumerate(node.inputs) if value.name in active}
    while True:
        found: set[int] = set()
        for graph in node.attrs.graphs:
            first = len(node.inputs) - len(graph.inputs)  # a predicate comes before what branches read
            roots = {port.value.name for place, port in enumerate(graph.inputs, first) if place in known}
            inside = _active_values(graph.nodes, roots)
            found |= {place for place, port in enumerate(graph.outputs) if port.value.name in inside}
        carried = {place for place in found if place < node.attrs.get("carries", 0)}
        if carried <= known:
            return [node.outputs[place] for place in sorted(found)]
        known |= carried


def _reverse(b: Builder, nodes: Sequence[Node], cotangents: dict[str, Value], active: set[str]) -> None:
    """Walk nodes last to first, adding to ``cotangents`` (by name of the primal value)."""
    for node in reversed(nodes):
        cts = [cotangents.get(value.name) for value in node.outputs]
        if all(ct is None for ct in cts) or not any(value.name in active for value in node.inputs):
            continue
        with b.at(node.path, node.source, node.origin):
            for value, ct in zip(node.inputs, _pull_back(b, node, cts, active), strict=True):
                if ct is not None and value.name in active:
                    if ct.type != value.type:
                        raise DifferentiationError(
                            located(
                                f"the VJP rule of {node.op!r} gave a {ct.type} for an input of type {value.type}",
                                node.path,
                                node.source,
                            )
                        )
                    _accumulate(b, cotangents, value, ct)


def _pull_back(b: Builder, node: Node, cts: Sequence[Value | None], active: set[str]) -> Sequence[Value | None]:
    """Cotangents of a node's inputs, by its op's rule."""
    op = REGISTRY[node.op]
    if op.vjp is NOT_DIFFERENTIABLE:
        return [None] * len(node.inputs)
    if node.attrs.graphs and not isinstance(op.vjp, Derivative):
        wanted = [value.name in active and value.type.differentiable for value in node.inputs]
        return op.vjp(b, node, cts, _Pullbacks(wanted))
    if not isinstance(op.vjp, Derivative):
        if not _is_complex(node) or op.complex is AS_IT_IS:
            return op.vjp(b, node, cts)
        if op.complex is HOLOMORPHIC:
            return _conjugated(b, op.vjp(b, node, _conjugated(b, cts)))
        raise DifferentiationError(
            located(f"the VJP of {node.op!r} holds for real numbers, not for complex ones", node.path, node.source)
        )
    assert op.decompose is not None, "OpDef requires it for BY_DECOMPOSITION"
    start = len(b.nodes)
    outputs = op.decompose(b, node, *node.inputs)
    inner = list(b.nodes[start:])
    inner_cotangents: dict[str, Value] = {}
    for value, ct in zip(outputs, cts, strict=True):
        if ct is not None:
            _accumulate(b, inner_cotangents, value, ct)
    roots = {value.name for value in node.inputs if value.name in active}
    _reverse(b, inner, inner_cotangents, _active_values(inner, roots))
    # An input given twice has one entry for both uses; hand it over once.
    first_use = {value.name: index for index, value in reversed(list(enumerate(node.inputs)))}
    return [
        inner_cotangents.get(value.name) if first_use[value.name] == index else None
        for index, value in enumerate(node.inputs)
    ]


def _is_complex(node: Node) -> bool:
    return any(value.type.is_complex for value in (*node.inputs, *node.outputs))


def _conjugated(b: Builder, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    """A rule that multiplies by a factor f multiplies by conj(f) between two conjugations, which cost nothing
    in a chain of such rules: those that meet there cancel (``canonicalize``)."""
    return [None if ct is None else conj(b, ct) for ct in cts]


def has_rule(node: Node) -> bool:
    """Whether a node can be differentiated: the rules of some ops hold for real numbers only."""
    op = REGISTRY[node.op]
    if op.vjp is NOT_DIFFERENTIABLE or node.attrs.graphs or not _is_complex(node):
        return True
    if isinstance(op.vjp, Derivative):
        return all(map(has_rule, decomposition(node).nodes))
    return op.complex is not REAL_ONLY


@dataclass(frozen=True)
class _Pullbacks:
    """Pullbacks of graphs inside a node; see :class:`daggc.ops.opdef.Pullbacks`."""

    wanted: Sequence[bool]

    def reached(self, graph: Graph, wrt: Sequence[int], given: Sequence[int]) -> list[int]:
        _, cotangents = self._reversed(graph, wrt, given)
        return [index for index in wrt if graph.inputs[index].value.name in cotangents]

    def __call__(self, graph: Graph, wrt: Sequence[int], given: Sequence[int]) -> Graph:
        b, cotangents = self._reversed(graph, wrt, given)
        for place, index in enumerate(wrt):
            value = graph.inputs[index].value
            b.output(cotangents.get(value.name) or zeros_like(b, value), "output", str(place))
        joint = b.build()
        needed = live_nodes(joint, {port.value.name for port in joint.outputs})  # not what is run for its effects
        return simplify(replace(joint, nodes=tuple(needed)))

    def _reversed(self, graph: Graph, wrt: Sequence[int], given: Sequence[int]) -> tuple[Builder, dict[str, Value]]:
        b = REGISTRY.builder(graph.name)
        b.reserve(value.name for value in graph.values())
        for port in graph.inputs:
            b.adopt(port)
        for node in graph.nodes:
            b.append(node, node.inputs)
        cotangents: dict[str, Value] = {}
        for index in given:
            value = graph.outputs[index].value
            ct = b.input(value.type, "input", str(b.arity), name=f"ct_{value.name}")
            _accumulate(b, cotangents, value, ct)
        active = _active_values(graph.nodes, {graph.inputs[index].value.name for index in wrt})
        _reverse(b, [replace(node, origin="") for node in graph.nodes], cotangents, active)
        return b, cotangents


def _accumulate(b: Builder, cotangents: dict[str, Value], primal: Value, ct: Value) -> None:
    known = cotangents.get(primal.name)
    cotangents[primal.name] = ct if known is None else b.emit("add", known, ct)


def simplify(graph: Graph) -> Graph:
    """What is run on a joint graph before it is split.

    What nobody asked for goes first: a cotangent would be merged with it, and belong where it was.
    """
    return eliminate(merge_equal(eliminate(simplify_nodes(graph))))


def vjp(program: Program, wrt: Iterable[str] | None = None) -> Program:
    """Add ``@backward`` to a program; on one that has it, differentiate both graphs together.

    Args:
        wrt: refs of the inputs to differentiate with respect to; see :func:`differentiate`.

    Raises:
        DifferentiationError: ``wrt`` names an input that is not there or not differentiable, or no output
            depends on it.
    """
    if "backward" in program.graphs:
        program = joined(program)
    joint = simplify(differentiate(program.forward, wrt))
    if len(joint.inputs) == len(program.forward.inputs):
        raise DifferentiationError("no output of @forward depends differentiably on what was asked for")
    return replace(program, graphs={}).with_graphs(*split(joint, program.forward), provenance="vjp")


def joined(program: Program) -> Program:
    """The program whose ``@forward`` does what both graphs did: it gives the outputs and the gradients."""
    forward = join(program.forward, program.backward)
    return replace(program, graphs={"forward": forward}, in_tree=None, out_tree=None)


@register_pass
@dataclass(frozen=True)
class VJP(Pass):
    """Write the backward pass out. ``wrt``: ``all``, ``params`` or ``inputs``."""

    name: ClassVar[str] = "vjp"
    wrt: str = "all"

    def requires(self, program: Program) -> None:
        if "forward" not in program.graphs:
            raise IRError("vjp needs a program with a graph @forward")
        if self.wrt not in WRT:
            raise IRError(f"wrt is one of {', '.join(WRT)}, got {self.wrt!r}")

    def apply(self, program: Program) -> Program:
        ports = program.forward.inputs_of(*WRT[self.wrt])
        return vjp(program, [port.ref for port in ports if port.value.type.differentiable])

    def ensures(self, before: Program, after: Program) -> None:
        if "backward" not in before.graphs:
            kept = replace(after.forward, outputs=tuple(p for p in after.forward.outputs if p.kind != "residual"))
            if not same_ports(before.forward, kept):
                raise IRError("vjp changed the inputs or outputs of @forward")
