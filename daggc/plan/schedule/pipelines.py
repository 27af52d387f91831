"""Schedules of whole backward tasks: GPipe, 1F1B, interleaved 1F1B.

They keep the published order whatever the times of tasks. If weight gradients are tasks of their own, these run when
nothing else can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Unpack

from daggc.errors import PlanError
from daggc.plan.schedule.check import check_schedule
from daggc.plan.schedule.emit import B, Emission, F, Key, Rules, emit, schedule_from
from daggc.plan.schedule.problem import Options, Problem, problem_of
from daggc.plan.schedule.tasks import Schedule


def depth_first(*phases: int) -> Key:
    """Phases in this order; older microbatches first, and of those what is furthest on its way."""
    rank = {phase: index for index, phase in enumerate(phases)}

    def key(phase: int, stage: int, microbatch: int) -> tuple[float, ...]:
        return rank.get(phase, len(rank)), microbatch, -stage if phase == F else stage

    return key


def gpipe(
    stages: int,
    microbatches: int,
    device_of: Sequence[int] | None = None,
    split_backward: bool = False,
    **options: Unpack[Options],
) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019). Every microbatch is in flight at once.

    Args:
        device_of: the device, by number, of each stage; one each by default.
        split_backward: weight gradients are tasks of their own.
        options: see :class:`~daggc.plan.schedule.problem.Options`.

    Raises:
        PlanError: there are no stages or microbatches, a stage has no device, an option does not fit, or a device
            may not hold the activations of all microbatches.
    """
    problem = problem_of(stages, microbatches, device_of, split_backward, **options)
    for device, own in enumerate(problem.stages_of):
        needed = microbatches * sum(problem.activations[stage] for stage in own)
        if needed > problem.memory[device] + 1e-9:
            raise PlanError(
                f"gpipe holds all {microbatches} microbatches: {needed:g} of activations on device {device}; "
                f"it may hold {problem.memory[device]:g}"
            )
    return _fixed("gpipe", problem, Rules(depth_first(F, B), all_forwards_first=True))


def one_f_one_b(
    stages: int,
    microbatches: int,
    device_of: Sequence[int] | None = None,
    split_backward: bool = False,
    **options: Unpack[Options],
) -> Schedule:
    """Backward before forward, at most ``stages - r`` microbatches in flight at stage r (PipeDream-Flush, 1F1B).

    Neighbouring stages of one device count as one stage. Args and errors as :func:`gpipe`'s.
    """
    problem = problem_of(stages, microbatches, device_of, split_backward, **options)
    return _fixed("1f1b", problem, Rules(depth_first(B, F), in_flight=problem.credits))


def interleaved(
    stages: int,
    microbatches: int,
    device_of: Sequence[int] | None = None,
    split_backward: bool = False,
    chunks: int | None = None,
    **options: Unpack[Options],
) -> Schedule:
    """1F1B with several stages (chunks) a device, p stages apart (Narayanan et al. 2021).

    Microbatches go through a device in groups of p: the group through its first chunk, then through the next.
    Rank r of p devices with v chunks warms up with ``2 (p - r - 1) + (v - 1) p`` forwards, then runs a forward and
    a backward in turn. The bubble is v times smaller than 1F1B's if p divides the microbatches. Else groups of
    different sizes are tried, in turn or as tasks get ready, and the shortest schedule is kept; where stages are
    not on device ``stage % p``, or memory is limited, tasks run as they get ready.

    Args:
        chunks: stages a device, where ``device_of`` is not given; by default 2 where the stages allow it.

    Other args and errors as :func:`gpipe`'s.
    """
    if device_of is None:
        count = chunks or (2 if stages % 2 == 0 else 1)
        if stages % count:
            raise PlanError(f"{stages} stages are not {count} chunks for each of some devices")
        device_of = [stage % (stages // count) for stage in range(stages)]
    problem = problem_of(stages, microbatches, device_of, split_backward, **options)
    devices, limited = problem.devices, min(problem.memory) < math.inf
    looped = problem.is_chain and problem.device_of == tuple(stage % devices for stage in range(stages))
    credits: list[int] = []
    for own in problem.stages_of:
        first = min(own)
        after = devices - 1 - problem.device_of[first]
        credits.append(2 * after + (len(own) - 1) * devices + 1 if len(own) > 1 else problem.credits[first])
    found: list[Emission] = []
    for groups in _groups(microbatches, devices):
        key = _interleaved_key(problem, groups)
        rules = Rules(key, tasks_in_flight=credits)
        if looped and not limited:
            tasks = (((stage, k) for stage in own for k in range(microbatches)) for own in problem.stages_of)
            sequence = [sorted(own, key=lambda task, key=key: key(F, *task)) for own in tasks]
            # Groups that p does not fill may leave devices waiting for each other: that is not among the best.
            with suppress(PlanError):
                found.append(emit(problem.in_units(), replace(rules, sequence=sequence, alternate=True)))
        if not found or microbatches % devices:
            found.append(emit(problem.in_units(), rules))
    shortest = min(found, key=lambda emission: emission.makespan)
    return check_schedule(schedule_from("interleaved", problem, shortest))


def _groups(microbatches: int, devices: int) -> list[list[int]]:
    """Ways to number the groups that microbatches go in: all of p, but for a first smaller one; or about equal."""
    count = -(-microbatches // devices)
    missing = count * devices - microbatches
    filled = [(k + missing) // devices for k in range(microbatches)]
    return [filled, [k * count // microbatches for k in range(microbatches)]] if missing else [filled]


def _interleaved_key(problem: Problem, groups: Sequence[int]) -> Key:
    chunks = [problem.stages_of[device].index(stage) for stage, device in enumerate(problem.device_of)]

    def key(phase: int, stage: int, microbatch: int) -> tuple[float, ...]:
        if phase == F:
            return 1, groups[microbatch], chunks[stage], microbatch
        return 0 if phase == B else 2, groups[microbatch], -chunks[stage], microbatch

    return key


def _fixed(name: str, problem: Problem, rules: Rules) -> Schedule:
    """An order that does not depend on the times of tasks."""
    return check_schedule(schedule_from(name, problem, emit(problem.in_units(), rules)))
