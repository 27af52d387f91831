"""GPipe and 1F1B."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from daggc.errors import PlanError
from daggc.plan.schedule.emit import emit
from daggc.plan.schedule.tasks import BACKWARD, FORWARD, WEIGHT_GRAD, Schedule, Task, check_pipeline


def gpipe(
    stages: int, microbatches: int, device_of: Sequence[int] | None = None, split_backward: bool = False
) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019). Every microbatch is in flight at once.

    Args:
        device_of: the device, by number, of each stage; one each by default.
        split_backward: weight gradients are tasks of their own, which run when nothing else can.

    Raises:
        PlanError: there are no stages or microbatches, or a stage has no device.
    """
    devices = check_pipeline(stages, microbatches, device_of)
    rank = {FORWARD: 0, BACKWARD: 1, WEIGHT_GRAD: 2}

    def priority(task: Task) -> tuple:
        # A device of several stages brings one wave of microbatches through after the other.
        depth = task.stage if task.phase == FORWARD else -task.stage
        return rank[task.phase], task.microbatch, -depth

    return emit("gpipe", stages, microbatches, devices, priority, lambda stage: microbatches, split_backward)


def one_f_one_b(
    stages: int, microbatches: int, device_of: Sequence[int] | None = None, split_backward: bool = False
) -> Schedule:
    """Backward before forward, at most ``stages - r`` microbatches in flight at stage r (PipeDream-Flush, 1F1B).

    Neighbouring stages of one device count as one stage. Args and errors as :func:`gpipe`'s.
    """
    devices = check_pipeline(stages, microbatches, device_of)
    rank = {BACKWARD: 0, FORWARD: 1, WEIGHT_GRAD: 2}

    def priority(task: Task) -> tuple:
        depth = task.stage if task.phase == FORWARD else -task.stage
        return rank[task.phase], task.microbatch, -depth

    hops = [first != second for first, second in pairwise(devices)]
    return emit("1f1b", stages, microbatches, devices, priority, lambda stage: 1 + sum(hops[stage:]), split_backward)


SCHEDULES: dict[str, Callable[..., Schedule]] = {"gpipe": gpipe, "1f1b": one_f_one_b}


def schedule_named(name: str) -> Callable[..., Schedule]:
    """Raises PlanError naming the schedules there are."""
    try:
        return SCHEDULES[name]
    except KeyError:
        raise PlanError(f"there is no schedule {name!r}; there are {', '.join(SCHEDULES)}") from None
