"""Schedules of stages that have replicas, which take the microbatches in turn.

Replicas work side by side, so a round of microbatches, one for each replica of the stage that has most, is
scheduled as one microbatch of a pipeline without replicas, and taken apart afterwards:

    stages on (a, b) and c, 4 microbatches: rounds 0 = {0, 1} and 1 = {2, 3}
    round order of the first stage   F0 F1 B0 B1
    a   F0 F2 B0 B2
    b   F1 F3 B1 B3
    c   F0 F1 B0 B1 F2 F3 B2 B3
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from daggc.plan.schedule.tasks import PHASES, Schedule, Task


def replicated(
    make: Callable[..., Schedule],
    devices: Sequence[Sequence[int]],
    microbatches: int,
    split_backward: bool = False,
    **options: Any,
) -> Schedule:
    """The schedule of a pipeline whose stages may have several devices.

    Args:
        make: one of :data:`~daggc.plan.schedule.registry.SCHEDULES`.
        devices: by number, of each stage; microbatch k runs on the (k mod count)-th.
        options: see :class:`~daggc.plan.schedule.problem.Options`; ``seconds`` are those of one microbatch.

    Returns:
        A schedule with an order for each device, and the first device of each stage as ``device_of``.
    """
    rounds_of = math.lcm(*(len(own) for own in devices))
    numbers = {own: index for index, own in enumerate(dict.fromkeys(map(tuple, devices)))}
    together = [numbers[tuple(own)] for own in devices]
    if rounds_of > 1 and options.get("seconds"):
        options = {**options, "seconds": _of_rounds(options["seconds"], [rounds_of // len(own) for own in devices])}
    plain = make(len(devices), -(-microbatches // rounds_of), together, split_backward=split_backward, **options)
    first = tuple(own[0] for own in devices)
    if rounds_of == 1:
        return replace(plain, device_of=first) if first == tuple(together) else _on(plain, devices)
    emitted = tuple(
        replace(task, microbatch=microbatch)
        for task in plain.emitted
        for microbatch in range(task.microbatch * rounds_of, min((task.microbatch + 1) * rounds_of, microbatches))
    )
    return _on(replace(plain, microbatches=microbatches, emitted=emitted), devices)


def _of_rounds(seconds: Any, shares: Sequence[int]) -> dict[str, list[float]]:
    """Times of a round at each stage, each of whose replicas has ``shares`` of its microbatches."""
    found: dict[str, list[float]] = {}
    for phase in PHASES:
        if phase in seconds:
            own = seconds[phase]
            found[phase] = [
                share * float(own if isinstance(own, int | float) else own[stage]) for stage, share in enumerate(shares)
            ]
    return found


def _on(schedule: Schedule, devices: Sequence[Sequence[int]]) -> Schedule:
    """Every device's order, from the one order of all tasks."""
    orders: list[list[Task]] = [[] for _ in range(1 + max(device for own in devices for device in own))]
    for task in schedule.emitted:
        own = devices[task.stage]
        orders[own[task.microbatch % len(own)]].append(task)
    return replace(schedule, device_of=tuple(own[0] for own in devices), orders=tuple(map(tuple, orders)))
