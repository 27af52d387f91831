"""Dask's control messages sent at once, not in batches.

Dask sends what tasks need and what they have done over streams that collect messages for a while
(``distributed.batched.BatchedSend``): 5 ms towards a worker, 2 ms from it, 2 ms towards a client, 10 ms from it. That
is right for many small independent tasks, and most of the time of a hop where each task waits for the one before it, as
in a pipeline. There is no configuration key: a scheduler plugin and a worker plugin set the intervals, those of
workers and clients that join later too. Messages that gather while one is being written still go as one.

The plugins run where tasks are scheduled too: this module imports no torch.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

from distributed import SchedulerPlugin, WorkerPlugin

from daggc.errors import RunError

SWITCH = "DAGGC_STREAMS"  # environment variable of the client: off leaves the streams of a cluster as they are
NAME = "daggc-streams"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Intervals:
    """Seconds for which each kind of stream collects messages, from the scheduler or towards it."""

    to_worker: float
    from_worker: float
    to_client: float
    from_client: float

    def __str__(self) -> str:
        shown = " ".join(f"{seconds * 1e3:g}" for seconds in (self.to_worker, self.from_worker))
        return (
            f"{shown} ms between scheduler and workers, {self.to_client * 1e3:g} {self.from_client * 1e3:g} ms clients"
        )


DASK = Intervals(0.005, 0.002, 0.002, 0.010)
AT_ONCE = Intervals(0.0, 0.0, 0.0, 0.0)  # asyncio would make a whole millisecond of anything shorter than one


@dataclass
class SchedulerStreams(SchedulerPlugin):
    """Sets the intervals of the scheduler's streams."""

    intervals: Intervals = AT_ONCE
    name = NAME
    idempotent = True

    async def start(self, scheduler: Any) -> None:
        for stream in scheduler.stream_comms.values():
            stream.interval = self.intervals.to_worker
        for stream in scheduler.client_comms.values():
            stream.interval = self.intervals.to_client

    def add_worker(self, scheduler: Any, worker: str) -> None:
        scheduler.stream_comms[worker].interval = self.intervals.to_worker

    def add_client(self, scheduler: Any, client: str) -> None:
        def later() -> None:  # Dask makes the stream right after it has called its plugins
            if client in scheduler.client_comms:
                scheduler.client_comms[client].interval = self.intervals.to_client

        scheduler.loop.add_callback(later)


@dataclass
class WorkerStreams(WorkerPlugin):
    """Sets the interval of a worker's stream to the scheduler."""

    intervals: Intervals = AT_ONCE
    name = NAME
    idempotent = True

    def setup(self, worker: Any) -> None:
        worker.batched_stream.interval = self.intervals.from_worker


def send_at_once(client: Any) -> None:
    """Set the streams of a client's cluster, unless ``DAGGC_STREAMS`` is ``off``.

    Called again it changes nothing. A cluster that takes no plugins works as before, only slower; ``daggc doctor``
    says so.

    Raises:
        RunError: ``DAGGC_STREAMS`` is neither ``on`` nor ``off``.
    """
    mode = os.environ.get(SWITCH) or "on"
    if mode not in ("on", "off"):
        raise RunError(f"the environment variable {SWITCH} is on or off, got {mode!r}")
    if mode == "off":
        return
    try:
        client.scheduler_comm.interval = AT_ONCE.from_client
        client.register_plugin(SchedulerStreams())
        client.register_plugin(WorkerStreams())
    except Exception as refused:  # forbidden, or a scheduler without daggc: anything that Dask may raise
        _LOG.info("the streams of the Dask cluster stay as they are: %s: %s", type(refused).__name__, refused)


def set_streams(client: Any, intervals: Intervals) -> None:
    """Set the streams of the workers and clients that are there now; for measurements."""

    async def on_scheduler(dask_scheduler: Any) -> None:
        await SchedulerStreams(intervals).start(dask_scheduler)

    client.run_on_scheduler(on_scheduler)
    client.run(_set_on_worker, intervals)
    client.scheduler_comm.interval = intervals.from_client


def _set_on_worker(intervals: Intervals, dask_worker: Any) -> None:
    WorkerStreams(intervals).setup(dask_worker)


def scheduler_intervals(dask_scheduler: Any) -> dict[str, float]:
    """The largest interval of the scheduler's streams to workers and to clients, in seconds; runs there."""
    streams = {"to_worker": dask_scheduler.stream_comms, "to_client": dask_scheduler.client_comms}
    return {name: max((stream.interval for stream in own.values()), default=0.0) for name, own in streams.items()}


def worker_interval(dask_worker: Any) -> float:
    """The interval of a worker's stream to the scheduler, in seconds; runs there."""
    return float(dask_worker.batched_stream.interval)
