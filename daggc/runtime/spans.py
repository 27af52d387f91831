"""Dask's record of what a computation was, kept from growing with every step.

Dask collects what ran in spans (``distributed.spans``), by default one from a submission on until nothing is left to
run. With steps submitted ahead that never comes: the span of a training holds every group of tasks that ever ran, and
looks through all of them at each submission; and where it does come, each step begins a span that stays for ever, on
the scheduler and in every worker's metrics. So all tasks of daggc are of one span, and a scheduler plugin drops what is
over from it, and from the computation that is under way, the older record of the same.
"""

from __future__ import annotations

import logging
from typing import Any

import dask
from distributed import SchedulerPlugin

ID = "daggc"
_LOG = logging.getLogger(__name__)


def span_annotation() -> dict[str, Any] | None:
    """What puts tasks into daggc's span; None inside a span of the user's, which they then belong to."""
    return None if "span" in dask.get_annotations() else {"name": (ID,), "ids": (ID,)}


class SmallSpan(SchedulerPlugin):
    """Drops the groups of tasks that are gone from daggc's records, whenever tasks are submitted."""

    name = "daggc-span"
    idempotent = True

    def update_graph(self, scheduler: Any, **_: Any) -> None:
        spans = getattr(scheduler.extensions.get("spans"), "spans", {})
        if ID in spans:
            span = spans[ID]
            if span._metadata is not None:
                del span._metadata["collections"][:-1]
            for record in (span, *list(scheduler.computations)[-1:]):
                record.groups = {group for group in record.groups if group.name in scheduler.task_groups}


def keep_span_small(client: Any) -> None:
    """Register the plugin; where the cluster takes none, its scheduler grows by some kilobytes a step."""
    try:
        client.register_plugin(SmallSpan())
    except Exception as refused:  # forbidden, or a scheduler without daggc: anything that Dask may raise
        _LOG.info("the scheduler keeps what ran: %s: %s", type(refused).__name__, refused)
