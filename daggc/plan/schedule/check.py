"""Whether a schedule can run: each task once, on its device, in an order that what it needs allows."""

from __future__ import annotations

from itertools import pairwise

from daggc.errors import PlanError
from daggc.plan.schedule.tasks import PHASES, Schedule, Task


def check_schedule(schedule: Schedule) -> Schedule:
    """The schedule itself, once it is known to run to its end.

    Raises:
        PlanError: a task is missing, there twice or on another device than its stage; or devices that keep their
            orders would wait for each other for ever (the message names a circle of tasks), or ``emitted`` is not
            an order that the pipeline and the devices allow.
    """
    phases = PHASES if schedule.split_backward else PHASES[:2]
    wanted = {
        Task(stage, phase, microbatch)
        for stage in range(schedule.stages)
        for phase in phases
        for microbatch in range(schedule.microbatches)
    }
    seen: set[Task] = set()
    for device, order in enumerate(schedule.orders):
        for task in order:
            if task not in wanted:
                raise PlanError(f"{schedule.name} has a task {task}, which the pipeline has not")
            if schedule.device_of[task.stage] != device or task in seen:
                why = "is there twice" if task in seen else f"is on device {device}, its stage on another"
                raise PlanError(f"{schedule.name}: {task} {why}")
            seen.add(task)
    if seen != wanted or set(schedule.emitted) != wanted or len(schedule.emitted) != len(wanted):
        lacking = sorted(map(str, wanted - (seen & set(schedule.emitted))))
        raise PlanError(f"{schedule.name} has not each task once; missing: {', '.join(lacking[:5]) or 'none'}")
    _check_order(schedule)
    return schedule


def _check_order(schedule: Schedule) -> None:
    before = {task: list(needs) for task, needs in schedule.needs().items()}
    for order in schedule.orders:
        for earlier, later in pairwise(order):
            before[later].append(earlier)
    position = {task: index for index, task in enumerate(schedule.emitted)}
    broken = next((t for t, needs in before.items() if any(position[n] >= position[t] for n in needs)), None)
    if broken is None:
        return  # ``emitted`` is a witness: in that order nothing waits
    circle = _circle(before)
    if circle:
        steps = " after ".join(map(str, (*circle, circle[0])))
        raise PlanError(f"{schedule.name} never ends: its devices wait for each other, {steps}")
    late = next(task for task in before[broken] if position[task] >= position[broken])
    raise PlanError(f"{schedule.name}: {broken} is emitted before {late}, which it needs or follows")


def _circle(before: dict[Task, list[Task]]) -> list[Task]:
    """Tasks that wait for each other, each for the next and the last for the first; none if there are none."""
    waiting = {task: len(needs) for task, needs in before.items()}
    after: dict[Task, list[Task]] = {task: [] for task in before}
    for task, needs in before.items():
        for need in needs:
            after[need].append(task)
    free = [task for task, count in waiting.items() if not count]
    while free:
        for task in after[free.pop()]:
            waiting[task] -= 1
            if not waiting[task]:
                free.append(task)
    stuck = next((task for task, count in waiting.items() if count), None)
    path: list[Task] = []
    at: dict[Task, int] = {}
    while stuck is not None and stuck not in at:  # what is stuck waits for something that is
        at[stuck] = len(path)
        path.append(stuck)
        stuck = next(task for task in before[stuck] if waiting[task])
    return path[at[stuck] :] if stuck is not None else []
