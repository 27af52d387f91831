"""The best schedule of a small family, by simulated time; and how far any schedule can be from none of a bubble.

The family has two parameters. All warm-ups are tried, without waiting and with as much as costs nothing; the best ones
with the other ways of waiting:

* warm-up: how many forwards a stage runs before its first backward. The time until that arrives has room for some
  number of forwards and a part of one; ``slack`` says how large a part counts as room. One more forward fills the
  gap, but keeps the first backward waiting, here and in all stages before.
* waiting: a W that begins just before a forward or backward arrives delays it. Either W never waits, or it waits
  while its device has been idle for no longer than (a part of) the idlest device: the span of the pipeline is that
  of the worst device, so the others may wait for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from daggc.plan.schedule.emit import Emission, Key, Rules, emit
from daggc.plan.schedule.problem import Problem

Objective = Literal["span", "makespan"]
_SLACKS = (0.5, 0.0, 0.999, 0.75, 0.25, 0.1, 0.9, 0.2, 0.05)
_PARTS = (0.9, 0.85)
_WAITS: tuple[tuple[float, float | None], ...] = ((0.0, 0.5), (0.5, None), (0.75, None))
_BEST = 2  # warm-ups to try the other ways of waiting with
_TASKS = 300_000  # tasks to simulate in a search, at about 7 microseconds each


def best_emission(problem: Problem, key: Key, objective: Objective, known: Sequence[Rules] = ()) -> Emission:
    """The best emission that the search finds. Deterministic; large problems get fewer tries.

    Args:
        known: rules to try beside the family.
    """
    bound = span_bound(problem) if objective == "span" else 0.0
    tries = max(3, _TASKS // (problem.microbatches * problem.stages * 3))
    found: list[tuple[tuple[float, float], int, Rules, Emission]] = []

    def attempt(rules: Rules) -> bool:
        """Whether to go on."""
        emission = emit(problem, rules)
        score = (emission.span, emission.makespan) if objective == "span" else (emission.makespan, emission.span)
        found.append((score, len(found), rules, emission))
        return score[0] > bound * (1 + 1e-9) and len(found) < tries

    family = [Rules(key, warm_up=warm_up) for warm_up in _warm_ups(problem)]
    if all(map(attempt, [*family, *known, *(replace(rules, balance=1.0) for rules in family)])):
        ranked = [rules for *_, rules, _ in sorted(found, key=lambda item: item[:2]) if rules in family]
        waits = (replace(rules, hold=hold, balance=balance) for rules in ranked[:_BEST] for hold, balance in _WAITS)
        all(map(attempt, waits))
    return min(found, key=lambda item: item[:2])[-1]


def round_trips(problem: Problem) -> list[float]:
    """For each stage, seconds from a forward's end until its backward can begin, if nothing else runs."""
    forward, backward, _ = problem.seconds
    trips = [0.0] * problem.stages
    for stage in reversed(range(problem.stages)):
        for reader in problem.readers[stage]:
            there, back = problem.between(stage, reader), problem.between(reader, stage)
            trips[stage] = max(trips[stage], there + forward[reader] + trips[reader] + backward[reader] + back)
    return trips


def _warm_ups(problem: Problem) -> list[tuple[int, ...] | None]:
    """Forwards of each stage before its first backward, for each slack.

    Where stages share a device, its memory limits the sum: 1F1B's credits, which add up to the memory of 1F1B in a V
    of two stages a device; fewer, where unfinished W fill some of it; or whatever memory allows.
    """
    if problem.devices < problem.stages:
        fewer = (tuple(math.floor(part * own) + 2 for own in problem.credits) for part in _PARTS)
        return [problem.credits, *fewer, None]
    forward = problem.seconds[0]
    pace: list[float] = []  # seconds from one forward to the next, that of the slowest stage before
    for stage, sources in enumerate(problem.feeds):
        pace.append(max(forward[stage], *(pace[source] for source in sources), 0.0))
    trips = round_trips(problem)
    found: list[tuple[int, ...] | None] = []
    for slack in _SLACKS:
        rooms = (trip / own if own else math.inf for trip, own in zip(trips, pace, strict=True))
        counts = tuple(1 + math.floor(min(room, problem.microbatches) + slack + 1e-9) for room in rooms)
        if counts not in found:
            found.append(counts)
    return found


def span_bound(problem: Problem) -> float:
    """Seconds that the longest span of a device takes at least, whatever the schedule.

    The work of each device; and, in a chain of stages on devices of their own: what the first stage waits for while
    its memory is full of forwards, and the way to each stage, its forwards and backwards, and the way back.
    """
    bound = max(problem.work)
    if problem.devices < problem.stages or not problem.is_chain:
        return bound
    forward, backward, weight = problem.seconds
    count, size = problem.microbatches, problem.activations[0]
    room = count if not size else min(count, math.floor(min(count * size, problem.memory[0] + 1e-9) / size))
    bound = max(bound, problem.work[0] + max(0.0, round_trips(problem)[0] - (room - 1) * forward[0]))
    way = 0.0
    last = weight[0] if problem.split else 0.0
    for stage in range(problem.stages):
        bound = max(bound, way + count * (forward[stage] + backward[stage]) + last)
        if stage + 1 < problem.stages:
            hop = problem.between(stage, stage + 1) + problem.between(stage + 1, stage)
            way += forward[stage] + backward[stage] + hop
    return bound
