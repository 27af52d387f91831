"""Zero-bubble schedules (Qi et al., "Zero Bubble Pipeline Parallelism", 2023): weight gradients fill the bubbles.

The backward of a stage is split: B makes the gradient of its input, which the stage before waits for, and W those of
its parameters, which nothing waits for. 4 stages, 1F1B's memory (ZB-H1):

    0  F0 F1 F2 F3 .. .. .. B0 W0 ...            B of rank 0 comes (p - 1) W earlier than in 1F1B
    3  .. .. .. F0 B0 F1 B1 F2 B2 F3 B3 W0 ...   and the last rank puts off its first W until they fill the end

More microbatches in flight at the start (ZB-H2, ZB-2p) hide the rest: rank 0 then has forwards to run until its first
backward arrives, p (F + B) later. A bubble counts within a rank's own span: rank 0 begins and ends first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

from daggc.errors import PlanError
from daggc.plan.schedule.check import check_schedule
from daggc.plan.schedule.emit import B, F, Rules, emit, schedule_from
from daggc.plan.schedule.pipelines import depth_first
from daggc.plan.schedule.problem import Options, Problem, problem_of
from daggc.plan.schedule.search import Objective, best_emission
from daggc.plan.schedule.tasks import Schedule


def zb_h1(
    stages: int,
    microbatches: int,
    device_of: Sequence[int] | None = None,
    split_backward: bool = True,
    **options: Unpack[Options],
) -> Schedule:
    """The memory of 1F1B and (p-1)(F+B-W) of bubble: rank r has its first W after r + 1 backwards.

    A fixed order: it does not depend on times. Args and errors as :func:`daggc.plan.schedule.gpipe`'s.
    """
    problem = _split(problem_of(stages, microbatches, device_of, split_backward, **options), "zb-h1")
    return _fixed("zb-h1", problem, problem.credits)


def zb_h2(
    stages: int,
    microbatches: int,
    device_of: Sequence[int] | None = None,
    split_backward: bool = True,
    **options: Unpack[Options],
) -> Schedule:
    """(2p-1) M_B of memory and (p-1)(F+B-2W) of bubble: twice the warm-up of ZB-H1, twice the delay of W.

    A fixed order: it does not depend on times. Args and errors as :func:`daggc.plan.schedule.gpipe`'s.
    """
    problem = _split(problem_of(stages, microbatches, device_of, split_backward, **options), "zb-h2")
    return _fixed("zb-h2", problem, _twice(problem))


def zb_1p(
    stages: int,
    microbatches: int,
    device_of: Sequence[int] | None = None,
    split_backward: bool = True,
    **options: Unpack[Options],
) -> Schedule:
    """The memory of 1F1B, in an order that follows the times of tasks.

    At rank r of p, F - B is at most p - r and F - W at most p; W is held back for a forward or backward that is
    known to arrive within 0.75 of its time. Backwards run as soon as they can, or forwards and backwards in turn, or
    everything in the order of ZB-H1, whichever is shortest: one of the others where W takes longer than F or B.

    Args and errors as :func:`daggc.plan.schedule.gpipe`'s.
    """
    problem = _split(problem_of(stages, microbatches, device_of, split_backward, **options), "zb-1p")
    rules = Rules(depth_first(B, F), in_flight=problem.credits, unfinished=[max(problem.credits)] * stages, hold=0.75)
    tried = [rules]
    if _fits(problem, max(problem.credits)):
        tried += [replace(rules, alternate=True), _handcrafted(problem, problem.credits)]
    shortest = min((emit(problem, rules) for rules in tried), key=lambda emission: emission.span)
    return check_schedule(schedule_from("zb-1p", problem, shortest))


def zb_2p(
    stages: int,
    microbatches: int,
    device_of: Sequence[int] | None = None,
    split_backward: bool = True,
    objective: Objective = "span",
    **options: Unpack[Options],
) -> Schedule:
    """The best order found within twice the memory of 1F1B (2p M_B, unfinished W counted), or ``memory``.

    Tries a family of rules in simulated time and keeps the best, as the paper's automatic algorithm does: how
    many forwards a rank runs before its first backward, and when it waits rather than begin a W; ZB-H1 and ZB-H2
    are members.

    Args:
        objective: what is kept short: the longest time from a device's first task to its last (``span``, which
            the published bubble rates count), or the whole (``makespan``).

    Other args and errors as :func:`daggc.plan.schedule.gpipe`'s.
    """
    problem = _split(problem_of(stages, microbatches, device_of, split_backward, **options), "zb-2p")
    problem = _within(problem, 2 * max(problem.credits), options)
    known = [_handcrafted(problem, problem.credits), _handcrafted(problem, _twice(problem))]
    return check_schedule(schedule_from("zb-2p", problem, best_emission(problem, depth_first(B, F), objective, known)))


def zb_v(
    stages: int,
    microbatches: int,
    device_of: Sequence[int] | None = None,
    split_backward: bool = True,
    objective: Objective = "span",
    **options: Unpack[Options],
) -> Schedule:
    """Two stages a device, down the devices and back up, in the memory of 1F1B (ZB-V): the last stage is on device 0.

    The best order found as in :func:`zb_2p`, within p M_B (M_B of both stages of a device) or ``memory``.

    Args:
        device_of: 0, 1, ..., p-1, p-1, ..., 0 by default; others are scheduled likewise.
    """
    if device_of is None:
        if stages % 2:
            raise PlanError(f"zb-v has two stages a device, got {stages} stages")
        device_of = [min(stage, stages - 1 - stage) for stage in range(stages)]
    problem = _split(problem_of(stages, microbatches, device_of, split_backward, **options), "zb-v")
    problem = _within(problem, problem.devices, options)
    return check_schedule(schedule_from("zb-v", problem, best_emission(problem, depth_first(B, F), objective)))


def _twice(problem: Problem) -> list[int]:
    return [2 * own - 1 for own in problem.credits]


def _split(problem: Problem, name: str) -> Problem:
    if not problem.split:
        raise PlanError(f"{name} needs weight gradients as tasks of their own: split_backward=True")
    return problem


def _within(problem: Problem, microbatches: int, options: Options) -> Problem:
    """The problem with memory for the activations of so many microbatches on each device, unless it was given."""
    if options.get("memory") is not None:
        return problem
    return replace(
        problem,
        memory=tuple(microbatches * sum(problem.activations[stage] for stage in own) for own in problem.stages_of),
    )


def _fits(problem: Problem, microbatches: int) -> bool:
    """Whether every device may hold so many microbatches."""
    sizes = (sum(problem.activations[stage] for stage in own) for own in problem.stages_of)
    return all(microbatches * size <= limit + 1e-9 for size, limit in zip(sizes, problem.memory, strict=True))


def _handcrafted(problem: Problem, in_flight: Sequence[int]) -> Rules:
    """Forwards and backwards in turn; F - W is at most what F - B may be at the first rank, and no W runs earlier.

    A backward that waits for its turn waits for forwards, which other devices may have no memory for: where memory
    is short, what is ready runs.
    """
    most = max(in_flight)
    return Rules(
        depth_first(B, F),
        in_flight=in_flight,
        unfinished=[most] * problem.stages,
        delay=[most - own for own in in_flight],
        alternate=_fits(problem, most),
    )


def _fixed(name: str, problem: Problem, in_flight: Sequence[int]) -> Schedule:
    emission = emit(problem.in_units(), _handcrafted(problem, in_flight))
    return check_schedule(schedule_from(name, problem, emission))
