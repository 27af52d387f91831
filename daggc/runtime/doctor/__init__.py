"""``daggc.doctor``: whether a cluster, or this machine, is set up as daggc needs it, and what to set where it is not.

Everything asked of another process has a time-out: a cluster that hangs is a finding, not a hang.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask
import yaml

from daggc.plan.device import Link
from daggc.runtime.calibration.cache import read_entry
from daggc.runtime.calibration.session import Shared
from daggc.runtime.doctor.checks import (
    LEVELS,
    Check,
    check_links,
    check_transfers,
    cluster_checks,
    machine_checks,
)
from daggc.runtime.doctor.facts import WorkerFacts, scheduler_facts, this_process, worker_facts
from daggc.runtime.doctor.transfers import transfers
from daggc.runtime.pool import current_client
from daggc.runtime.streams import SWITCH

__all__ = ["Check", "Diagnosis", "doctor"]


@dataclass(frozen=True)
class Diagnosis:
    """All findings; prints as lines, with what to set as YAML at the end."""

    checks: tuple[Check, ...]

    @property
    def level(self) -> str:
        """The worst: ``ok``, ``warn`` or ``bad``."""
        return max((check.level for check in self.checks), key=LEVELS.index, default="ok")

    @property
    def yaml(self) -> str:
        """The settings that would set it right, as a Dask configuration file has them; empty if none would."""
        nested: dict[str, Any] = {}
        for check in self.checks:
            for key, value in check.settings.items():
                *folders, last = key.split(".")
                place = nested
                for folder in folders:
                    place = place.setdefault(folder, {})
                place[last] = value
        return yaml.safe_dump(nested, sort_keys=False) if nested else ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"level": self.level, "checks": [check.to_json() for check in self.checks], "yaml": self.yaml}

    def __str__(self) -> str:
        lines = [f"{check.level:4} {check.name}: {check.found}" for check in self.checks]
        return "\n".join([*lines, *(["", self.yaml] if self.yaml else [])])


def doctor(client: Any = None, *, seconds: float = 20.0) -> Diagnosis:
    """Look at the cluster of a client: versions, settings, and whether tensors travel.

    Changes nothing there. Clusters that daggc starts (:func:`daggc.runtime.local_workers.local_workers`) have nothing
    to warn of.

    Args:
        client: a ``distributed.Client``; by default the one that is open, and without one this machine is looked at.
        seconds: to wait for each answer; a worker's first takes as long as importing torch.
    """
    client = client or current_client()
    if client is None:
        return Diagnosis(tuple(machine_checks(this_process(), dask.config.get)))
    return Diagnosis(tuple(_cluster(client, seconds)))


def _cluster(client: Any, seconds: float) -> list[Check]:
    """Findings of a cluster, as far as it answers."""
    if client.status != "running":
        return [_silent("client", f"it is {client.status}", "open another")]
    try:
        known = _wait(client, client.scheduler.identity(n_workers=-1), seconds)["workers"]
    except Exception as wrong:
        return [_silent("scheduler", _said(wrong, seconds), "look whether it runs, and at its log")]
    found: list[Check] = []
    scheduler = None
    try:
        scheduler = _wait(client, client._run_on_scheduler(scheduler_facts), seconds)
    except Exception as wrong:
        found.append(_silent("scheduler", _said(wrong, seconds), "install daggc, torch and dask there as here"))
    if not known:
        return [*found, _silent("workers", "there are none", "start some, or wait for them")]
    workers = []
    for address, answer in _ask_workers(client, list(known), seconds).items():
        if isinstance(answer, WorkerFacts):
            workers.append(answer)
        else:
            name = f"worker {known[address]['name']} ({address})"
            found.append(_silent(name, _said(answer, seconds), "install daggc and torch there as here, or restart it"))
    workers.sort(key=lambda own: (float(own.name) if own.name.isdigit() else float("inf"), own.name, own.address))
    if workers:
        mode = os.environ.get(SWITCH) or "on"
        found += cluster_checks(this_process(), scheduler, workers, client.scheduler_comm.interval, mode)
        addresses = [worker.address for worker in workers]
        between = "from worker to worker" if len(workers) > 1 else "from the worker to here"
        found += [
            check_transfers(list(transfers(client, addresses, seconds)), between),
            check_links(*_measured(workers)),
        ]
    return found


def _silent(who: str, what: str, fix: str) -> Check:
    return Check(who, "bad", what, "nothing can be computed without it", fix)


def _said(wrong: Any, seconds: float) -> str:
    if isinstance(wrong, TimeoutError):
        return f"it does not answer within {seconds:g} s"
    return f"it cannot be asked: {type(wrong).__name__}: {wrong}"


def _wait(client: Any, asking: Coroutine[Any, Any, Any], seconds: float) -> Any:
    """What a coroutine on the client's loop gives. Raises what it raises, or TimeoutError."""
    running = asyncio.run_coroutine_threadsafe(asyncio.wait_for(asking, seconds), client.loop.asyncio_loop)
    try:
        return running.result(timeout=2 * seconds)
    finally:
        running.cancel()


def _ask_workers(client: Any, addresses: Sequence[str], seconds: float) -> dict[str, WorkerFacts | BaseException]:
    """What each worker is, or why it does not say."""

    async def ask(address: str) -> WorkerFacts:
        answers = await asyncio.wait_for(client._run(worker_facts, workers=[address]), seconds)
        return answers[address]

    async def ask_all() -> list[WorkerFacts | BaseException]:
        return await asyncio.gather(*map(ask, addresses), return_exceptions=True)

    try:
        answers = _wait(client, ask_all(), 2 * seconds)
    except Exception as wrong:  # the client is closed meanwhile, or its loop is held up
        return dict.fromkeys(addresses, wrong)
    return dict(zip(addresses, answers, strict=True))


def _measured(workers: Sequence[WorkerFacts]) -> tuple[Mapping[tuple[str, str], Link], Mapping[str, float]]:
    """Links and seconds of a hop that calibration has kept of workers like these."""
    kinds = {("gpu" if own.environment["device"] == "cuda" else "cpu") + f":{i}": own for i, own in enumerate(workers)}
    setting = [[name, own.environment] for name, own in kinds.items()]
    shared = Shared.from_json(read_entry("links", setting), tuple(kinds))
    devices = {name: read_entry("device", own.environment) for name, own in kinds.items()}
    hops = {name: float(own["overhead"]) + float(own["hop"]) for name, own in devices.items() if own}
    return shared.links if shared else {}, hops
