"""Messages between workers of one Dask cluster, beside the task graph, as Dask's own P2P shuffle sends them.

The lanes of a step (:mod:`daggc.runtime.lanes`) exchange activations and gradients with it. Messages go over the
workers' own connections, with whatever ports and encryption they have; where two workers can share memory, large
tensors stay there. A message belongs to a run and has a tag; it may come before anybody waits for it, and in any order.
A run that is over, or failed, takes none any more.
"""

from __future__ import annotations

from typing import Any

from distributed import WorkerPlugin, get_worker

from daggc.errors import RunError
from daggc.runtime.channel.direct import Channel

__all__ = ["Channel", "channel", "install", "remove", "trim"]

_NAME = "daggc-channel"
_CHANNELS: dict[str, Channel] = {}  # of the workers of this process, which is nearly always one, by address


def channel() -> Channel:
    """The channel of the worker that this task runs on.

    Raises:
        RunError: :func:`install` was not run on it.
    """
    if len(_CHANNELS) == 1:
        return next(iter(_CHANNELS.values()))
    try:
        return _CHANNELS[get_worker().address]
    except (ValueError, KeyError):
        raise RunError("this worker has no channel to others; was it started after the step was built?") from None


def trim() -> None:
    """Give back the shared memory of this process that no message is in."""
    for own in list(_CHANNELS.values()):
        own.trim(0)


class _Opened(WorkerPlugin):
    """A channel that is open as long as its worker."""

    def setup(self, worker: Any) -> None:
        self.channel = _CHANNELS[worker.address] = Channel(worker)
        worker.handlers.update(self.channel.handlers)

    def teardown(self, worker: Any) -> None:
        del _CHANNELS[self.channel.address]
        for name in self.channel.handlers:
            del worker.handlers[name]
        self.channel.close()


async def install(dask_worker: Any) -> None:
    """Open a worker's channel, unless it is open; runs there."""
    if _NAME not in dask_worker.plugins:
        await dask_worker.plugin_add(_Opened(), name=_NAME, catch_errors=False)


async def remove(dask_worker: Any) -> None:
    """Close a worker's channel, if it is open; runs there. Whoever waits for a message raises RunError."""
    if _NAME in dask_worker.plugins:
        await dask_worker.plugin_remove(_NAME)
