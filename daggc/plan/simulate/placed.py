"""A placed graph of calls and transfers as jobs: times by the cost model, memory from the types of values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from daggc.ir.graph import Graph, Node, Program
from daggc.plan.cost import graph_seconds
from daggc.plan.device import Cluster
from daggc.plan.messages import messages_of
from daggc.plan.simulate.engine import run_jobs
from daggc.plan.simulate.held import memory_of
from daggc.plan.simulate.jobs import IDEAL, Job, Runtime
from daggc.plan.simulate.result import Simulation

# Calibration measures handling in chains of tasks that do nothing, where caches are warm.
_IN_STEP = 2.0  # times as long it takes in a step (fitted on 34 steps of nine models)


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
    return replace(done, memory=memory_of(step, program, cluster, done, runtime))


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
    devices = dict.fromkeys(str(node.attrs["device"]) for node in step.nodes if node.op == "call")
    found = [job for device in devices for job in sharing.handling(device, per_device / _IN_STEP, ())]
    for index, node in enumerate(step.nodes):
        if node.op != "transfer":
            device = str(node.attrs["device"])
            found += sharing.handling(device, sharing.of_task(device), (index,))
    for message in messages_of(step):
        for end in (message.source, message.target):
            seconds = sharing.of_message(message.source, message.target, message.nbytes)
            found += sharing.handling(end, seconds, (message.transfers[0],))
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
