"""A placed graph of calls and transfers as jobs: times by the cost model, memory from the types of values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from daggc.ir.graph import Graph, Node, Program
from daggc.plan.cost import graph_seconds
from daggc.plan.device import Cluster
from daggc.plan.simulate.bodies import Allocation, allocation_of
from daggc.plan.simulate.engine import run_jobs
from daggc.plan.simulate.jobs import IDEAL, Job, Runtime
from daggc.plan.simulate.memory import Buffer, Memory, memory_over_time
from daggc.plan.simulate.result import Simulation

# Calibration measures handling in chains of tasks that do nothing, where caches are warm.
_IN_STEP = 2.0  # times as long it takes in a step (fitted on 34 steps of nine models)
_REPLACED = ("param", "buffer", "state")  # kinds of outputs that take the place of an input
_RESIDENT = (*_REPLACED, "constant")  # kinds of inputs that stay on their device between steps


def simulate(
    step: Graph,
    program: Program,
    cluster: Cluster,
    seconds: Callable[[Node], float] | None = None,
    strict: bool = True,
    runtime: Runtime = IDEAL,
    memory: bool = True,
) -> Simulation:
    """Simulate a placed graph of calls and transfers.

    Devices of one host share its cores where the cluster counts them, and their transfers its loopback.

    Args:
        program: has the bodies of the calls.
        seconds: time of a call; by default the roofline of its body on its device.
        strict: devices keep the order of the graph.
        runtime: what running tasks takes beside the tasks.
        memory: simulate memory too; without it, it is faster by half.
    """
    seconds = seconds or _roofline(step, program, cluster)
    sharing = _Sharing(cluster, runtime)
    jobs = _jobs(step, cluster, seconds, sharing, runtime.message)
    if runtime.barrier:
        _hold_updates(step, jobs)
    handling = _handling(step, sharing, runtime.per_device)
    done = _visible(run_jobs([*jobs, *handling], strict, sharing.capacity, runtime), len(jobs))
    if not memory:
        return done
    resident, buffers, workspace = _memory(step, program, runtime)
    values = memory_over_time(done.tasks, buffers, resident, workspace)
    processes = {device.name for device in cluster.devices if device.kind == "cpu"}
    held = {
        device: Memory(own.times, own.bytes * runtime.slack + runtime.process) if device in processes else own
        for device, own in values.items()
    }
    return replace(done, memory=held)


def _jobs(
    step: Graph, cluster: Cluster, seconds: Callable[[Node], float], sharing: _Sharing, message: float
) -> list[Job]:
    """A job for each node, in order; ``message`` is what every task is followed by already."""
    makers: dict[str, int] = {}
    names: dict[str, int] = {}
    jobs: list[Job] = []
    for index, node in enumerate(step.nodes):
        needs = [makers[value.name] for value in node.inputs if value.name in makers]
        attrs = node.attrs
        if node.op == "transfer":
            source, target = str(node.inputs[0].type.device), str(attrs["device"])
            link = cluster.between(source, target)
            occupied = node.output.type.nbytes / link.bandwidth
            uses = sharing.transfer(source, target)
            job = Job(
                node.output.name, f"{source}->{target}", occupied, tuple(needs),
                max(link.latency - message, 0.0), True, uses=uses,
            )  # fmt: skip
        else:
            needs += [names[name] for name in attrs.get("after", ()) if name in names]
            name, device = str(attrs.get("task") or attrs["callee"]), str(attrs["device"])
            names[name] = index
            job = Job(
                name, device, seconds(node), tuple(needs), 0.0, False, attrs.get("stage"),
                str(attrs.get("phase", "")), attrs.get("microbatch"), sharing.task(device),
            )  # fmt: skip
        jobs.append(job)
        makers.update((value.name, index) for value in node.outputs)
    return jobs


def _handling(step: Graph, sharing: _Sharing, per_device: float) -> list[Job]:
    """What the machinery computes for each device, task and message, on cores that the tasks share."""
    makers = {value.name: index for index, node in enumerate(step.nodes) for value in node.outputs}
    readers = {value.name: index for index, node in reversed([*enumerate(step.nodes)]) for value in node.inputs}
    devices = dict.fromkeys(str(node.attrs["device"]) for node in step.nodes if node.op == "call")
    found = [job for device in devices for job in sharing.handling(device, per_device / _IN_STEP, ())]
    messages: dict[tuple[int | str | None, int | None], list[int]] = {}  # values that go the same way go as one
    for index, node in enumerate(step.nodes):
        if node.op == "transfer":
            value = node.inputs[0]
            way = makers.get(value.name, value.type.device), readers.get(node.output.name)
            messages.setdefault(way, []).append(index)
        else:
            device = str(node.attrs["device"])
            found += sharing.handling(device, sharing.of_task(device), (index,))
    for sent in messages.values():
        nbytes = sum(step.nodes[index].output.type.nbytes for index in sent)
        source, target = str(step.nodes[sent[0]].inputs[0].type.device), str(step.nodes[sent[0]].attrs["device"])
        for end in (source, target):
            found += sharing.handling(end, sharing.of_message(source, target, nbytes), (sent[0],))
    return found


def _visible(done: Simulation, count: int) -> Simulation:
    """A simulation of the first ``count`` jobs alone."""
    tasks = done.tasks[:count]
    end = max((task.end for task in tasks), default=0.0)
    return replace(done, tasks=tasks, makespan=end, places=tuple(dict.fromkeys(task.job.place for task in tasks)))


def _roofline(step: Graph, program: Program, cluster: Cluster) -> Callable[[Node], float]:
    """Times of calls by their bodies; a device whose neighbours compute nothing is not slowed down by them."""
    known: dict[tuple[str, str], float] = {}
    busy = {str(node.attrs["device"]) for node in step.nodes if node.op == "call"}
    hosts = Counter(device.host for device in cluster.devices if device.name in busy)
    devices = {
        device.name: device if hosts[device.host] > 1 else replace(device, slowdown={}) for device in cluster.devices
    }

    def seconds(node: Node) -> float:
        key = str(node.attrs["callee"]), str(node.attrs["device"])
        if key not in known:
            device = devices.get(key[1]) or cluster.device(key[1])
            known[key] = graph_seconds(program[key[0]], device)
        return known[key]

    return seconds


class _Sharing:
    """What tasks and transfers use of what their hosts have."""

    def __init__(self, cluster: Cluster, runtime: Runtime) -> None:
        self._devices = {device.name: device for device in cluster.devices}
        self._cluster, self._cores = cluster, cluster.cores
        self._per_transfer = runtime.transfer_cores
        hosts = dict.fromkeys(device.host for device in cluster.devices if device.host and device.kind == "cpu")
        self.capacity = {
            **{f"cores {host}": float(count) for host, count in cluster.cores.items()},
            **{f"loopback {host}": 1.0 for host in hosts},
        }

    def task(self, device: str) -> tuple[tuple[str, float], ...]:
        own = self._devices[device]
        return ((f"cores {own.host}", float(own.threads)),) if own.threads and own.host in self._cores else ()

    def of_task(self, device: str) -> float:
        """Seconds of a core that go into a task."""
        return self._devices[device].handling

    def of_message(self, source: str, target: str, nbytes: float) -> float:
        """Seconds of a core that go into a message at each end."""
        link = self._cluster.between(source, target)
        return link.handling + nbytes * link.copying

    def handling(self, device: str, seconds: float, needs: tuple[int, ...]) -> list[Job]:
        """The job of handling, where the host's cores are counted."""
        host = self._devices[device].host
        if not seconds or host not in self._cores:
            return []
        return [Job("handling", f"handling {device}", _IN_STEP * seconds, needs, uses=((f"cores {host}", 1.0),))]

    def transfer(self, source: str, target: str) -> tuple[tuple[str, float], ...]:
        """The cores that both ends take; between workers of one host also its loopback, of which there is one."""
        ends = [self._devices[source], self._devices[target]]
        uses = [(f"cores {end.host}", self._per_transfer) for end in ends if end.host in self._cores]
        uses = uses if self._per_transfer else []
        if ends[0].host and ends[0].host == ends[1].host and all(end.kind == "cpu" for end in ends):
            uses.append((f"loopback {ends[0].host}", 1.0))
        return tuple(uses)


def _hold_updates(step: Graph, jobs: list[Job]) -> None:
    """Updates wait for everything else, as they do on workers: a step that fails before them changes nothing."""
    updates = [i for i, node in enumerate(step.nodes) if node.attrs.get("phase") == "update"]
    if not updates:
        return
    behind = {index for update in updates for index in jobs[update].needs}
    others = [i for i, node in enumerate(step.nodes[: updates[0]]) if node.op == "call"]
    awaited = {source for i, job in enumerate(jobs[: updates[0]]) if i not in behind for source in job.needs}
    last = [i for i in others if i not in awaited]
    for update in updates:
        jobs[update] = replace(jobs[update], needs=(*jobs[update].needs, *last))


def _memory(step: Graph, program: Program, runtime: Runtime) -> tuple[dict[str, float], list[Buffer], dict[int, float]]:
    """Bytes that devices hold all the time, values that come and go, and the workspace of tasks by index."""
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
            name = node.output.name
            buffers.append(Buffer(device, node.output.type.nbytes, index, tuple(readers.get(name, ())), name in kept))
            continue
        callee = str(node.attrs["callee"])
        if callee not in bodies:
            bodies[callee] = allocation_of(program[callee])
        body = bodies[callee]
        workspace[index] = body.workspace
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
    return resident, buffers, workspace
