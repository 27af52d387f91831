"""Planning: from a captured program and a cluster to placed graphs of tasks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from daggc.errors import DifferentiationError, PlanError
from daggc.ir.graph import Graph, Node, Program
from daggc.passes.split import split
from daggc.passes.vjp import differentiate, simplify
from daggc.plan.cost import graph_flops, graph_seconds
from daggc.plan.device import Cluster
from daggc.plan.explain import explain
from daggc.plan.outline import outline, unit_of
from daggc.plan.partition import Alternative, Partition, memory_of
from daggc.plan.partition import partition as make_partition
from daggc.plan.partition.bounds import latency_bound, work_bound
from daggc.plan.place import place
from daggc.plan.recomputation import recomputing
from daggc.plan.simulate import simulate


@dataclass(frozen=True)
class Stage:
    """One segment of the model on one device.

    Attributes:
        device: its name.
        paths: the modules in it, in order.
        flops: of its forward and backward, for one batch as captured.
        share: of the model's FLOPs.
        param_bytes: of the parameters that live here.
        memory: bytes it is expected to need.
        sent: bytes of values that go on to later stages; ``returned``: of cotangents that come back.
        seconds: predicted for its forward and backward, without transfers.
    """

    index: int
    device: str
    paths: tuple[str, ...]
    flops: float
    share: float
    param_bytes: float
    memory: float
    sent: float
    returned: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A program cut into tasks and placed.

    Attributes:
        program: placed ``@forward`` and ``@backward`` (training) and the bodies of their calls.
        cluster: what it is planned for.
        stages: in order; several may be on one device.
        stage_of: first output name of each node of the captured forward -> index of its stage.
        joint: primal and cotangent nodes as one graph, before cutting.
        main: ``joint`` outlined into calls, not placed.
        placed: ``main`` with devices and transfers.
        seconds: predicted for one batch, from input to the last gradient.
        slowest: seconds the busiest device is busy for one batch; the time of a step in a full pipeline.
        bound: seconds below which no placement can bring ``slowest``; ``seconds_bound``: ``seconds``. Neither counts
            transfers or memory, so that the best may be above them.
        memory: bytes that each device is expected to need: what its stages keep, and its largest op.
        critical: tasks on the critical path.
        alternatives: what was considered, the chosen cut first.
        notes: what a user should know.
    """

    program: Program
    cluster: Cluster
    stages: tuple[Stage, ...]
    stage_of: Mapping[str, int]
    joint: Graph
    main: Graph
    placed: Graph
    training: bool
    seconds: float
    slowest: float
    bound: float
    seconds_bound: float
    memory: Mapping[str, float]
    critical: tuple[str, ...]
    alternatives: tuple[Alternative, ...]
    notes: tuple[str, ...]

    @property
    def tasks(self) -> tuple[Node, ...]:
        """The placed ``call`` nodes, in an order in which they can run."""
        return tuple(node for node in self.placed.nodes if node.op == "call")

    @property
    def bodies(self) -> dict[str, Graph]:
        """The tasks' bodies by name."""
        return {str(node.attrs["callee"]): self.program[str(node.attrs["callee"])] for node in self.tasks}

    def device_of(self, node: Node) -> str:
        """The device of a call of ``main``, or of any node with the attribute ``stage``."""
        return self.stages[node.attrs["stage"]].device

    def shares(self) -> dict[str, float]:
        """The share of the model's FLOPs that each device does."""
        shares = dict.fromkeys((stage.device for stage in self.stages), 0.0)
        for stage in self.stages:
            shares[stage.device] += stage.share
        return shares

    def explain(self) -> str:
        """A text that shows the stages and says why they are so."""
        return explain(self)

    def to_json(self) -> dict[str, Any]:
        """The plan's decisions as plain data; the program has its own form."""
        return {
            "cluster": self.cluster.to_json(),
            "stages": [{**vars(stage), "paths": list(stage.paths)} for stage in self.stages],
            "stage_of": dict(self.stage_of),
            "training": self.training,
            "seconds": self.seconds,
            "slowest": self.slowest,
            "bound": self.bound,
            "seconds_bound": self.seconds_bound,
            "memory": dict(self.memory),
            "critical": list(self.critical),
            "alternatives": [vars(alternative) for alternative in self.alternatives],
            "notes": list(self.notes),
        }


def plan_model(
    program: Program,
    cluster: Cluster,
    *,
    wrt: Iterable[str] | None = None,
    stages: int | None = None,
    pins: Mapping[str, str] | None = None,
    split_backward: bool = False,
    training: bool = True,
    microbatches: int = 1,
    partition: str = "auto",
    remat: str = "none",
    turns: Sequence[int] | None = None,
    in_flight: int | None = None,
) -> Plan:
    """Differentiate a captured program, cut it into stages, and place their tasks.

    Args:
        program: has ``@forward`` alone.
        wrt: refs of the inputs to differentiate with respect to; see :func:`~daggc.passes.vjp.differentiate`.
        stages: how many stages to make; by default as many as there are devices, if that helps.
        pins: pattern of module paths -> device, such as ``{"blocks.0": "cpu:1"}``, or devices where not to be:
            ``{"blocks.*": "!cpu:0"}``; see :func:`~daggc.plan.partition.pins.resolve_pins`.
        split_backward: make tasks of their own of the gradients of parameters.
        training: whether there is a backward at all.
        microbatches: that a step will be made of; see :func:`~daggc.plan.partition.partition`.
        partition: ``line``, ``list`` or ``auto``; see :func:`~daggc.plan.partition.partition`.
        remat: what the backward computes again; see :func:`~daggc.plan.recomputation.recomputing`.
        turns: the device of each stage, by its index in the cluster, in place of ``stages``.
        in_flight: the most microbatches of which a device holds residuals; by default what 1F1B holds.

    Raises:
        PlanError: nothing fits the devices, or a pin cannot be kept.
        DifferentiationError: ``wrt`` names what has no gradient, or no output depends on it.
    """
    if set(program.graphs) != {"forward"}:
        raise PlanError(f"a program with @forward alone is planned, this one has {', '.join(program.graphs)}")
    forward = _with_origins(program.forward)
    joint = simplify(differentiate(forward, wrt) if training else forward)
    if training and len(joint.inputs) == len(forward.inputs):
        raise DifferentiationError("no output of @forward depends differentiably on what was asked for")
    cut = make_partition(
        recomputing(joint, forward, remat),
        forward,
        cluster,
        stages=stages,
        pins=pins,
        microbatches=microbatches,
        how=partition,
        turns=turns,
        in_flight=in_flight,
    )
    joint = recomputing(joint, forward, remat, cut.stage_of)
    main, bodies = outline(joint, forward, cut.stage_of, split_backward=split_backward)
    names = [cluster.devices[segment.device].name for segment in cut.cut.segments]
    placed = place(main, lambda node: names[node.attrs["stage"]])
    first, second = split(placed, forward)
    graphs = (first, second) if training else (first,)
    planned = replace(program, graphs={}).with_graphs(*graphs, *bodies.values(), provenance="plan")
    times = node_times(bodies, cluster)
    return Plan(
        program=planned,
        cluster=cluster,
        stages=_stages(cut, cluster, min(microbatches, in_flight or microbatches)),
        stage_of=cut.stage_of,
        joint=joint,
        main=main,
        placed=placed,
        training=training,
        seconds=simulate(placed, Program(bodies), cluster, times).makespan,
        slowest=cut.predicted.slowest,
        bound=work_bound(cut.work, cluster),
        seconds_bound=latency_bound(joint, cut.work, cluster),
        memory={cluster.names[device]: nbytes for device, nbytes in cut.predicted.memory.items()},
        critical=critical_path(placed, times),
        alternatives=cut.cut.alternatives,
        notes=cut.cut.notes,
    )


def _with_origins(forward: Graph) -> Graph:
    """Every node is its own origin, so that what a pass makes of it is known to belong to it."""
    nodes = tuple(replace(node, origin=node.outputs[0].name) for node in forward.nodes)
    return replace(forward, nodes=nodes)


def _stages(cut: Partition, cluster: Cluster, microbatches: int) -> tuple[Stage, ...]:
    work, segments = cut.work, cut.cut.segments
    total = max(float(work.flops.sum()), 1e-30)
    stages: list[Stage] = []
    sent, returned = _traffic(cut)
    for index, segment in enumerate(segments):
        here = slice(segment.start, segment.stop)
        device = cluster.devices[segment.device]
        flops = float(work.flops[here].sum())
        units = dict.fromkeys(unit_of(node.path) for node in work.nodes[here] if node.path)
        stages.append(
            Stage(
                index=index,
                device=device.name,
                paths=tuple(units),
                flops=flops,
                share=flops / total,
                param_bytes=float(work.params[here].sum()),
                memory=memory_of(work, segments, index, microbatches),
                sent=sent[index],
                returned=returned[index],
                seconds=float(work.seconds(device)[here].sum()) + device.overhead * work.passes,
            )
        )
    return tuple(stages)


def _traffic(cut: Partition) -> tuple[list[float], list[float]]:
    """For each stage, bytes of its values that later stages read, and of the cotangents that come back."""
    starts = [segment.start for segment in cut.cut.segments]
    sent, returned = [0.0] * len(starts), [0.0] * len(starts)
    for flow in cut.work.flows:
        own = bisect_right(starts, flow.start) - 1
        readers = {bisect_right(starts, reader) - 1 for reader in flow.readers} - {own}
        sent[own] += flow.nbytes if readers else 0
        returned[own] += flow.nbytes * len(readers) if flow.active and cut.work.passes == 2 else 0
    return sent, returned


def critical_path(placed: Graph, seconds: Callable[[Node], float]) -> tuple[str, ...]:
    """The tasks of the longest chain of tasks and transfers of a placed graph; ``seconds``: of each node."""
    ends: dict[str, float] = {}
    before: dict[str, Node | None] = {}
    makers = {value.name: node for node in placed.nodes for value in node.outputs}
    last: Node | None = None
    for node in placed.nodes:
        if node.outputs:
            sources = [makers[value.name] for value in node.inputs if value.name in makers]
            source = max(sources, key=lambda one: ends[one.outputs[0].name], default=None)
            name = node.outputs[0].name
            ends[name] = seconds(node) + (ends[source.outputs[0].name] if source else 0.0)
            before[name] = source
            if last is None or ends[name] > ends[last.outputs[0].name]:
                last = node
    path: list[Node] = []
    while last is not None:
        path.append(last)
        last = before[last.outputs[0].name]
    return tuple(str(node.attrs["callee"]) for node in reversed(path) if node.op == "call")


def node_times(bodies: Mapping[str, Graph], cluster: Cluster) -> Callable[[Node], float]:
    """The predicted time of a placed call, or of a transfer."""
    known: dict[tuple[str, str], float] = {}

    def seconds(node: Node) -> float:
        name = str(node.attrs["device"])
        if node.op == "transfer":
            (value,) = node.inputs
            return cluster.between(str(value.type.device), name).seconds(value.type.nbytes)
        key = str(node.attrs["callee"]), name
        if key not in known:
            known[key] = graph_seconds(bodies[key[0]], cluster.device(name))
        return known[key]

    return seconds


def task_flops(node: Node, bodies: Mapping[str, Graph]) -> float:
    """FLOPs of a call, what it makes again included; none for a transfer."""
    return graph_flops(bodies[str(node.attrs["callee"])]) if node.op == "call" else 0.0
