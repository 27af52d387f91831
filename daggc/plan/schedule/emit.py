"""A dynamic scheduler: devices take the most urgent task that is ready, within each stage's credits.

Time is counted in units (F 1, B 1, W 1, or B 2 where it includes W), which gives the order; how long tasks
really take is the simulator's and the cluster's business.

1F1B with 3 stages and 4 microbatches, one device each (a credit is a microbatch in flight; stage r has 3 - r):

    0  F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3
    1  .. F0 F1 .. B0 F2 B1 F3 B2 .. B3
    2  .. .. F0 B0 F1 B1 F2 B2 F3 B3
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from daggc.plan.schedule.tasks import BACKWARD, FORWARD, WEIGHT_GRAD, Schedule, Task


def emit(
    name: str,
    stages: int,
    microbatches: int,
    device_of: tuple[int, ...],
    priority: Callable[[Task], tuple],
    credits: Callable[[int], int],
    split_backward: bool,
) -> Schedule:
    """Run the scheduler.

    Args:
        priority: least first.
        credits: of a stage: how many microbatches may be in flight there.
        split_backward: weight gradients are tasks of their own.
    """
    phases = (FORWARD, BACKWARD, WEIGHT_GRAD) if split_backward else (FORWARD, BACKWARD)
    tasks = [Task(s, phase, m) for s in range(stages) for phase in phases for m in range(microbatches)]
    seconds = {FORWARD: 1, BACKWARD: 1 if split_backward else 2, WEIGHT_GRAD: 1}
    missing = {task: len(task.needs(stages)) for task in tasks}
    users: dict[Task, list[Task]] = {task: [] for task in tasks}
    for task in tasks:
        for source in task.needs(stages):
            users[source].append(task)
    count = max(device_of) + 1
    ready: list[list[Task]] = [[] for _ in range(count)]
    for task in tasks:
        if not missing[task]:
            ready[device_of[task.stage]].append(task)
    busy = [False] * count
    flying = [0] * stages
    orders: list[list[Task]] = [[] for _ in range(count)]
    emitted: list[Task] = []
    events: list[tuple[int, int, Task]] = []
    now = 0
    while len(emitted) < len(tasks):
        for device in range(count):
            if busy[device]:
                continue
            allowed = [t for t in ready[device] if t.phase != FORWARD or flying[t.stage] < credits(t.stage)]
            if allowed:
                task = min(allowed, key=priority)
                ready[device].remove(task)
                busy[device] = True
                flying[task.stage] += task.phase == FORWARD
                orders[device].append(task)
                emitted.append(task)
                heapq.heappush(events, (now + seconds[task.phase], device, task))
        if len(emitted) == len(tasks):
            break
        now = events[0][0]
        while events and events[0][0] == now:
            _, device, task = heapq.heappop(events)
            busy[device] = False
            flying[task.stage] -= task.phase == BACKWARD
            for user in users[task]:
                missing[user] -= 1
                if not missing[user]:
                    ready[device_of[user.stage]].append(user)
    return Schedule(name, stages, microbatches, device_of, tuple(map(tuple, orders)), tuple(emitted))
