"""Lanes: what each device does of a step as one task, which exchanges values with its peers directly.

As tasks of Dask's graph, the calls of a step are told to their worker one by one: between two of them that wait for
each other there is a hop through the scheduler, of 2 to 6 ms. A lane is all of one device's calls, in the order of the
step, with what it sends and receives in between:

    stage 0 on a   call F0.0 | send F0.0's activations to b | call F0.1 | send | receive from b | call B0.0 | ...
    stage 1 on b   receive from a | call FB1.0 | send its cotangents to a | receive | call FB1.1 | ...

The lanes of a step run at the same time. Each has sent a value before it waits for anything that comes later in the
graph, so they never wait for each other in a ring. When all is computed that comes before the updates, they meet:
a step that fails before that changes nothing. Nor does one step wait for the one before through the scheduler: the
version of its worker's state tells a lane when it may begin.

A step of which one device has all is a lane without peers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dask._task_spec import Task

from daggc.backend.dask_graph import COMMITTED, Argument, Dependencies, Emission, Found, Resident, Source
from daggc.errors import PlanError
from daggc.ir.graph import Graph, Node, Port
from daggc.plan.messages import Message, messages_of
from daggc.plan.outline import RESIDENT


@dataclass(frozen=True, slots=True)
class Send:
    message: Message


@dataclass(frozen=True, slots=True)
class Receive:
    message: Message


Action = Node | Send | Receive


@dataclass(frozen=True)
class Lane:
    """What a device does of a placed graph.

    Attributes:
        inputs: the names under which it reads inputs of the graph, and the ports' refs.
        before: calls, sends and receives that change nothing, in order.
        updates: calls that make new state, run when every lane has done what comes before.
        outputs: those that it makes.
        peers: the other devices of the graph.
    """

    device: str
    inputs: Mapping[str, str]
    before: tuple[Action, ...]
    updates: tuple[Node, ...]
    outputs: tuple[Port, ...]
    peers: tuple[str, ...]


def devices_of(graph: Graph) -> tuple[str, ...]:
    """The devices that have a part of a placed graph, sorted."""
    devices = {str(node.attrs["device"]) for node in graph.nodes}
    return tuple(sorted(devices | {str(port.value.type.device) for port in graph.inputs}))


def lane_of(graph: Graph, device: str) -> Lane:
    """A device's part of a placed graph of calls and transfers.

    An input that is given to the step is given to every device that reads it. What is resident is sent before anything
    else to those that read it.

    Raises:
        PlanError: an update is waited for by another device, in the same step.
    """
    given = {port.value.name: port for port in graph.inputs if port.kind not in RESIDENT}
    inputs = {port.value.name: port.ref for port in graph.inputs if str(port.value.type.device) == device}
    for node in graph.nodes:
        if node.op == "transfer" and node.inputs[0].name in given and str(node.output.type.device) == device:
            inputs[node.output.name] = given[node.inputs[0].name].ref
    sends: dict[int, list[Message]] = {}
    receives: dict[int, list[Message]] = {}
    for message in sorted(messages_of(graph, given), key=lambda one: (one.maker, one.source, one.reader)):
        if message.reader >= 0 and message.source == device:
            sends.setdefault(message.maker, []).append(message)
        if message.reader >= 0 and message.target == device:
            receives.setdefault(message.reader, []).append(message)
    before: list[Action] = [Send(message) for message in sends.get(-1, ())]
    updates: list[Node] = []
    for index, node in enumerate(graph.nodes):
        if node.op == "transfer" or str(node.attrs["device"]) != device:
            continue
        before += [Receive(message) for message in receives.get(index, ())]
        if node.attrs.get("phase") == "update":
            updates.append(node)
            if index in sends:
                raise PlanError(f"@{graph.name}: {node.attrs.get('task')} is an update, and another device reads it")
        else:
            before += [node, *(Send(message) for message in sends.get(index, ()))]
    return Lane(
        device, inputs, tuple(before), tuple(updates),
        tuple(port for port in graph.outputs if str(port.value.type.device) == device),
        tuple(name for name in devices_of(graph) if name != device),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LaneCall:
    """What the task of a lane is told.

    Attributes:
        key: of the task.
        run: distinct for each submission of a step: what its lanes send each other is known by it.
        program: the hash under which workers know the program.
        graph: the name of the placed graph.
        arguments: where the inputs are that were given to the step, by ref.
        addresses: of the workers of all devices that have a part.
    """

    key: str
    run: str
    program: str
    graph: str
    device: str
    arguments: Mapping[str, Argument]
    addresses: Mapping[str, str]


def emit_lanes(
    graph: Graph,
    program: str,
    token: str,
    inputs: Mapping[str, Source],
    run: Callable[..., Any],
    *,
    context: Mapping[str, Any],
    addresses: Mapping[str, str],
) -> Emission:
    """Emit a placed graph as one task for each device.

    The result of a task has the outputs that its device makes and does not commit, by ref.

    Args:
        run: the entry point of the task: ``run(call, context, *dependencies)``.

    See :func:`daggc.backend.dask_graph.emit` for the rest.
    """
    result = Emission(lanes=True)
    devices = devices_of(graph)
    own = {device: addresses[device] for device in devices}
    for device in devices:
        lane = lane_of(graph, device)
        dependencies = Dependencies()
        arguments = {
            ref: dependencies.argument(inputs[ref])
            for ref in lane.inputs.values()
            if not isinstance(inputs[ref], Resident)
        }
        key = f"daggc.{graph.name}-{token}-{device.replace(':', '')}"
        call = LaneCall(key, token, program, graph.name, device, arguments, own)
        result.tasks[key] = Task(key, run, call, context.get(device), *dependencies.refs())
        result.device[key] = device
        result.priority[key] = 0
        result.updates[device] = Found(key)
        result.outputs.update((port.ref, Found(key, port.ref)) for port in lane.outputs if port.kind not in COMMITTED)
    return result
