"""What a placement is predicted to take, before anything is outlined: a placed graph with one call a stage and phase.

The calls have the times of the nodes of their stages; the values between them, the sizes of what really goes from
stage to stage and of the cotangents that come back. So the simulator judges every candidate, lines and list
schedules, by what it would say of the finished plan, but for values that tasks make again themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.graph import Graph, Node, Port, Program, Value
from daggc.ir.types import TensorType
from daggc.ops.call import declare
from daggc.plan.device import Cluster
from daggc.plan.partition.staging import Placement
from daggc.plan.partition.work import Work
from daggc.plan.place import place
from daggc.plan.simulate import simulate

_TOKEN = TensorType("bool", ())


@dataclass(frozen=True)
class Predicted:
    """What a placement is predicted to take.

    Attributes:
        latency: seconds of one batch, from its input to the last gradient.
        slowest: seconds that the busiest device is busy for one batch, transfers at both ends included.
        seconds: of a step of the microbatches asked for: the latency, and the slowest device for each further one.
        shares: by index of the devices that are used: their part of the work, of a fair one where devices differ.
        memory: bytes, by index of device.
    """

    latency: float
    slowest: float
    seconds: float
    shares: dict[int, float]
    memory: dict[int, float]

    def fits(self, cluster: Cluster) -> bool:
        return all(nbytes <= cluster.devices[device].memory for device, nbytes in self.memory.items())


@dataclass(frozen=True)
class _Carried:
    """Values of one stage (-1: inputs) that the same other stages read, as one."""

    maker: int
    readers: tuple[int, ...]
    sent: int
    returned: int


def predict(work: Work, cluster: Cluster, placement: Placement, microbatches: int, held: int) -> Predicted:
    """Simulate one batch of a placement, and add up what its devices do.

    Args:
        held: microbatches that may be in flight.
    """
    devices, count = placement.devices, len(placement.devices)
    times = {device: work.phases(cluster.devices[device]) for device in dict.fromkeys(devices)}
    stage = placement.stage
    seconds: dict[tuple[int, str], float] = {}
    for number, device in enumerate(devices):
        for phase, own in zip(("forward", "backward"), times[device], strict=True):
            seconds[number, phase] = float(own[stage == number].sum())
    carried = _carried(work, placement)
    graph, program = _graph(work.passes, count, seconds, carried)
    names = [cluster.devices[device].name for device in devices]
    placed = place(graph, lambda node: names[node.attrs["stage"]])
    overhead = {device.name: device.overhead for device in cluster.devices}

    def time_of(node: Node) -> float:
        return seconds[node.attrs["stage"], node.attrs["phase"]] + overhead[node.attrs["device"]]

    latency = simulate(placed, program, cluster, time_of).makespan
    loads = _loads(work.passes, cluster, devices, seconds, carried)
    slowest = max(loads.values(), default=0.0)
    return Predicted(
        latency,
        slowest,
        latency + (microbatches - 1) * slowest,
        _shares(work, cluster, devices, seconds),
        memory_by_device(work, placement, held),
    )


def memory_by_device(work: Work, placement: Placement, held: int) -> dict[int, float]:
    """Bytes that each device needs: what it keeps, residuals of all that is in flight, and its largest op."""
    needs: dict[int, float] = {}
    working: dict[int, float] = {}
    count = len(placement.devices)
    for number, device in enumerate(placement.devices):
        here = placement.stage == number
        in_flight = min(held, count - number) if work.passes == 2 else 1
        needs[device] = needs.get(device, 0.0) + float(
            work.resident[here].sum() + in_flight * work.residuals[here].sum()
        )
        working[device] = max(working.get(device, 0.0), float(work.working[here].max(initial=0)))
    return {device: nbytes + working[device] for device, nbytes in needs.items()}


def _carried(work: Work, placement: Placement) -> list[_Carried]:
    stage = placement.stage
    found: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
    for flow in work.flows:
        maker = int(stage[flow.maker]) if flow.maker >= 0 else -1
        readers = tuple(sorted({int(stage[reader]) for reader in flow.readers} - {maker}))
        if readers:
            sent, returned = found.get((maker, readers), (0, 0))
            back = flow.nbytes if flow.active and work.passes == 2 and maker >= 0 else 0
            found[maker, readers] = sent + flow.nbytes, returned + back
    return [_Carried(*key, *nbytes) for key, nbytes in found.items()]


def _graph(
    passes: int, count: int, seconds: dict[tuple[int, str], float], carried: Sequence[_Carried]
) -> tuple[Graph, Program]:
    """The calls of all stages, unplaced, and their bodies."""
    values = {item: Value(f"v{index}", _bytes(item.sent)) for index, item in enumerate(carried)}
    back = {
        (item, reader): Value(f"ct{index}_{reader}", _bytes(item.returned))
        for index, item in enumerate(carried)
        for reader in item.readers
        if item.returned
    }
    kept = [Value(f"kept{number}", _TOKEN) for number in range(count)]
    inputs = [Port(value, "input", value.name) for item, value in values.items() if item.maker < 0]
    nodes: list[Node] = []
    for number in range(count):
        reads = [values[item] for item in carried if number in item.readers]
        makes = [values[item] for item in carried if item.maker == number]
        nodes.append(_call(number, "forward", reads, [*makes, kept[number]]))
    if passes == 2:
        for number in reversed(range(count)):
            reads = [value for (item, _), value in back.items() if item.maker == number]
            makes = [value for (_, reader), value in back.items() if reader == number]
            done = Value(f"done{number}", _TOKEN)
            if reads or makes or seconds[number, "backward"]:
                nodes.append(_call(number, "backward", [kept[number], *reads], [*makes, done]))
    bodies = {str(node.attrs["callee"]): _body(node) for node in nodes}
    return Graph("sketch", tuple(inputs), tuple(nodes), ()), Program(bodies)


def _bytes(count: int) -> TensorType:
    return TensorType("u8", (max(int(count), 1),))


def _call(stage: int, phase: str, inputs: Sequence[Value], outputs: Sequence[Value]) -> Node:
    attrs = {**declare([value.type for value in outputs]), "callee": f"{phase}{stage}", "stage": stage, "phase": phase}
    return Node("call", tuple(inputs), tuple(outputs), Attrs(attrs))


def _body(call: Node) -> Graph:
    """A body of one opaque node: nothing is known of a task but its time."""
    attrs = Attrs({**declare([value.type for value in call.outputs]), "target": "stage"})
    node = Node("torch.call", call.inputs, call.outputs, attrs)
    inputs = tuple(Port(value, "value", value.name) for value in call.inputs)
    return Graph(str(call.attrs["callee"]), inputs, (node,), tuple(Port(v, "value", v.name) for v in call.outputs))


def _loads(
    passes: int,
    cluster: Cluster,
    devices: Sequence[int],
    seconds: dict[tuple[int, str], float],
    carried: Sequence[_Carried],
) -> dict[int, float]:
    """Seconds of each device: computation, overheads, and transfers, which keep both ends busy."""
    loads: dict[int, float] = {}
    for (number, _), own in seconds.items():
        loads[devices[number]] = loads.get(devices[number], 0.0) + own
    for device in devices:
        loads[device] += passes * cluster.devices[device].overhead
    for item in carried:
        source = devices[item.maker if item.maker >= 0 else item.readers[0]]
        targets = dict.fromkeys(devices[reader] for reader in item.readers if devices[reader] != source)
        back = [devices[reader] for reader in item.readers if devices[reader] != source]
        for nbytes, ends in ((item.sent, targets), (item.returned, back)):
            for target in ends:
                link = cluster.between(cluster.names[source], cluster.names[target])
                loads[source] += nbytes / link.bandwidth
                loads[target] += nbytes / link.bandwidth
    return loads


def _shares(
    work: Work, cluster: Cluster, devices: Sequence[int], seconds: dict[tuple[int, str], float]
) -> dict[int, float]:
    """Of each device, the part of its fair share that it does: 1 for all if all are busy equally long."""
    busy: dict[int, float] = {}
    for (number, _), own in seconds.items():
        busy[devices[number]] = busy.get(devices[number], 0.0) + own
    whole = {device: max(float(work.seconds(cluster.devices[device]).sum()), 1e-30) for device in busy}
    speeds = sum(1 / own for own in whole.values())
    return {device: own / whole[device] / (1 / whole[device] / speeds) for device, own in busy.items()}


def placement_of(parts: Sequence[tuple[int, int, int]], count: int) -> Placement:
    """The placement of segments: start, stop and device of each, in planning order."""
    stage = np.zeros(count, np.intp)
    for number, (start, stop, _) in enumerate(parts):
        stage[start:stop] = number
    return Placement(stage, tuple(device for _, _, device in parts))
