"""Outlining: from a joint graph and a stage for each forward node to a graph of ``call`` nodes and task bodies.

A stage has up to three tasks. ``forward`` holds what the primal's outputs need, ``backward`` the cotangents;
with ``split_backward``, what no other stage waits for (gradients of parameters) is a third, ``weight_grad``.

    F0 -> F1 -> F2          values flow from low stages to high ones in the forward phase
     |     |     |          residuals stay within a stage
    B0 <- B1 <- B2          cotangents flow from high stages to low ones
     |     |     |
    W0 <- W1 <- W2          (gradients of parameters that two stages share are added here)

Stages need not be a chain: of two towers neither reads the other, and their tasks may run at the same time. All that
is asked for is that values never go from a higher stage to a lower one. A node that was merged with an equal one of
another stage (:mod:`daggc.passes.cse`) could break that, and could tie stages together that are independent;
:mod:`daggc.plan.settle` sees to it. So the graph of tasks is acyclic and every task convex.

Cheap values are made again in each task that reads them rather than sent or kept: views, constants, and
arithmetic on integers and constants alone (causal masks, position ids), where that makes no task's input larger.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from daggc.ir.attrs import Attrs
from daggc.ir.graph import Graph, Node, Port, Value
from daggc.ops import REGISTRY
from daggc.ops.call import declare
from daggc.passes.dce import live_nodes
from daggc.passes.split import RECOMPUTED
from daggc.plan.settle import settle

FORWARD, BACKWARD, WEIGHT_GRAD = "forward", "backward", "weight_grad"
RESIDENT = ("param", "buffer", "constant", "state")  # kinds of inputs that live on one device between runs
_OPAQUE = ("python.call", "torch.call")
_CHEAP = ("elementwise", "view")
_DEPTH = 40  # of a chain of cheap nodes that is looked at


def origin_of(node: Node) -> str:
    """The name that ``stage_of`` knows a node by: the first output of the forward node it belongs to."""
    return node.origin or node.outputs[0].name


def outline(
    joint: Graph, primal: Graph, stage_of: Mapping[str, int], *, split_backward: bool = False
) -> tuple[Graph, dict[str, Graph]]:
    """Cut a joint graph into tasks.

    Args:
        joint: what ``differentiate`` made of ``primal``, or ``primal`` itself for inference.
        primal: its outputs tell the forward phase from the backward.
        stage_of: first output name of each forward node -> stage. Along every edge of ``primal`` the stage
            must not fall.
        split_backward: make a task of its own of the gradients of a stage's parameters.

    Returns:
        The graph ``joint`` of ``call`` nodes, unplaced, with the ports of the joint graph, and the bodies by
        name (``stage0.forward``). A call has the attributes ``callee``, ``dtypes``, ``shapes``, ``stage`` and
        ``phase`` and a path that sums up the modules in it. A body's ports keep kind and target of those of
        the joint graph; a value between tasks has the kind ``value`` and its name as target.

    Raises:
        PlanError: a node's origin has no stage.
    """
    settled = settle(joint, primal, _forward_names(joint, primal), stage_of, cheap_values(primal))
    joint, stages, forward = settled.graph, settled.stages, settled.forward
    phases = _phases(joint, forward, stages, split_backward)
    members: dict[tuple[int, str], list[Node]] = {}
    for node in joint.nodes:
        name = node.outputs[0].name
        members.setdefault((stages[name], phases[name]), []).append(node)
    order = sorted(members, key=_task_order)
    sharing = _Sharing.of(joint, stages)
    wanted = {port.value.name for port in joint.outputs}
    calls: list[Node] = []
    bodies: dict[str, Graph] = {}
    for key in reversed(order):
        task = _task(joint, key, members[key], wanted, sharing)
        if task is not None:
            call, body = task
            wanted.update(value.name for value in call.inputs)
            bodies[body.name] = body
            calls.append(call)
    calls, bodies = _at_hand(calls[::-1], dict(reversed(bodies.items())))
    return Graph("joint", joint.inputs, tuple(calls), joint.outputs), bodies


def _forward_names(joint: Graph, primal: Graph) -> set[str]:
    """First output names of the nodes of the forward phase, as :func:`daggc.passes.split.split` has it."""
    refs = {port.ref for port in primal.outputs}
    roots = {port.value.name for port in joint.outputs if port.ref in refs}
    roots |= {value.name for node in primal.nodes if node.holds("python.call") for value in node.outputs}
    return {node.outputs[0].name for node in live_nodes(joint, roots)}


def _phases(joint: Graph, forward: Set[str], stages: Mapping[str, int], split_backward: bool) -> dict[str, str]:
    """The phase of each node, by its first output."""
    phases = {node.outputs[0].name: FORWARD if node.outputs[0].name in forward else BACKWARD for node in joint.nodes}
    if not split_backward:
        return phases
    first = {value.name: node.outputs[0].name for node in joint.nodes for value in node.outputs}
    gradients = _gradients_alone(joint)
    # Walk back from what leaves a stage: cotangents that other stages read, and results other than gradients
    # of parameters.
    urgent = {port.value.name for port in joint.outputs} - gradients
    for node in reversed(joint.nodes):
        name = node.outputs[0].name
        if name in forward:
            continue
        here = any(value.name in urgent for value in node.outputs)
        for value in node.inputs:
            source = first.get(value.name)
            crosses = source is not None and stages[source] != stages[name] and value.name not in gradients
            if here or crosses:
                urgent.add(value.name)
    split: dict[str, str] = {}
    busy: set[int] = set()  # stages that something waits for
    for node in joint.nodes:
        name = node.outputs[0].name
        if name not in forward:
            split[name] = BACKWARD if any(value.name in urgent for value in node.outputs) else WEIGHT_GRAD
            if split[name] == BACKWARD:
                busy.add(stages[name])
    return phases | {name: phase if stages[name] in busy else BACKWARD for name, phase in split.items()}


def _gradients_alone(joint: Graph) -> set[str]:
    """Values that are gradients of parameters or terms of their sums, and nothing else."""
    alone = {port.value.name for port in joint.outputs_of("grad") if port.target.startswith("param:")}
    alone -= {port.value.name for port in joint.outputs if port.kind != "grad" or not port.target.startswith("param:")}
    others: set[str] = set()
    for node in reversed(joint.nodes):
        # A value is judged where it is made: every user has been seen by then.
        term = node.op == "add" and node.output.name in alone and node.output.name not in others
        for value in node.inputs:
            (alone if term else others).add(value.name)
    return alone - others


def _task_order(key: tuple[int, str]) -> tuple[int, int, str]:
    """Forward tasks by rising stage, then backward ones by falling stage, each with its weight gradients."""
    stage, phase = key
    return (0, stage, "") if phase == FORWARD else (1, -stage, phase)


def _task(
    joint: Graph, key: tuple[int, str], own: Sequence[Node], wanted: set[str], sharing: _Sharing
) -> tuple[Node, Graph] | None:
    """The call and the body of one task, which gives what is ``wanted`` of it; None if that is nothing."""
    stage, phase = key
    effects = {value.name for node in own if node.holds("python.call") for value in node.outputs}
    kept = live_nodes(
        Graph("", (), tuple(own), ()), {v.name for n in own for v in n.outputs if v.name in wanted} | effects
    )
    unread = effects - {value.name for node in kept for value in node.inputs}  # results, so that the task is not dead
    results = [value for node in kept for value in node.outputs if value.name in wanted or value.name in unread]
    if not results:
        return None
    again = sharing.remade(kept, stage)
    nodes = sorted((*again, *kept), key=sharing.position)
    made = {value.name for node in nodes for value in node.outputs}
    reads = dict.fromkeys(value for node in nodes for value in node.inputs if value.name not in made)
    ports = {port.value.name: port for port in reversed(joint.outputs)}
    inputs = sorted(reads, key=lambda value: sharing.rank[value.name])
    body = Graph(
        f"stage{stage}.{phase}",
        tuple(sharing.inputs.get(value.name) or Port(value, "value", value.name) for value in inputs),
        tuple(nodes),
        tuple(ports.get(value.name) or Port(value, "value", value.name) for value in results),
    )
    attrs = {**declare([value.type for value in results]), "callee": body.name, "stage": stage, "phase": phase}
    path = summarize_paths(node.path for node in (kept if phase == FORWARD else reversed(kept)))
    return Node("call", tuple(inputs), tuple(results), Attrs(attrs), path), body


def cheap_values(graph: Graph) -> frozenset[str]:
    """Names of values that cost next to nothing to make again from their inputs.

    Views and constants, and arithmetic on what comes from integers and constants alone: no parameter, no
    random key, no Python function.
    """
    plain = {
        port.value.name
        for port in graph.inputs
        if port.kind in ("input", "buffer", "constant") and not port.value.type.differentiable
    }
    cheap: set[str] = set()
    for node in graph.nodes:
        names = [value.name for value in node.outputs]
        if node.op in RECOMPUTED:
            cheap.update(names)
        if not node.holds(*_OPAQUE) and all(value.name in plain for value in node.inputs):
            plain.update(names)
            if len(names) == 1 and REGISTRY[node.op].cost(node).op_class in _CHEAP:
                cheap.update(names)
    return frozenset(cheap)


def _at_hand(calls: Sequence[Node], bodies: Mapping[str, Graph]) -> tuple[list[Node], dict[str, Graph]]:
    """Have each stage's forward take in what its backward reads of other stages' forward values.

    It need not use it, but so the value comes over with the activations, and what the backward reads is a
    residual of its own worker. (Equal nodes merged across stages can make a backward read such a value.)
    """
    forward = {node.attrs["stage"]: node for node in calls if node.attrs["phase"] == FORWARD}
    made = {value.name: node.attrs["stage"] for node in forward.values() for value in node.outputs}
    further: dict[int, dict[Value, None]] = {}
    for node in calls:
        stage = node.attrs["stage"]
        if node.attrs["phase"] != FORWARD and stage in forward:
            known = set(forward[stage].inputs)
            missing = [value for value in node.inputs if made.get(value.name, stage) < stage and value not in known]
            further.setdefault(stage, {}).update(dict.fromkeys(missing))
    changed = dict(bodies)
    widened: list[Node] = []
    for node in calls:
        extra = tuple(further.get(node.attrs["stage"], ())) if node.attrs["phase"] == FORWARD else ()
        if extra:
            body = _with_inputs(bodies[node.attrs["callee"]], extra)
            changed[body.name] = body
            widened.append(replace(node, inputs=tuple(port.value for port in body.inputs)))
        else:
            widened.append(node)
    return widened, changed


def _with_inputs(body: Graph, extra: Sequence[Value]) -> Graph:
    """A body that takes further values in, and no longer makes them again itself."""
    given = {value.name for value in extra}
    nodes = tuple(node for node in body.nodes if not any(value.name in given for value in node.outputs))
    roots = {port.value.name for port in body.outputs}
    roots |= {value.name for node in nodes if node.holds("python.call") for value in node.outputs}
    live = tuple(live_nodes(replace(body, nodes=nodes), roots))
    read = roots | {value.name for node in live for value in node.inputs}
    ports = tuple(port for port in body.inputs if port.value.name in read)
    return replace(body, inputs=(*ports, *(Port(value, "value", value.name) for value in extra)), nodes=live)


@dataclass(frozen=True)
class _Sharing:
    """What is known of the values of a joint graph when a task decides to make some of them again."""

    inputs: Mapping[str, Port]
    makers: Mapping[str, Node]
    rank: Mapping[str, int]
    stages: Mapping[str, int]
    cheap: frozenset[str]

    @staticmethod
    def of(joint: Graph, stages: Mapping[str, int]) -> _Sharing:
        """``stages``: by first output name."""
        return _Sharing(
            {port.value.name: port for port in joint.inputs},
            {value.name: node for node in joint.nodes for value in node.outputs},
            {value.name: index for index, value in enumerate(joint.values())},
            stages,
            cheap_values(joint),
        )

    def position(self, node: Node) -> int:
        return self.rank[node.outputs[0].name]

    def remade(self, own: Iterable[Node], stage: int) -> list[Node]:
        """Nodes of other tasks that a task of these nodes runs itself, so that its inputs do not grow.

        For each value that comes from outside: the fewest bytes of inputs that it can be had from, with what
        is at hand for nothing.
        """
        own = list(own)
        at_hand = {value.name for node in own for value in node.outputs}
        outside = dict.fromkeys(value for node in own for value in node.inputs if value.name not in at_hand)
        at_hand |= {value.name for value in outside if value.name not in self.cheap}
        least: dict[str, float] = {}
        again: dict[str, Node] = {}

        def price(value: Value, depth: int) -> float:
            """Bytes of further inputs that the value takes."""
            if value.name in at_hand or value.name in again:
                return 0
            if value.name not in least:
                least[value.name] = min(value.type.nbytes, parts(value, depth))
            return least[value.name]

        def parts(value: Value, depth: int = _DEPTH) -> float:
            """Bytes of further inputs of the value's maker, were it run again; infinite where it may not be."""
            if value.name not in self.cheap or not depth:
                return math.inf
            node = self.makers[value.name]
            elsewhere = self.stages[node.outputs[0].name] != stage
            if elsewhere and any(self._resident(source) for source in node.inputs):
                return math.inf
            return sum(price(source, depth - 1) for source in dict.fromkeys(node.inputs))

        pending = sorted(outside, key=lambda value: self.rank[value.name], reverse=True)
        while pending:
            value = pending.pop()
            if value.name in at_hand or value.name in again:
                continue
            if parts(value) <= value.type.nbytes:
                node = self.makers[value.name]
                again.update((output.name, node) for output in node.outputs)
                pending += node.inputs
            else:
                at_hand.add(value.name)
            least.clear()
        return list({node.outputs[0].name: node for node in again.values()}.values())

    def _resident(self, value: Value) -> bool:
        return value.name in self.inputs and self.inputs[value.name].kind in RESIDENT


def summarize_paths(paths: Iterable[str]) -> str:
    """The modules of a task, shortened: ``wte .. blocks.3`` for all from the embedding to the fourth block."""
    units = [unit for unit in dict.fromkeys(unit_of(path) for path in paths if path) if unit]
    if len(units) <= 1:
        return "".join(units)
    return f"{units[0]} .. {units[-1]}"


def unit_of(path: str) -> str:
    """A path down to its first number: ``h.3`` of ``h.3.attn.c_proj``; all of it if there is none."""
    match = re.match(r"(?:.*?\.)??\d+(?=\.|$)", path)
    return match.group(0) if match else path
