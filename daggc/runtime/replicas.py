"""What a step has sent to a worker stays there until the step needs it no more.

Every two seconds Dask's Active Memory Manager looks for values that are on several workers, and has all copies
dropped but one (``distributed.active_memory_manager.ReduceReplicas``). It spares those that a task needs which has been
given to a worker, not those of a task that still waits for something else: a backward that is pinned to a worker and
has its input there already, say. That input is then sent once more. So steps are left out: their values are on two
workers because the plan has them there, and are released soon.
"""

from __future__ import annotations

import logging
from typing import Any

from distributed import SchedulerPlugin
from distributed.active_memory_manager import ReduceReplicas

_LOG = logging.getLogger(__name__)
_OURS = "daggc."  # what keys of tasks begin with


class ReduceOtherReplicas(ReduceReplicas):
    """Drops superfluous copies of what is not daggc's."""

    def run(self) -> Any:
        for suggestion in super().run():
            if not str(suggestion.ts.key).startswith(_OURS):
                yield suggestion


class KeepReplicas(SchedulerPlugin):
    """Puts :class:`ReduceOtherReplicas` where the scheduler has Dask's own policy; what else it does stays."""

    name = "daggc-replicas"
    idempotent = True

    async def start(self, scheduler: Any) -> None:
        manager = scheduler.extensions.get("amm")
        for policy in list(getattr(manager, "policies", ())):
            if type(policy) is ReduceReplicas:
                manager.policies.remove(policy)
                manager.add_policy(ReduceOtherReplicas())


def keep_replicas(client: Any) -> None:
    """Register the plugin; where the cluster takes none, a tensor is sent twice now and then."""
    try:
        client.register_plugin(KeepReplicas())
    except Exception as refused:  # forbidden, or a scheduler without daggc: anything that Dask may raise
        _LOG.info("copies of what steps send may be dropped: %s: %s", type(refused).__name__, refused)


def drops_replicas(dask_scheduler: Any) -> bool:
    """Whether copies of what steps send may be dropped; runs on the scheduler."""
    manager = dask_scheduler.extensions.get("amm")
    return bool(getattr(manager, "running", False)) and any(type(own) is ReduceReplicas for own in manager.policies)
