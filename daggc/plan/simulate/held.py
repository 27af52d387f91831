"""What devices hold while a placed step runs: state, values that come and go, and what a process has around them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from daggc.ir.graph import Graph, Program
from daggc.plan.device import Cluster
from daggc.plan.messages import Message, messages_of
from daggc.plan.simulate.bodies import Allocation, allocation_of
from daggc.plan.simulate.jobs import Runtime
from daggc.plan.simulate.memory import Buffer, Memory, memory_over_time
from daggc.plan.simulate.result import Simulation

_REPLACED = ("param", "buffer", "state")  # kinds of outputs that take the place of an input
_RESIDENT = (*_REPLACED, "constant")  # kinds of inputs that stay on their device between steps
_SKEW = 0.05  # of a step: so much later than simulated, a receiver may drop what it was sent


def memory_of(step: Graph, program: Program, cluster: Cluster, done: Simulation, runtime: Runtime) -> dict[str, Memory]:
    """The memory of each device over time, when tasks run as they were simulated."""
    processes = {device.name for device in cluster.devices if device.kind == "cpu"}
    shared = [message for message in messages_of(step) if _is_shared(message, cluster, runtime)]
    apart = {index for message in shared for index in message.transfers}
    resident, buffers, workspace, allocated = _values(step, program, runtime, apart)
    blocks = _blocks(step, done, shared)

    def held(device: str, own: Memory) -> Memory:
        if device not in processes:
            return own
        holes = min(runtime.holes * allocated.get(device, 0.0), runtime.most_holes * own.peak)
        return Memory(own.times, own.bytes * runtime.slack + runtime.process + holes + blocks.get(device, 0.0))

    values = memory_over_time(done.tasks, buffers, resident, workspace)
    return {device: held(device, own) for device, own in values.items()}


def _is_shared(message: Message, cluster: Cluster, runtime: Runtime) -> bool:
    """Whether a message lies in memory that both ends have."""
    if runtime.shares is None or message.nbytes <= runtime.shares:
        return False
    ends = cluster.device(message.source), cluster.device(message.target)
    return bool(ends[0].host) and ends[0].host == ends[1].host and all(end.kind == "cpu" for end in ends)


def _blocks(step: Graph, done: Simulation, messages: Sequence[Message]) -> dict[str, float]:
    """Bytes of shared memory that each device has.

    A block is used again, for a message of the same size, when its message was read; it stays at both ends.
    """
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(step.nodes):
        for value in node.inputs:
            readers.setdefault(value.name, []).append(index)
    skew = _SKEW * done.makespan
    uses: dict[tuple[str, str, int], list[tuple[float, int]]] = {}  # changes of how many blocks are used
    for message in messages:
        values = [step.nodes[index].output.name for index in message.transfers]
        begin = max(done.tasks[index].start for index in message.transfers)
        end = max((done.tasks[index].end for name in values for index in readers.get(name, ())), default=begin) + skew
        for key in ((message.source, "", message.nbytes), (message.target, message.source, message.nbytes)):
            uses.setdefault(key, []).extend([(begin, 1), (end, -1)])
    found: dict[str, float] = {}
    for (device, _, nbytes), changes in uses.items():
        found[device] = found.get(device, 0.0) + nbytes * _most(changes)
    return found


def _most(changes: Iterable[tuple[float, int]]) -> int:
    """The largest sum of changes up to a time."""
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def _values(
    step: Graph, program: Program, runtime: Runtime, apart: Collection[int]
) -> tuple[dict[str, float], list[Buffer], dict[int, float], dict[str, float]]:
    """Bytes that devices hold all the time, values that come and go, the workspace of tasks by index, and all bytes
    that a step allocates.

    Args:
        apart: transfers whose values are not in the memory of the device that they come to.
    """
    allocated: dict[str, float] = {}
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(step.nodes):
        for value in node.inputs:
            readers.setdefault(value.name, []).append(index)
    makers = {value.name: index for index, node in enumerate(step.nodes) for value in node.outputs}
    bodies: dict[str, Allocation] = {}
    buffers: list[Buffer] = []
    workspace: dict[int, float] = {}
    fresh: set[str] = set()  # results that have memory of their own
    kept = {port.value.name for port in step.outputs}

    def last_readers(name: str) -> list[int]:
        """Tasks that need a value, there or on other devices: what is sent is held until it was used."""
        found: list[int] = []
        for index in readers.get(name, ()):
            node = step.nodes[index]
            found += [index, *last_readers(node.output.name)] if node.op == "transfer" else [index]
        return found

    for index, node in enumerate(step.nodes):
        device = str(node.attrs["device"])
        if node.op == "transfer":
            name, nbytes = node.output.name, 0 if index in apart else node.output.type.nbytes
            buffers.append(Buffer(device, nbytes, index, tuple(readers.get(name, ())), name in kept))
            allocated[device] = allocated.get(device, 0.0) + nbytes
            continue
        callee = str(node.attrs["callee"])
        if callee not in bodies:
            bodies[callee] = allocation_of(program[callee])
        body = bodies[callee]
        workspace[index] = body.workspace
        allocated[device] = allocated.get(device, 0.0) + body.allocated
        if runtime.in_place and node.attrs.get("phase") == "update":
            continue
        here = {i for value in node.outputs for i in readers.get(value.name, ()) if step.nodes[i].op == "call"}
        for place, nbytes in enumerate(body.outputs):
            own = [value for value, share in zip(node.outputs, body.shares, strict=True) if share == place]
            needed = {i for value in own for i in last_readers(value.name)} | (here if runtime.whole_results else set())
            fresh.update(value.name for value in own)
            stays = any(value.name in kept for value in own)
            buffers.append(Buffer(device, nbytes, index, tuple(sorted(needed)), stays))
    resident: dict[str, float] = {}
    successors = {port.ref: port.value.name for port in step.outputs if port.kind in _REPLACED}
    for port in step.inputs:
        device, nbytes = str(port.value.type.device), float(port.value.type.nbytes)
        if port.kind not in _RESIDENT:
            buffers.append(Buffer(device, nbytes, -1, tuple(last_readers(port.value.name))))
            resident[device] = resident.get(device, 0.0) + runtime.ahead * nbytes
            continue
        versions = runtime.versions if port.kind in ("param", "buffer") and port.ref in successors else 1
        new = successors.get(port.ref, "")
        if new in fresh:  # the oldest version goes when the new one is there
            buffers.append(Buffer(device, nbytes, -1, (*last_readers(port.value.name), makers[new])))
            versions -= 1
        resident[device] = resident.get(device, 0.0) + versions * nbytes
    return resident, buffers, workspace, allocated
