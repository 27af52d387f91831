"""The workers of a Dask client as devices: who they are, whether they live, submitting to them, waiting for them.

Work is pinned to workers by address. A pinned task whose worker is gone would wait for ever, so every wait
here looks, twice a second, whether all workers of the pool are still there.
"""

from __future__ import annotations

import asyncio
import copy
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import Future as Running
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from distributed import Client, Future, default_client
from distributed.comm.core import CommClosedError

from daggc.backend import serializers  # noqa: F401  # registers how tensors travel, on this side
from daggc.backend.dask_graph import Emission
from daggc.backend.dask_submission import packed, submission
from daggc.errors import DaggcError, PlanError, RunError, WorkerLostError
from daggc.ir.graph import Program
from daggc.plan.device import Cluster, Device, cluster_of, cpu_device, gpu_device
from daggc.runtime.channel import install
from daggc.runtime.replicas import keep_replicas
from daggc.runtime.spans import keep_records_small, span_annotation
from daggc.runtime.streams import send_at_once
from daggc.runtime.worker import COMPUTING, Facts, ProgramPlugin, describe, offer_computing, to_own_device

_POLL = 0.5  # seconds between looks at the workers while waiting
_ANSWER = 20  # seconds within which a scheduler that lives answers
_REACH = 3  # seconds within which workers answer that this process can connect to

Fetching = Running[Any]  # a coroutine on the client's loop


@dataclass(frozen=True)
class Pool:
    """Workers in a fixed order, as devices ``cpu:0``, ``gpu:1``, ... numbered by their names."""

    client: Any  # a distributed.Client; its declared types are unions of what it gives sync and async
    facts: tuple[Facts, ...]
    cluster: Cluster
    direct: bool = False  # whether this process reaches the workers without the scheduler

    @property
    def addresses(self) -> dict[str, str]:
        """Device name -> worker address."""
        return {device.name: fact.address for device, fact in zip(self.cluster.devices, self.facts, strict=True)}

    def ship(self, key: str, program: Program, functions: Mapping[str, Callable[..., Any]]) -> None:
        """Make a program known to all workers, those that join later too."""
        self._require_open()
        self.client.register_plugin(ProgramPlugin(key, program, functions))

    def forget(self, key: str) -> None:
        """Undo :meth:`ship`, without waiting: this may be called by the garbage collector, on any thread."""
        if self.client.status == "running":
            self.client.loop.add_callback(_forget, self.client, f"daggc-{key}")

    def submit(self, emission: Emission, keys: Sequence[str]) -> list[Future]:
        """Submit tasks, each pinned to its device's worker, or to the pool; returns futures of ``keys``."""
        self._require_open()
        addresses = self.addresses
        anywhere = list(addresses.values())
        computing = [] if emission.lanes else [*emission.calls, *(found.key for found in emission.updates.values())]
        tasks = packed(emission.tasks, keys)
        annotations = {
            "workers": {
                key: [addresses[emission.device[key]]] if key in emission.device else anywhere for key in tasks
            },
            "priority": {key: emission.priority.get(key, 0) for key in tasks},
            "resources": {key: {COMPUTING: 1} for key in computing},
            "span": dict.fromkeys(tasks, span_annotation()),
        }
        return self.client.get(submission(tasks, annotations), list(keys), sync=False)

    def scatter(self, tensors: Mapping[str, torch.Tensor], device: str) -> Future:
        """Send a dict of tensors to a device's worker; the future's result is that dict."""
        key = f"tensors-{uuid.uuid4().hex}"
        future = self.put({device: {key: dict(tensors)}})[key]
        return self.run_on(device, to_own_device, future) if device.startswith("gpu") else future

    def put(self, data: Mapping[str, Mapping[str, Any]]) -> dict[str, Future]:
        """Send values to workers, by device and key; all are there when this returns.

        They go straight to their workers where this process can reach them, and not through the scheduler, which
        would do nothing else meanwhile.

        Raises:
            WorkerLostError: a worker of the pool is gone.
            RunError: the values cannot be sent.
        """
        self._require_open()
        if self.client.scheduler.address.startswith("inproc"):
            data = copy.deepcopy(data)  # workers share our memory
        sending = asyncio.run_coroutine_threadsafe(self._put(data), self.client.loop.asyncio_loop)
        try:
            return self._wait(sending)
        except DaggcError:
            raise
        except (Exception, CancelledError, asyncio.CancelledError) as wrong:
            self.check()  # a worker is gone
            time.sleep(_POLL)
            self.check()  # the scheduler has noticed by now
            where = ", ".join(data)
            raise RunError(f"tensors could not be sent to {where}: {type(wrong).__name__}: {wrong}") from wrong

    async def _put(self, data: Mapping[str, Mapping[str, Any]]) -> dict[str, Future]:
        addresses = self.addresses
        sent = (
            self.client._scatter(dict(values), workers=[addresses[device]], hash=False, direct=self.direct)
            for device, values in data.items()
        )
        return {key: future for futures in await asyncio.gather(*sent) for key, future in futures.items()}

    def run_on(self, device: str, function: Callable[..., Any], *args: Any) -> Future:
        """Run a function once on a device's worker."""
        self._require_open()
        return self.client.submit(
            function, *args, workers=[self.addresses[device]], allow_other_workers=False, pure=False, retries=0
        )

    def gather(self, futures: Sequence[Future], timeout: float | None = None) -> list[Any]:
        """Wait for futures and fetch their results.

        Raises:
            WorkerLostError: a worker of the pool is gone; the futures are cancelled.
            RunError: the scheduler is gone, or ``timeout`` seconds have passed.
            DaggcError: what a task raised.
        """
        return self.wait(self.fetch(futures), futures, timeout)

    def fetch(self, futures: Sequence[Future]) -> Fetching:
        """Fetch results as soon as they are there; :meth:`wait` gives them."""
        gathering = self.client._gather(list(futures), direct=self.direct)
        return asyncio.run_coroutine_threadsafe(gathering, self.client.loop.asyncio_loop)

    def wait(self, fetching: Fetching, futures: Sequence[Future], timeout: float | None = None) -> list[Any]:
        """Wait for results that are being fetched; raises as :meth:`gather`."""
        try:
            return list(self._wait(fetching, futures, timeout))
        except DaggcError:
            raise
        except (Exception, CancelledError, asyncio.CancelledError) as wrong:
            self.check(futures)  # KilledWorker and the like: say which worker it was
            raise RunError(f"a task failed on a worker: {type(wrong).__name__}: {wrong}") from wrong

    def _wait(self, running: Fetching, futures: Sequence[Future] = (), timeout: float | None = None) -> Any:
        """What a coroutine on the client's loop gives; looks meanwhile whether the workers are there."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while True:
                try:
                    return running.result(timeout=_POLL)
                except TimeoutError:
                    if running.done():
                        raise
                self.check(futures)
                if deadline is not None and time.monotonic() > deadline:
                    self.cancel(futures)
                    raise RunError(f"{len(futures)} results were not there within {timeout:g} seconds")
        finally:
            running.cancel()

    def check(self, futures: Sequence[Future] = ()) -> None:
        """Raise WorkerLostError if a worker of the pool is gone, RunError if the scheduler is."""
        self._require_open()
        try:
            alive = set(self.client.sync(self.client.scheduler.ncores, callback_timeout=_ANSWER))
        except (CommClosedError, OSError, TimeoutError, ValueError) as wrong:
            raise RunError(f"the Dask scheduler does not answer ({wrong}); start a cluster and resume") from wrong
        self._require_open()
        lost = {name: address for name, address in self.addresses.items() if address not in alive}
        if lost:
            self.cancel(futures)
            which = ", ".join(f"{name} ({address})" for name, address in lost.items())
            raise WorkerLostError(
                f"worker {which} is gone, and with it what it held of the model; "
                "resume: build the train step again on the workers that are left and load the last checkpoint"
            )

    def _require_open(self) -> None:
        if self.client.status != "running":  # connecting again: its futures are lost all the same
            raise RunError(
                "the Dask client is closed or lost its scheduler; open another, and resume from a checkpoint"
            )

    def cancel(self, futures: Sequence[Future]) -> None:
        """Forget futures and stop what has not begun for them; a scheduler that is gone has done so.

        Not by ``client.cancel``: the scheduler follows it to dependents that no client asked for, fails an
        assertion, and drops the client with all its futures (dask 2026.8).
        """
        if self.client.status == "running":
            for future in futures:
                future.release()


def pool_of(client: Any, devices: Sequence[str] | None = None) -> Pool:
    """Ask all workers of a client what they are, and number them as devices.

    From here on daggc uses the cluster: its streams send at once (:mod:`daggc.runtime.streams`), what is recorded
    of steps does not grow (:mod:`daggc.runtime.spans`), and what they send is sent once
    (:mod:`daggc.runtime.replicas`).

    Args:
        client: a ``distributed.Client``.
        devices: use only these, by device name (``cpu:0``) or worker name.

    Raises:
        RunError: there are no workers, they do not answer, or they run different versions of torch.
        PlanError: a device of ``devices`` does not exist.
    """
    if client.status not in ("running", "connecting"):
        raise RunError("the Dask client is closed; open another")
    try:  # describing themselves, workers import this package, and with it how tensors travel
        facts: dict[str, Facts] = client.run(describe, on_error="raise")
        client.run(offer_computing, on_error="raise")
        client.run(install, on_error="raise")
    except (CommClosedError, OSError, TimeoutError) as wrong:
        raise RunError(f"the Dask cluster does not answer: {wrong}") from wrong
    send_at_once(client)
    keep_records_small(client)
    keep_replicas(client)
    if not facts:
        raise RunError("the Dask client has no workers; start some, or wait for them with client.wait_for_workers(n)")
    ordered = sorted(facts.values(), key=lambda fact: (_number(fact.name), fact.name, fact.address))
    versions = {fact.torch for fact in ordered}
    if len(versions) > 1:
        raise RunError(f"workers run different versions of torch: {', '.join(sorted(versions))}; use one")
    chosen: list[tuple[Device, Facts]] = []
    for index, fact in enumerate(ordered):
        make = gpu_device if fact.device == "cuda" else cpu_device
        device = replace(make(index), memory=fact.memory)
        if devices is None or device.name in devices or fact.name in devices:
            chosen.append((device, fact))
    known = {name for device, fact in chosen for name in (device.name, fact.name)}
    if devices is not None and set(devices) - known:
        missing = ", ".join(sorted(set(devices) - known))
        have = ", ".join(f"{'gpu' if fact.device == 'cuda' else 'cpu'}:{i}" for i, fact in enumerate(ordered))
        raise PlanError(f"there is no device {missing}; the client's workers are {have}")
    direct = client.direct_to_workers
    if direct is None:
        direct = client.sync(_reaches, client, [fact.address for _, fact in chosen])
    return Pool(client, tuple(fact for _, fact in chosen), cluster_of([device for device, _ in chosen]), direct)


async def _reaches(client: Any, addresses: Sequence[str]) -> bool:
    """Whether this process can connect to workers: from outside their network, only the scheduler may be open."""
    try:
        async with asyncio.timeout(_REACH):
            await asyncio.gather(*(client.rpc(address).identity() for address in addresses))
    except (OSError, TimeoutError):
        return False
    return True


async def _forget(client: Any, plugin: str) -> None:
    with suppress(CommClosedError, OSError, ValueError):  # closed meanwhile: all is forgotten
        await client._unregister_worker_plugin(plugin)


def _number(name: str) -> float:
    return float(name) if name.isdigit() else float("inf")


def current_client() -> Client | None:
    """The client that is open in this process, if any. Never starts one."""
    try:
        return default_client()
    except ValueError:
        return None
