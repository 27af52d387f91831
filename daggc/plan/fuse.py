"""A forward and the backward that follows it on the same device at once become one task.

A task costs a message to the scheduler and back, and what one leaves for the next is a result that Dask keeps. On
the last stage of a pipeline, and where the whole model is on one device, the backward of a microbatch follows its
forward with nothing to wait for in between: one body runs both, and residuals live and die inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from daggc.ir.attrs import Attrs
from daggc.ir.graph import Graph, Node, Port, Program, Value
from daggc.ops import REGISTRY
from daggc.ops.call import declare
from daggc.ops.control_vjp import inline
from daggc.plan.part import Step
from daggc.plan.schedule.tasks import BACKWARD, FORWARD, FORWARD_BACKWARD


def fused(step: Step) -> Step:
    """The step with every such pair as one call, of phase ``forward_backward`` and a name such as ``FB1.0``.

    A pair is fused where the backward comes next on its device, reads what the forward made and waits for nothing
    that the forward does not wait for; and where no other device waits for what the forward made.
    """
    graph = step.graph
    pairs = _pairs(graph)
    if not pairs:
        return step
    fusion = _Fusion(step.program, graph)
    nodes: list[Node] = []
    followers = set(pairs.values())
    for index, node in enumerate(graph.nodes):
        if index in pairs:
            nodes.append(fusion.fuse(node, graph.nodes[pairs[index]]))
        elif index not in followers:
            nodes.append(node)
    main = replace(graph, nodes=tuple(fusion.waiting(node) for node in nodes))
    used = {str(node.attrs["callee"]) for node in main.nodes if node.op == "call"}
    bodies = {**step.program.graphs, **fusion.bodies}
    graphs = {name: body for name, body in bodies.items() if name == "step" or name in used}
    return replace(step, program=replace(step.program, graphs={**graphs, "step": main}))


def _pairs(graph: Graph) -> dict[int, int]:
    """Positions of forwards and of the backwards that are fused with them."""
    sent = {value.name for node in graph.nodes if node.op == "transfer" for value in node.inputs}
    made = {value.name: index for index, node in enumerate(graph.nodes) for value in node.outputs}
    named = {str(node.attrs["task"]): index for index, node in enumerate(graph.nodes) if "task" in node.attrs}
    latest: dict[str, int] = {}  # device -> its last call so far
    pairs: dict[int, int] = {}
    for index, node in enumerate(graph.nodes):
        if node.op != "call":
            continue
        before = latest.get(node.attrs["device"])
        latest[node.attrs["device"]] = index
        if before is None or not _follows(graph.nodes[before], node):
            continue
        forward = graph.nodes[before]
        own = {value.name for value in forward.outputs}
        known = {value.name for value in forward.inputs}
        waits = {made[value.name] for value in node.inputs if value.name in made and value.name not in own | known}
        waits |= {named[task] for task in node.attrs.get("after", ()) if task in named} - {before}
        awaited = {made[name] for name in known if name in made}
        awaited |= {named[task] for task in forward.attrs.get("after", ()) if task in named}
        if not own & sent and waits <= awaited:
            pairs[before] = index
    return pairs


def _follows(first: Node, second: Node) -> bool:
    """Whether two calls are a microbatch's forward and backward at one stage."""
    phases = first.attrs.get("phase"), second.attrs.get("phase")
    alike = all(first.attrs.get(name) == second.attrs.get(name) for name in ("stage", "microbatch"))
    return phases == (FORWARD, BACKWARD) and alike and bool({*first.outputs} & {*second.inputs})


class _Fusion:
    """Makes fused calls and their bodies; pairs of the same bodies, wired alike, share one."""

    def __init__(self, program: Program, graph: Graph) -> None:
        self.program = program
        self.bodies: dict[str, Graph] = {}
        self.renamed: dict[str, str] = {}  # task -> the fused one that it is part of
        self._names: dict[object, str] = {}
        self._readers: dict[str, int] = {}
        for name in [v.name for n in graph.nodes for v in n.inputs] + [port.value.name for port in graph.outputs]:
            self._readers[name] = self._readers.get(name, 0) + 1

    def fuse(self, forward: Node, backward: Node) -> Node:
        inputs = tuple(dict.fromkeys([*forward.inputs, *(v for v in backward.inputs if v not in forward.outputs)]))
        inside = [value for value in forward.outputs if self._readers.get(value.name, 0) == (value in backward.inputs)]
        outputs = [value for value in forward.outputs if value not in inside] + [*backward.outputs]
        task = f"FB{str(forward.attrs['task']).removeprefix('F')}"
        self.renamed |= {str(node.attrs["task"]): task for node in (forward, backward)}
        body = self._body(forward, backward, inputs, outputs)
        after = {"after": forward.attrs["after"]} if "after" in forward.attrs else {}
        attrs = {
            **declare([value.type for value in outputs]), "callee": body.name, "phase": FORWARD_BACKWARD,
            "task": task, **{name: forward.attrs[name] for name in ("device", "stage", "microbatch")}, **after,
        }  # fmt: skip
        return replace(forward, inputs=inputs, outputs=tuple(outputs), attrs=Attrs(attrs), origin=body.name)

    def _body(self, forward: Node, backward: Node, inputs: Sequence[Value], outputs: Sequence[Value]) -> Graph:
        """The graph of both: its inputs and outputs are those of the fused call."""
        callees = [str(node.attrs["callee"]) for node in (forward, backward)]
        places = {value: index for index, value in enumerate(dict.fromkeys([*inputs, *forward.outputs]))}
        wiring = [tuple(places[value] for value in node.inputs) for node in (forward, backward)]
        kept = tuple(places.get(value, -1) for value in outputs)
        key = (*callees, *wiring, kept)
        if key in self._names:
            return self.bodies[self._names[key]]
        name = _distinct(callees[1].replace(BACKWARD, FORWARD_BACKWARD, 1), {*self.program.graphs, *self.bodies})
        first, second = (self.program[callee] for callee in callees)
        ports: dict[Value, Port] = {}
        for node, body in ((forward, first), (backward, second)):
            for value, port in zip(node.inputs, body.inputs, strict=True):
                ports.setdefault(value, port)
        b = REGISTRY.builder(name)
        b.reserve(value.name for body in (first, second) for value in body.values())
        values = {value: b.adopt(ports[value]) for value in inputs}
        targets: dict[Value, Port] = {}
        for node, body in ((forward, first), (backward, second)):
            results = inline(b, body, [values[value] for value in node.inputs])
            values.update(zip(node.outputs, results, strict=True))
            targets.update(zip(node.outputs, body.outputs, strict=True))
        for value in outputs:
            b.output(values[value], targets[value].kind, targets[value].target)
        self.bodies[name] = b.build()
        self._names[key] = name
        return self.bodies[name]

    def waiting(self, node: Node) -> Node:
        """A call that waits for tasks by their new names."""
        if "after" not in node.attrs:
            return node
        after = tuple(dict.fromkeys(self.renamed.get(name, name) for name in node.attrs["after"]))
        return replace(node, attrs=Attrs({**node.attrs, "after": after}))


def _distinct(name: str, taken: set[str]) -> str:
    count, found = 1, name
    while found in taken:
        count, found = count + 1, f"{name}.{count}"
    return found
