"""Schedules by name."""

from __future__ import annotations

from collections.abc import Callable

from daggc.errors import PlanError
from daggc.plan.schedule.dag import dag
from daggc.plan.schedule.pipelines import gpipe, interleaved, one_f_one_b
from daggc.plan.schedule.tasks import Schedule
from daggc.plan.schedule.zero_bubble import zb_1p, zb_2p, zb_h1, zb_h2, zb_v

SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
    "zb-1p": zb_1p,
    "zb-2p": zb_2p,
    "zb-v": zb_v,
    "dag": dag,
}
SPLIT_BACKWARD = ("zb-h1", "zb-h2", "zb-1p", "zb-2p", "zb-v")
"""The schedules that need weight gradients as tasks of their own."""
SEVERAL_STAGES = ("interleaved", "zb-v")
"""The schedules that are made for several stages a device."""


def schedule_named(name: str) -> Callable[..., Schedule]:
    """Raises PlanError naming the schedules there are."""
    try:
        return SCHEDULES[name]
    except KeyError:
        raise PlanError(f"there is no schedule {name!r}; there are {', '.join(SCHEDULES)}") from None


def stage_devices(name: str, stages: int, devices: int) -> tuple[int, ...]:
    """The device, by number, that a schedule of this name wants each stage on.

    ``zb-v`` goes down the devices and back up, so that the first and the last stage are on one device; the others take
    the devices in turn.
    """
    turn = [*range(devices), *reversed(range(devices))] if name == "zb-v" else [*range(devices)]
    return tuple(turn[stage % len(turn)] for stage in range(stages))
