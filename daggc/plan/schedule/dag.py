"""List scheduling of any acyclic graph of stages: the longest way to the end goes first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from daggc.plan.schedule.check import check_schedule
from daggc.plan.schedule.emit import B, Key, Rules, emit, schedule_from
from daggc.plan.schedule.problem import Options, Problem, problem_of
from daggc.plan.schedule.tasks import Schedule


def dag(
    stages: int,
    microbatches: int,
    device_of: Sequence[int] | None = None,
    split_backward: bool = False,
    **options: Unpack[Options],
) -> Schedule:
    """Each device takes what is ready, the task with the longest remaining path first (as HEFT's upward rank).

    With several microbatches there are two ways to be urgent, both tried; the shorter one is kept, the first if
    they are equal: older microbatches first, whose longest paths go first; or the longest path whatever its
    microbatch, which puts forwards before backwards. Only ``memory`` limits what is in flight.

    Args and errors as :func:`daggc.plan.schedule.gpipe`'s.
    """
    problem = problem_of(stages, microbatches, device_of, split_backward, **options)
    keys = _keys(remaining_paths(problem))
    if microbatches == 1:
        keys = keys[:1]
    emission = min((emit(problem, Rules(key)) for key in keys), key=lambda emission: emission.makespan)
    return check_schedule(schedule_from("dag", problem, emission))


def remaining_paths(problem: Problem) -> tuple[tuple[float, ...], ...]:
    """By phase and stage: seconds from a task's beginning to the end of all that follows from it."""
    forward, backward, weight = problem.seconds
    back = [0.0] * problem.stages
    for stage in range(problem.stages):
        rest = [problem.between(stage, source) + back[source] for source in problem.feeds[stage]]
        back[stage] = backward[stage] + max([*rest, weight[stage] if problem.split else 0.0])
    ahead = [0.0] * problem.stages
    for stage in reversed(range(problem.stages)):
        rest = [problem.between(stage, reader) + ahead[reader] for reader in problem.readers[stage]]
        ahead[stage] = forward[stage] + max([*rest, back[stage]])
    return tuple(ahead), tuple(back), weight


def _keys(paths: tuple[tuple[float, ...], ...]) -> tuple[Key, Key]:
    def by_microbatch(phase: int, stage: int, microbatch: int) -> tuple[float, ...]:
        return microbatch, -paths[phase][stage], stage if phase == B else -stage

    def by_path(phase: int, stage: int, microbatch: int) -> tuple[float, ...]:
        return -paths[phase][stage], microbatch, stage if phase == B else -stage

    return by_microbatch, by_path
