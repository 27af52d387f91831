"""A placed graph -> Dask tasks: one for each ``call``, one for each value that leaves its worker.

The result of a call is the tuple of its outputs. It stays on its worker, with the residuals in it; a
``transfer`` becomes a task that picks one value out of it, and only that value travels. Tasks carry the hash
of their program, not the program. Everything here is a function of its arguments: the same graph and token
give the same tasks, whatever the hash seed.

This is the only file that knows Dask's task classes (``dask._task_spec`` is private to Dask).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dask._task_spec import DataNode, Task, TaskRef

from daggc.errors import PlanError
from daggc.ir.graph import Graph, Node, Port


@dataclass(frozen=True, slots=True)
class Found:
    """Where a value is: the result of a task, and its index (or name) in that result if it is part of it."""

    key: str
    index: int | str | None = None


@dataclass(frozen=True, slots=True)
class Resident:
    """A value that lives in its worker's store, under its port's ref."""

    ref: str


Source = Found | Resident


@dataclass(frozen=True, slots=True)
class Call:
    """What a task is told: which graph of which program to run, on what.

    Attributes:
        program: the hash under which workers know the program.
        callee: the graph to run.
        arguments: for each input of the callee, the position among the task's dependencies and an index into
            that dependency (None: the whole), or a :class:`Resident`.
        commits: refs under which outputs are committed to the worker's store; empty unless this is an update.
        name: for timelines: ``stage0.forward``.
        microbatch: its number, or -1.
    """

    program: str
    callee: str
    arguments: tuple[tuple[int, int | str | None] | Resident, ...]
    commits: tuple[str, ...] = ()
    name: str = ""
    microbatch: int = -1


@dataclass
class Emission:
    """Tasks ready to submit.

    Attributes:
        tasks: by key.
        device: the device each key is pinned to.
        priority: higher runs first; calls keep the order of the graph.
        outputs: where each output port's value is, by ref; absent for those committed to a store.
        calls: keys of call tasks, in order.
    """

    tasks: dict[str, Task | DataNode] = field(default_factory=dict)
    device: dict[str, str] = field(default_factory=dict)
    priority: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, Found] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)


def emit(
    graph: Graph,
    program: str,
    token: str,
    inputs: Mapping[str, Source],
    run: Callable[..., Any],
    *,
    context: tuple[Any, ...] = (),
    commit_kinds: Collection[str] = (),
    after: Mapping[str, Found] | None = None,
) -> Emission:
    """Emit a placed graph of calls and transfers.

    Args:
        program: the hash under which workers know the program.
        token: makes the keys of this run distinct; keys look like ``daggc.stage0.forward-<token>-3``.
        inputs: where each input port's value is, by ref.
        run: the entry point of a task: ``run(call, context, *dependencies)``.
        context: handed to every task, such as the id and version of the state it reads.
        commit_kinds: output ports of these kinds are committed to the worker's store by the call that makes
            them, rather than being results.
        after: for each device, a task that must end before any call there that reads the store begins.

    Raises:
        PlanError: an input has no source, or a resident value would have to move.
    """
    result = Emission()
    found: dict[str, Source] = {}
    home: dict[str, str] = {}
    for port in graph.inputs:
        if port.ref not in inputs:
            raise PlanError(f"@{graph.name}: nothing was given for input {port.ref!r}")
        found[port.value.name] = inputs[port.ref]
        home[port.value.name] = str(port.value.type.device)
    commits = {port.value.name: port for port in graph.outputs if port.kind in commit_kinds}
    call_keys: dict[str, str] = {}
    for position, node in enumerate(graph.nodes):
        if node.op == "transfer":
            source = _send(result, node, found[node.inputs[0].name], token, position)
            found[node.output.name] = source
        elif node.op == "call":
            key = _call(result, node, found, commits, program, token, position, run, context, after or {}, call_keys)
            call_keys[node.outputs[0].name] = key
            for index, value in enumerate(node.outputs):
                found[value.name] = Found(key, index)
                home[value.name] = str(value.type.device)
        else:
            raise PlanError(f"@{graph.name}: a placed graph holds calls and transfers, got {node.op}")
    for port in graph.outputs:
        source = found[port.value.name]
        if port.value.name in commits:
            continue
        if isinstance(source, Resident):
            raise PlanError(f"@{graph.name}: output {port.ref!r} is a resident value as it is")
        result.outputs[port.ref] = source
    return result


def _call(
    result: Emission,
    node: Node,
    found: Mapping[str, Source],
    commits: Mapping[str, Port],
    program: str,
    token: str,
    position: int,
    run: Callable[..., Any],
    context: tuple[Any, ...],
    after: Mapping[str, Found],
    call_keys: Mapping[str, str],
) -> str:
    """Add the task of a call; returns its key."""
    callee = str(node.attrs["callee"])
    device = str(node.attrs["device"])
    dependencies: dict[str, int] = {}
    arguments: list[tuple[int, int | str | None] | Resident] = []
    for value in node.inputs:
        source = found[value.name]
        if isinstance(source, Resident):
            arguments.append(source)
        else:
            place = dependencies.setdefault(source.key, len(dependencies))
            arguments.append((place, source.index))
    committed = tuple(commits[value.name].ref if value.name in commits else "" for value in node.outputs)
    uses_store = any(committed) or any(isinstance(argument, Resident) for argument in arguments)
    if uses_store and device in after:
        dependencies.setdefault(after[device].key, len(dependencies))
    for name in node.attrs.get("after", ()):
        dependencies.setdefault(call_keys[name], len(dependencies))
    call = Call(
        program,
        callee,
        tuple(arguments),
        committed if any(committed) else (),
        callee,
        int(node.attrs.get("microbatch", -1)),
    )
    key = f"daggc.{callee}-{token}-{position}"
    result.tasks[key] = Task(key, run, call, context, *(TaskRef(dependency) for dependency in dependencies))
    result.device[key] = device
    result.priority[key] = -position
    result.calls.append(key)
    return key


def _send(result: Emission, node: Node, source: Source, token: str, position: int) -> Found:
    """Add the task that picks a value out of a call's result, on the worker that has it."""
    if isinstance(source, Resident):
        raise PlanError(f"{node.inputs[0]} lives in a worker's store and would have to move: {source.ref}")
    if source.index is None:
        return source  # a task's whole result: Dask moves it by itself
    return add_pick(result, source, str(node.inputs[0].type.device), token, position)


def add_pick(result: Emission, source: Found, device: str, token: str, position: int) -> Found:
    """A task whose result is one part of another's."""
    key = f"daggc.send-{token}-{position}"
    result.tasks[key] = Task(key, pick, TaskRef(source.key), source.index)
    result.device[key] = device
    result.priority[key] = 1  # cheap, and someone waits for it
    return Found(key)


def add_collection(result: Emission, graph: Graph, kinds: Collection[str], token: str) -> dict[str, Found]:
    """Tasks that gather the output ports of some kinds, one for each call that makes any; ref -> where it is."""
    by_key: dict[str, list[Port]] = {}
    collected: dict[str, Found] = {}
    for port in graph.outputs:
        if port.kind in kinds and port.ref in result.outputs:
            by_key.setdefault(result.outputs[port.ref].key, []).append(port)
    for number, (source, ports) in enumerate(by_key.items()):
        key = f"daggc.collect-{token}-{number}"
        indices = tuple(result.outputs[port.ref].index for port in ports)
        result.tasks[key] = Task(key, pick_all, TaskRef(source), indices)
        result.device[key] = str(ports[0].value.type.device)
        result.priority[key] = 1
        collected.update((port.ref, Found(key, place)) for place, port in enumerate(ports))
    return collected


def add_data(result: Emission, key: str, value: Any, device: str) -> Found:
    """A task that is a value, sent with the graph to the device that reads it first."""
    result.tasks[key] = DataNode(key, value)
    result.device[key] = device
    return Found(key)


def add_join(result: Emission, key: str, function: Callable[..., Any], found: Sequence[Found]) -> None:
    """A task ``function(sources, *dependencies)`` over values found in several results, pinned nowhere."""
    places: dict[str, int] = {}
    sources = tuple((places.setdefault(item.key, len(places)), item.index) for item in found)
    result.tasks[key] = Task(key, function, sources, *(TaskRef(dependency) for dependency in places))


def pick_all(result: Any, indices: Sequence[int | str | None]) -> tuple[Any, ...]:
    """Several values of a task's result."""
    return tuple(result if index is None else result[index] for index in indices)


def pick(result: Any, index: int | str) -> Any:
    """One value of a task's result."""
    return result[index]
