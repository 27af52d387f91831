"""What Dask remembers of tasks that are over, kept from growing with every step.

Dask collects what ran in spans (``distributed.spans``), by default one from a submission on until nothing is left to
run. With steps submitted ahead that never comes: the span of a training holds every group of tasks that ever ran, and
looks through all of them at each submission; and where it does come, each step begins a span that stays for ever, on
the scheduler and in every worker's metrics. So all tasks of daggc are of one span, and a scheduler plugin drops what is
over from it, and from the computation that is under way, the older record of the same.

Scheduler and workers also keep, of the last 100,000 keys that they met, what kind of task they name
(``dask.utils.key_split``): 280 bytes each, and every step has new ones. What is kept here is of some steps.
"""

from __future__ import annotations

import logging
from typing import Any

import dask
from dask.utils import key_split
from distributed import SchedulerPlugin, WorkerPlugin
from tornado.ioloop import PeriodicCallback

ID = "daggc"
_NAMES = 5_000  # keys of which a process knows the kind
_LOOK = 2.0  # seconds after which a worker looks how many there are
_LOG = logging.getLogger(__name__)


def span_annotation() -> dict[str, Any] | None:
    """What puts tasks into daggc's span; None inside a span of the user's, which they then belong to."""
    return None if "span" in dask.get_annotations() else {"name": (ID,), "ids": (ID,)}


class SmallSpan(SchedulerPlugin):
    """Drops the groups of tasks that are gone from daggc's records, whenever tasks are submitted."""

    name = "daggc-span"
    idempotent = True

    def update_graph(self, scheduler: Any, **_: Any) -> None:
        forget_names()
        spans = getattr(scheduler.extensions.get("spans"), "spans", {})
        if ID in spans:
            span = spans[ID]
            if span._metadata is not None:
                del span._metadata["collections"][:-1]
            for record in (span, *list(scheduler.computations)[-1:]):
                record.groups = {group for group in record.groups if group.name in scheduler.task_groups}


class FewNames(WorkerPlugin):
    """Has a worker forget the kinds of keys, now and then."""

    name = "daggc-names"
    idempotent = True

    def setup(self, worker: Any) -> None:
        looking = PeriodicCallback(forget_names, _LOOK * 1e3)
        worker.periodic_callbacks[self.name] = looking
        looking.start()

    def teardown(self, worker: Any) -> None:
        worker.periodic_callbacks.pop(self.name).stop()


def forget_names() -> None:
    """Empty Dask's cache of the kinds of keys, where it has grown."""
    if key_split.cache_info().currsize > _NAMES:
        key_split.cache_clear()


def keep_records_small(client: Any) -> None:
    """Register the plugins; where the cluster takes none, its processes grow by some kilobytes a step."""
    try:
        client.register_plugin(SmallSpan())
        client.register_plugin(FewNames())
    except Exception as refused:  # forbidden, or a scheduler without daggc: anything that Dask may raise
        _LOG.info("the cluster keeps what ran: %s: %s", type(refused).__name__, refused)
