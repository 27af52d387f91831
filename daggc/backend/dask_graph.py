"""A placed graph -> Dask tasks: one for each ``call``, one for each value that leaves its worker.

The result of a call is the tuple of its outputs. It stays on its worker, with the residuals in it; a
``transfer`` becomes a task that picks one value out of it, and only that value travels. Tasks carry the hash
of their program, not the program. Everything here is a function of its arguments: the same graph and token
give the same tasks, whatever the hash seed.

This, ``dask_submission.py`` and ``lanes.py`` are the only files that know Dask's task classes
(``dask._task_spec`` is private).
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
# Of a task: the position of a dependency and an index into it (None: the whole), or a value of the store.
Argument = tuple[int, int | str | None] | Resident


@dataclass(frozen=True, slots=True)
class Call:
    """What a task is told: which graph of which program to run, on what.

    Attributes:
        program: the hash under which workers know the program.
        callee: the graph to run.
        arguments: one for each input of the callee.
        name: for timelines: ``F0.1``, or the callee's name.
        microbatch: its number, or -1.
    """

    program: str
    callee: str
    arguments: tuple[Argument, ...]
    name: str = ""
    microbatch: int = -1


@dataclass(frozen=True, slots=True)
class Update:
    """What the task is told that makes a worker's next version of the state: one for each device and step.

    Attributes:
        calls: updates of parameters, run one after the other.
        commits: for each call, the refs under which its outputs are committed.
        values: other refs that are committed, and where among the dependencies their values are.
    """

    calls: tuple[Call, ...]
    commits: tuple[tuple[str, ...], ...]
    values: tuple[tuple[str, Argument], ...]


@dataclass
class Emission:
    """Tasks ready to submit.

    Attributes:
        tasks: by key.
        device: the device each key is pinned to.
        priority: higher runs first; calls keep the order of the graph.
        outputs: where each output port's value is, by ref; not those committed to a store.
        calls: keys of call tasks, in order.
        updates: for each device, the task that commits its new state.
        lanes: these are all that computes, and see to it themselves that one computes at a time.
    """

    tasks: dict[str, Task | DataNode] = field(default_factory=dict)
    device: dict[str, str] = field(default_factory=dict)
    priority: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, Found] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    updates: dict[str, Found] = field(default_factory=dict)
    lanes: bool = False


def emit(
    graph: Graph,
    program: str,
    token: str,
    inputs: Mapping[str, Source],
    run: Callable[..., Any],
    *,
    context: Mapping[str, Any] | None = None,
    update: Callable[..., Any] | None = None,
    read: Callable[..., Any] | None = None,
    after: Mapping[str, Found] | None = None,
) -> Emission:
    """Emit a placed graph of calls and transfers.

    Args:
        program: the hash under which workers know the program.
        token: makes the keys of this run distinct; keys look like ``daggc.stage0.forward-<token>-3``.
        inputs: where each input port's value is, by ref.
        run: the entry point of a task: ``run(call, context, *dependencies)``.
        context: for each device, what its tasks are handed, such as the id and version of the state they read.
        update: the entry point of the task that commits, on each device, new ``param``, ``state`` and
            ``buffer`` outputs to its store; without it they are results as others are.
        read: the entry point of a task that gives values of the store to another device:
            ``read(refs, context, *dependencies)``; without it they may not move.
        after: for each device, a task that must end before any task there that reads the store begins.

    Raises:
        PlanError: an input has no source, or a resident value would have to move and there is no ``read``.
    """
    committed: set[str] = set(COMMITTED) if update else set()
    emitter = _Emitter(graph, program, token, run, read, context or {}, after or {}, committed)
    emitter.inputs(inputs)
    for position, node in enumerate(graph.nodes):
        emitter.node(position, node)
    if update is not None:
        emitter.updates(update)
    emitter.outputs()
    return emitter.result


COMMITTED = ("param", "state", "buffer")


class Dependencies(dict[str, int]):
    """Keys of tasks a task depends on -> their positions."""

    def at(self, key: str) -> int:
        return self.setdefault(key, len(self))

    def argument(self, source: Source) -> Argument:
        return source if isinstance(source, Resident) else (self.at(source.key), source.index)

    def refs(self) -> list[TaskRef]:
        return [TaskRef(key) for key in self]


class _Emitter:
    """Walks the nodes of one graph; keeps where each value is."""

    def __init__(
        self,
        graph: Graph,
        program: str,
        token: str,
        run: Callable[..., Any],
        read: Callable[..., Any] | None,
        context: Mapping[str, Any],
        after: Mapping[str, Found],
        committed: set[str],
    ) -> None:
        self.graph, self.program, self.token = graph, program, token
        self.run, self.read, self.context, self.after = run, read, context, after
        self.result = Emission()
        self.found: dict[str, Source] = {}
        self.keys: dict[str, str] = {}  # name of a call's task attribute -> its key
        self.commits = {port.value.name: port for port in graph.outputs if port.kind in committed}
        self.deferred: dict[str, list[Node]] = {}  # device -> calls that update its store
        self.moved: dict[str, Found] = {}  # what transfers give, where several go the same way
        self.makers = {v.name: n.outputs[0].name for n in graph.nodes if n.op == "call" for v in n.outputs}
        self.readers: dict[str, tuple[str, int]] = {}  # value -> device and place of the first call that reads it
        for index, node in enumerate(graph.nodes):
            for value in node.inputs if node.op == "call" else ():
                self.readers.setdefault(value.name, (str(node.attrs.get("device")), index))
        self.together = self.ways()

    def inputs(self, inputs: Mapping[str, Source]) -> None:
        for port in self.graph.inputs:
            if port.ref not in inputs:
                raise PlanError(f"@{self.graph.name}: nothing was given for input {port.ref!r}")
            self.found[port.value.name] = inputs[port.ref]

    def node(self, position: int, node: Node) -> None:
        if node.op == "transfer":
            self.found[node.output.name] = self.transfer(position, node)
        elif node.op != "call":
            raise PlanError(f"@{self.graph.name}: a placed graph holds calls and transfers, got {node.op}")
        elif any(self._updates(value.name) for value in node.outputs):
            self.deferred.setdefault(str(node.attrs["device"]), []).append(node)
        else:
            self.call(position, node)

    def transfer(self, position: int, node: Node) -> Found:
        """Where a value is that moves: in the result of a task that has all that goes the same way."""
        source = self.found[node.inputs[0].name]
        if isinstance(source, Found) and source.index is None:
            return source  # a task's whole result: Dask moves it by itself
        if node.output.name not in self.moved:
            together = self.together[self.way(node)]
            device = str(node.inputs[0].type.device)
            if isinstance(source, Resident):
                self.fetch(position, device, together)
            elif len(together) == 1:
                return add_pick(self.result, source, device, self.token, position)
            else:
                self.pick(position, device, source.key, together)
        return self.moved[node.output.name]

    def ways(self) -> dict[tuple[str, str, int], list[Node]]:
        """The transfers of each way: from one call, or a device's store, to the first that reads them elsewhere."""
        found: dict[tuple[str, str, int], list[Node]] = {}
        for node in self.graph.nodes:
            if node.op == "transfer":
                found.setdefault(self.way(node), []).append(node)
        return found

    def way(self, node: Node) -> tuple[str, str, int]:
        value = node.inputs[0]
        return self.makers.get(value.name, f"store {value.type.device}"), *self.readers.get(node.output.name, ("", -1))

    def fetch(self, position: int, device: str, together: Sequence[Node]) -> None:
        """Add a task whose result is what one call needs of another device's store: one message, not one each."""
        sources = [(node, self.found[node.inputs[0].name]) for node in together]
        resident = [(node, source.ref) for node, source in sources if isinstance(source, Resident)]
        if self.read is None:
            raise PlanError(f"{together[0].inputs[0]} lives in a worker's store and would have to move")
        dependencies = [TaskRef(self.after[device].key)] if device in self.after else []
        key = f"daggc.fetch-{self.token}-{position}"
        refs = tuple(ref for _, ref in resident)
        self.add(key, Task(key, self.read, refs, self.context.get(device), *dependencies), device, -position)
        self.moved.update((node.output.name, Found(key, index)) for index, (node, _) in enumerate(resident))

    def pick(self, position: int, device: str, source: str, together: Sequence[Node]) -> None:
        """Add a task whose result is what one call needs of another's result on another device."""
        places = [(node, self.found[node.inputs[0].name]) for node in together]
        indices = tuple(place.index for _, place in places if isinstance(place, Found))
        key = f"daggc.send-{self.token}-{position}"
        self.add(key, Task(key, pick_all, TaskRef(source), indices), device, 1)  # cheap, and someone waits for it
        self.moved.update((node.output.name, Found(key, index)) for index, (node, _) in enumerate(places))

    def _updates(self, name: str) -> bool:
        """Whether a value is a new parameter or optimizer state (new buffers come out of forward calls)."""
        return name in self.commits and self.commits[name].kind != "buffer"

    def call(self, position: int, node: Node) -> None:
        """Add the task of a call."""
        device = str(node.attrs["device"])
        dependencies = Dependencies()
        call = self.described(node, dependencies)
        if device in self.after and any(isinstance(argument, Resident) for argument in call.arguments):
            dependencies.at(self.after[device].key)
        for task in node.attrs.get("after", ()):
            if task in self.keys:
                dependencies.at(self.keys[task])
        key = f"daggc.{call.callee}-{self.token}-{position}"
        self.add(key, Task(key, self.run, call, self.context.get(device), *dependencies.refs()), device, -position)
        self.result.calls.append(key)
        self.keys[call.name] = key
        self.found.update((value.name, Found(key, index)) for index, value in enumerate(node.outputs))

    def described(self, node: Node, dependencies: Dependencies) -> Call:
        callee = str(node.attrs["callee"])
        arguments = tuple(dependencies.argument(self.found[value.name]) for value in node.inputs)
        name = str(node.attrs.get("task", callee))
        return Call(self.program, callee, arguments, name, int(node.attrs.get("microbatch", -1)))

    def updates(self, update: Callable[..., Any]) -> None:
        """For each device with state, one task that makes its next version.

        It waits for everything else of the graph, on all devices: a step that fails before its updates changes
        nothing anywhere, and no task that reads the version it replaces is still to run.
        """
        homes = {str(p.value.type.device) for p in self.graph.inputs if isinstance(self.found[p.value.name], Resident)}
        last = self.last_tasks()
        done = {device: self.done(device, keys, number) for number, (device, keys) in enumerate(last.items())}
        for number, device in enumerate(sorted(homes | set(self.deferred))):
            dependencies = Dependencies()
            if device in self.after:
                dependencies.at(self.after[device].key)
            nodes = self.deferred.get(device, [])
            calls = tuple(self.described(node, dependencies) for node in nodes)
            commits = tuple(tuple(self.commits[value.name].ref for value in node.outputs) for node in nodes)
            values = tuple(
                (port.ref, dependencies.argument(self.found[name]))
                for name, port in self.commits.items()
                if name in self.found and str(port.value.type.device) == device
            )
            key = f"daggc.update-{self.token}-{number}"
            for other, barrier in done.items():
                for awaited in last[other] if other == device else [barrier]:
                    dependencies.at(awaited)
            task = Task(key, update, Update(calls, commits, values), self.context.get(device), *dependencies.refs())
            self.add(key, task, device, -len(self.graph.nodes))
            self.result.updates[device] = Found(key)

    def last_tasks(self) -> dict[str, list[str]]:
        """For each device, the tasks so far that no other waits for: when they have ended, all have."""
        awaited = {key for task in self.result.tasks.values() for key in task.dependencies}
        last: dict[str, list[str]] = {}
        for key in self.result.tasks:
            if key not in awaited:
                last.setdefault(self.result.device[key], []).append(key)
        return dict(sorted(last.items()))

    def done(self, device: str, keys: Sequence[str], number: int) -> str:
        """A task without a result, for other devices to wait for."""
        key = f"daggc.done-{self.token}-{number}"
        self.add(key, Task(key, nothing, *(TaskRef(awaited) for awaited in keys)), device, 1)
        return key

    def add(self, key: str, task: Task, device: str, priority: int) -> None:
        self.result.tasks[key] = task
        self.result.device[key] = device
        self.result.priority[key] = priority

    def outputs(self) -> None:
        for port in self.graph.outputs:
            if port.value.name in self.commits:
                continue
            source = self.found[port.value.name]
            if isinstance(source, Resident):
                raise PlanError(f"@{self.graph.name}: output {port.ref!r} is a resident value as it is")
            self.result.outputs[port.ref] = source


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


def nothing(*_: Any) -> None:
    """What a task gives that only has to be waited for."""


def pick(result: Any, index: int | str) -> Any:
    """One value of a task's result."""
    return result[index]
