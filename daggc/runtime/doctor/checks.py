"""What the doctor finds: pure functions from facts to findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from daggc.plan.device import Link
from daggc.runtime.doctor.facts import PROBE, Process, SchedulerFacts, WorkerFacts
from daggc.runtime.local_workers import dask_settings, worker_environment
from daggc.runtime.streams import AT_ONCE, SWITCH

LEVELS = ("ok", "warn", "bad")
_GIB = 1 << 30
_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")
_MUST_AGREE = ("python", "torch", "daggc")  # between all processes; of Dask's own versions Dask warns


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        level: ``ok``, ``warn`` (it works, but slower or less safely) or ``bad`` (it fails, or gives other numbers).
        found: what is there.
        why: what depends on it.
        fix: what to do, where that is no setting of Dask; empty if nothing.
        settings: Dask's configuration that sets it right, by dotted key.
    """

    name: str
    level: str
    found: str
    why: str
    fix: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "check": self.name,
            "level": self.level,
            "found": self.found,
            "why": self.why,
            "fix": self.fix,
            "settings": dict(self.settings),
        }


def cluster_checks(
    client: Process, scheduler: SchedulerFacts | None, workers: Sequence[WorkerFacts], interval: float, mode: str
) -> list[Check]:
    """What is found of a cluster that answers.

    Args:
        interval: seconds for which the client collects messages.
        mode: the client's ``DAGGC_STREAMS``.
    """
    found = [
        check_versions(client, scheduler, workers),
        check_allocator(workers),
        check_threads(workers),
        check_slots(workers),
        check_profile(workers),
        check_memory(workers),
        check_sizes(workers),
        check_gpus([(str(worker), worker.process) for worker in workers]),
    ]
    if scheduler is not None:
        found += [
            check_streams(scheduler, workers, interval, mode),
            check_replicas(scheduler),
            *scheduler_checks(scheduler),
        ]
    return found


def machine_checks(process: Process, config: Callable[[str], Any]) -> list[Check]:
    """What is found of this machine, without a cluster; ``config``: Dask's configuration by dotted key."""
    shown = ", ".join(f"{name} {version}" for name, version in process.versions.items())
    differing = {key: value for key, value in dask_settings().items() if config(key) != value}
    why = "clusters started from Python take Dask's configuration of that moment"
    return [
        Check("versions", "ok", shown, "workers need the same"),
        Check("cores", "ok", f"{process.cores} cores, {process.memory / _GIB:.1f} GiB", "workers x torch threads"),
        check_gpus([("this machine", process)]),
        Check(
            "configuration",
            "warn" if differing else "ok",
            f"{len(differing)} settings are not those for pinned tasks" if differing else "as daggc sets it",
            why,
            "start workers with daggc.runtime.local_workers, which sets them, or set them first" if differing else "",
            differing,
        ),
    ]


def check_versions(client: Process, scheduler: SchedulerFacts | None, workers: Sequence[WorkerFacts]) -> Check:
    """Everyone has the same Python, torch and daggc; Dask's versions may differ."""
    everyone = {str(worker): worker.process.versions for worker in workers}
    if scheduler is not None:
        everyone["the scheduler"] = scheduler.versions
    wrong: dict[str, list[str]] = {}
    for who, own in everyone.items():
        for name, version in client.versions.items():
            if _relevant(name, own.get(name, "none")) != _relevant(name, version):
                wrong.setdefault(name, []).append(f"{who} has {name} {own.get(name, 'none')}, the client {version}")
    level = "bad" if wrong.keys() & set(_MUST_AGREE) else "warn" if wrong else "ok"
    found = "; ".join(line for lines in wrong.values() for line in lines)
    same = ", ".join(f"{name} {version}" for name, version in client.versions.items())
    pins = " ".join(f"{name}=={client.versions[name]}" for name in sorted(wrong) if name not in ("python", "daggc"))
    others = " and ".join(f"{name} {client.versions[name]}" for name in ("python", "daggc") if name in wrong)
    fix = ", ".join(filter(None, (f"pip install {pins}" if pins else "", f"use {others}" if others else "")))
    return Check(
        "versions",
        level,
        found or same,
        "tasks are pickled between these processes, and numbers differ between versions of torch",
        f"on those: {fix}" if wrong else "",
    )


def _relevant(name: str, version: str) -> str:
    """The part of a version that must agree: of Python the first two numbers, of torch not the build."""
    return ".".join(version.split(".")[:2]) if name == "python" else version.partition("+")[0]


def check_allocator(workers: Sequence[WorkerFacts]) -> Check:
    """glibc keeps freed memory instead of giving each large tensor's back to the system."""
    wanted = {name: value for name, value in worker_environment().items() if not name.endswith("_THREADS")}
    wrong: dict[str, list[str]] = {}
    for worker in workers:
        given = worker.process.variables
        if not worker.process.glibc or any(name in given.get("LD_PRELOAD", "") for name in _ALLOCATORS):
            continue
        low = [name for name, value in wanted.items() if not _keeps(given.get(name, ""), value)]
        if low:
            shown = ", ".join(f"{name}={given.get(name, 'not set')}" for name in low)
            wrong.setdefault(shown, []).append(worker.name)
    return Check(
        "allocator",
        "warn" if wrong else "ok",
        "; ".join(f"{shown} on {_listed(names)}" for shown, names in wrong.items()) or "memory is kept",
        "with Dask's settings each large tensor is mapped and faulted in anew: a step took 1.2 times as long",
        f"started otherwise than by Dask's nanny: {' '.join(f'{k}={v}' for k, v in wanted.items())}" if wrong else "",
        {"distributed.nanny.pre-spawn-environ": worker_environment(workers[0].process.threads)} if wrong else {},
    )


def _keeps(given: str, wanted: str) -> bool:
    """Whether a variable is as it should be; sizes may be larger, and somewhat smaller."""
    if not wanted.isdigit() or int(wanted) < 1024:
        return wanted in given.split(":")
    return given.isdigit() and int(given) >= min(_GIB, int(wanted))


def check_threads(workers: Sequence[WorkerFacts]) -> Check:
    """On each host the workers' torch threads are as many as its cores, or fewer."""
    hosts: dict[str, list[WorkerFacts]] = {}
    for worker in workers:
        hosts.setdefault(worker.process.host, []).append(worker)
    lines, crowded, idle = [], False, False
    for host, own in hosts.items():
        threads = sum(worker.process.threads for worker in own if not worker.process.gpus)
        cores = max(worker.process.cores for worker in own)
        crowded |= threads > cores
        idle |= 0 < threads < cores / 2
        lines.append(f"{host}: {len(own)} workers, {threads} threads of torch, {cores} cores")
    share = "OMP_NUM_THREADS = cores / workers of a host, in the nanny's variables, or train_step(threads=n)"
    return Check(
        "threads",
        "warn" if crowded or idle else "ok",
        "; ".join(lines),
        "threads beyond the cores only compete" if crowded or not idle else "cores are left over",
        share if crowded or idle else "",
    )


def check_slots(workers: Sequence[WorkerFacts]) -> Check:
    """Every worker has a thread that sends while another computes."""
    few = [worker.name for worker in workers if worker.slots < 2]
    return Check(
        "threads of Dask",
        "warn" if few else "ok",
        f"one on {_listed(few)}" if few else "two or more a worker",
        "with one, results wait until the next task has ended before they are sent",
        "threads_per_worker=2, or dask worker --nthreads 2" if few else "",
    )


def check_profile(workers: Sequence[WorkerFacts]) -> Check:
    """Dask's statistical profiler is off."""
    sampled = [worker.name for worker in workers if worker.profile]
    return Check(
        "profile",
        "warn" if sampled else "ok",
        f"threads are sampled on {_listed(sampled)}" if sampled else "off",
        "it costs time on the cores that compute",
        settings={"distributed.worker.profile.enabled": False} if sampled else {},
    )


def check_memory(workers: Sequence[WorkerFacts]) -> Check:
    """No worker stops or spills at a memory limit."""
    limited = [worker for worker in workers if worker.memory_limit and any(worker.fractions.values())]
    lines = [
        f"{worker.name}: {worker.memory_limit / _GIB:.1f} GiB, "
        + ", ".join(f"{name} at {fraction:.0%}" for name, fraction in worker.fractions.items() if fraction)
        for worker in limited
    ]
    keys = sorted({name for worker in limited for name, fraction in worker.fractions.items() if fraction})
    return Check(
        "memory",
        "warn" if limited else "ok",
        "; ".join(lines) or "no limit at which workers spill or stop",
        "a worker that stops at its limit stops the pipeline; what is spilled comes back from disk",
        "memory_limit=0, or dask worker --memory-limit 0; or:" if limited else "",
        {f"distributed.worker.memory.{name}": False for name in keys},
    )


def check_sizes(workers: Sequence[WorkerFacts]) -> Check:
    """Dask knows how big tensors are, and daggc's handlers send them."""
    blind = [worker.name for worker in workers if worker.probe < 4 * PROBE]
    foreign = [worker.name for worker in workers if worker.serializer != "daggc.backend.serializers"]
    found = [f"a tensor counts as {worker.probe} bytes on {worker.name}" for worker in workers if worker.name in blind]
    found += [f"{worker.serializer} sends tensors on {worker.name}" for worker in workers if worker.name in foreign]
    return Check(
        "sizes and serializers",
        "bad" if found else "ok",
        "; ".join(found) or "registered on every worker",
        "Dask places, limits and spills by size; bf16 and others do not travel without the serializers",
        "something registered others after daggc: import daggc.backend.serializers last" if found else "",
    )


def check_gpus(processes: Iterable[tuple[str, Process]]) -> Check:
    """Where there is a GPU, torch sees it."""
    processes = list(processes)
    seen = [f"{who}: {', '.join(own.gpus)}" for who, own in processes if own.gpus]
    unseen = [who for who, own in processes if own.has_gpu and not own.gpus]
    return Check(
        "GPUs",
        "warn" if unseen else "ok",
        "; ".join(seen + [f"torch sees none of those of {who}" for who in unseen]) or "none",
        "a worker computes on the first GPU that its torch sees",
        "install a CUDA build of torch, or look at CUDA_VISIBLE_DEVICES" if unseen else "",
    )


def check_streams(scheduler: SchedulerFacts, workers: Sequence[WorkerFacts], interval: float, mode: str) -> Check:
    """Messages between scheduler, workers and client are sent at once, or will be."""
    waits = {
        "to workers": scheduler.intervals.to_worker,
        "from workers": max((worker.interval for worker in workers), default=0.0),
        "to clients": scheduler.intervals.to_client,
        "from this client": interval,
    }
    slow = {name: seconds for name, seconds in waits.items() if seconds > AT_ONCE.to_worker}
    forbidden = [name for name in ("register_scheduler_plugin", "register_worker_plugin") if name in scheduler.blocked]
    level, fix = "ok", ""
    if slow and forbidden:
        level, fix = "warn", f"take {' and '.join(forbidden)} out of distributed.scheduler.blocked-handlers"
    elif slow and mode == "off":
        level, fix = "warn", f"unset {SWITCH} in the client's environment"
    elif slow:
        fix = "nothing to set: daggc sets them when it takes the cluster into use (daggc.compile)"
    return Check(
        "streams",
        level,
        ", ".join(f"{seconds * 1e3:g} ms {name}" for name, seconds in slow.items()) or "messages are sent at once",
        "Dask collects messages for so long: of a dependent task's 6 ms, 4",
        fix,
    )


def scheduler_checks(scheduler: SchedulerFacts) -> list[Check]:
    """What a scheduler is set to."""
    ttl, patience = scheduler.worker_ttl, scheduler.no_workers_timeout
    late = ttl is None or ttl > 60
    return [
        Check(
            "work stealing",
            "warn" if scheduler.stealing else "ok",
            "on" if scheduler.stealing else "off",
            "tasks are pinned: looking for some to steal only costs time",
            settings={"distributed.scheduler.work-stealing": False} if scheduler.stealing else {},
        ),
        Check(
            "worker-ttl",
            "warn" if late else "ok",
            "never" if ttl is None else f"{ttl:g} s",
            "a worker that hangs is given up after this time, and the step with it",
            settings={"distributed.scheduler.worker-ttl": "30s"} if late else {},
        ),
        Check(
            "no-workers-timeout",
            "ok" if patience is not None else "warn",
            "never" if patience is None else f"{patience:g} s",
            "a task pinned to a worker that is gone fails after this time; daggc's own calls notice in half a second",
            settings={} if patience is not None else {"distributed.scheduler.no-workers-timeout": "60s"},
        ),
    ]


def check_replicas(scheduler: SchedulerFacts) -> Check:
    """What a step has sent to a worker is not dropped there before it is read, or will not be."""
    forbidden = scheduler.drops_replicas and "register_scheduler_plugin" in scheduler.blocked
    key = "distributed.scheduler.active-memory-manager.start"
    return Check(
        "copies of values",
        "warn" if forbidden else "ok",
        "Dask's memory manager drops them every 2 s" if scheduler.drops_replicas else "those of steps are kept",
        "it drops what a task that is not yet ready has on its worker: the same bytes are sent again",
        "nothing to set: daggc keeps its own when it takes the cluster into use (daggc.compile)"
        if scheduler.drops_replicas and not forbidden
        else "",
        {key: dask_settings()[key]} if forbidden else {},
    )


def check_transfers(results: Sequence[tuple[str, str]], between: str) -> Check:
    """Tensors of every kind arrive as they were."""
    wrong = [f"{kind}: {what}" for kind, what in results if what]
    return Check(
        "transfers",
        "bad" if wrong else "ok",
        "; ".join(wrong) or f"{len(results)} kinds of tensors arrive as they were, {between}",
        "results of tasks travel; a dtype that does not makes the step wait for ever, or gives other numbers",
        "the same daggc and torch everywhere, and no other serializer of tensors" if wrong else "",
    )


def check_links(links: Mapping[tuple[str, str], Link], hops: Mapping[str, float]) -> Check:
    """What calibration measured, if it did; ``hops``: seconds that a dependent task waits, by device."""
    lines = [
        f"{source}-{target}: {link.bandwidth / 1e9:.2f} GB/s, {link.latency * 1e3:.2f} ms"
        for (source, target), link in links.items()
    ]
    lines += [f"a dependent task on {name}: {seconds * 1e3:.2f} ms" for name, seconds in hops.items()]
    return Check(
        "calibration",
        "ok",
        "; ".join(lines) or "these workers were not measured yet",
        "plans are made with these",
        "" if lines else "daggc calibrate; daggc.compile does it by itself",
    )


def _listed(names: Sequence[str]) -> str:
    return f"worker {names[0]}" if len(names) == 1 else f"workers {', '.join(names)}"
