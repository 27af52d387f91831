"""A dynamic scheduler: devices take the most urgent task that is ready, within the credits of their stages.

It runs the pipeline in simulated time; the order in which devices took their tasks is the schedule. Each stage runs
its microbatches in order, so what a stage can run next is one task of each phase. A device that is free takes

1. the first, by the schedule's key, of the forward and backward tasks whose inputs have arrived. A forward task
   also needs a credit: room among the microbatches in flight, and among the activations that the device may hold;
2. otherwise a weight-gradient task, unless it is better to wait for an arrival that is known to be near;
3. otherwise nothing, until something arrives.

1F1B with 3 stages and 4 microbatches, one device each (a credit is a microbatch in flight; stage r has 3 - r):

    0  F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3
    1  .. F0 F1 .. B0 F2 B1 F3 B2 .. B3
    2  .. .. F0 B0 F1 B1 F2 B2 F3 B3

Why it never stops half-way, whatever the credits: the oldest microbatch in flight can always go on. Where stages
share a device's memory, a forward of a younger microbatch is let in only if the oldest one that has forwards to come
on that device could still have all of them beside what younger ones hold (as in the banker's algorithm). That one then
needs nobody younger, and when it is done the next has what it needs, for it leaves at least what it took. Unfinished
weight gradients hold memory too, but they wait for nothing, so they run when it is short.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from daggc.errors import PlanError
from daggc.plan.schedule.problem import Problem
from daggc.plan.schedule.tasks import PHASES, Schedule, Task, chain

F, B, W = range(3)

Key = Callable[[int, int, int], tuple[float, ...]]
"""Of phase, stage and microbatch: a task's place among those that are ready, least first."""


@dataclass(frozen=True)
class Rules:
    """What a schedule decides. Counts are microbatches at a stage; F, B, W: how many have begun that phase there.

    Attributes:
        key: see :data:`Key`.
        warm_up: F is at most this, by stage, before the first B.
        in_flight: F - B is at most this, by stage.
        unfinished: F - W is at most this, by stage.
        delay: W tasks run only while B - W is more than this, by stage, or memory is short.
        tasks_in_flight: F - B, added up over the stages of a device, is at most this.
        sequence: for each device, its forward tasks (stage, microbatch) in order.
        all_forwards_first: a device's backward tasks come after its forward tasks.
        alternate: a backward waits until its stage has as many microbatches in flight as it may.
        hold: a W task is held back for a forward or backward known to arrive within this part of its time.
        balance: or for one that arrives before it would end, while waiting makes this device idle at most this
            part of what the idlest device has been. None: ``hold`` decides.
    """

    key: Key
    warm_up: Sequence[int] | None = None
    in_flight: Sequence[int] | None = None
    unfinished: Sequence[int] | None = None
    delay: Sequence[int] | None = None
    tasks_in_flight: Sequence[int] | None = None
    sequence: Sequence[Sequence[tuple[int, int]]] | None = None
    all_forwards_first: bool = False
    alternate: bool = False
    hold: float = 0.0
    balance: float | None = None


@dataclass(frozen=True)
class Emission:
    """What the scheduler did.

    Attributes:
        order: phase, stage and microbatch of each task, as they began.
        spans: for each device, seconds from its first task's start to its last one's end.
        makespan: seconds until the last task's end.
    """

    order: tuple[tuple[int, int, int], ...]
    spans: tuple[float, ...]
    makespan: float

    @property
    def span(self) -> float:
        return max(self.spans)


def schedule_from(name: str, problem: Problem, emission: Emission) -> Schedule:
    """Name the tasks of an emission."""
    emitted = tuple([Task(stage, PHASES[phase], microbatch) for phase, stage, microbatch in emission.order])
    orders: list[list[Task]] = [[] for _ in range(problem.devices)]
    for task in emitted:
        orders[problem.device_of[task.stage]].append(task)
    feeds = None if problem.feeds == chain(problem.stages) else problem.feeds
    return Schedule(
        name, problem.stages, problem.microbatches, problem.device_of, tuple(map(tuple, orders)), emitted, feeds
    )


def emit(problem: Problem, rules: Rules) -> Emission:
    """Run the scheduler.

    Raises:
        PlanError: the rules leave no device a task to run before all have run.
    """
    return _Run(problem, rules).run()


class _Run:
    """The state of the simulated pipeline."""

    def __init__(self, problem: Problem, rules: Rules) -> None:
        self.problem, self.rules = problem, rules
        stages, microbatches = problem.stages, problem.microbatches
        self.phases = 3 if problem.split else 2
        self.begun = [[0] * stages for _ in range(3)]  # by phase and stage: microbatches that have begun it
        # When the inputs of a forward or backward task are all there, once that is known. One more than there are
        # microbatches, so that "the next one" is there (and never comes) after the last.
        self.arrival = [[[math.inf] * (microbatches + 1) for _ in range(stages)] for _ in (F, B)]
        inputs = [len(sources) for sources in problem.feeds], [1 + len(readers) for readers in problem.readers]
        self.missing = [[[count] * microbatches for count in counts] for counts in inputs]
        self.latest = [[[0.0] * microbatches for _ in range(stages)] for _ in (F, B)]
        self.held = [0.0] * problem.devices
        self.idle = [0.0] * problem.devices
        self.free = [0.0] * problem.devices
        self.first: list[float | None] = [None] * problem.devices
        self.order: list[tuple[int, int, int]] = []
        self.ones = [1] * stages
        self.sequence_at = [0] * problem.devices
        self.eps = 1e-9 * max(max(times) for times in problem.seconds)
        self.events: list[tuple[float, int]] = [(0, device) for device in range(problem.devices)]
        self.users = self._users()
        for stage, sources in enumerate(problem.feeds):
            if not sources:
                self.arrival[F][stage][:microbatches] = [0.0] * microbatches

    def _users(self) -> list[list[tuple[tuple[int, int, int, float], ...]]]:
        """By phase and stage: (phase, stage, device, transfer seconds) of the tasks that wait for that one."""
        problem = self.problem
        forward: list[tuple[tuple[int, int, int, float], ...]] = []
        backward: list[tuple[tuple[int, int, int, float], ...]] = []
        for stage, device in enumerate(problem.device_of):
            own = [(F, reader, problem.device_of[reader], problem.between(stage, reader))
                   for reader in problem.readers[stage]]  # fmt: skip
            forward.append((*own, (B, stage, device, 0.0)))
            backward.append(tuple([
                (B, source, problem.device_of[source], problem.between(stage, source))
                for source in problem.feeds[stage]
            ]))  # fmt: skip
        return [forward, backward, [()] * problem.stages]

    def run(self) -> Emission:
        total = self.phases * self.problem.stages * self.problem.microbatches
        events, free, eps = self.events, self.free, self.eps
        while events:
            now, device = heapq.heappop(events)
            if free[device] > now + eps:
                continue
            choice = self._choose(device, now)
            if choice is not None:
                self._begin(device, now, *choice)
        if len(self.order) < total:
            raise PlanError(f"the rules of the schedule let nothing run after {len(self.order)} of {total} tasks")
        spans = tuple(end - (start or 0.0) for end, start in zip(free, self.first, strict=True))
        return Emission(tuple(self.order), spans, max(free))

    def _begin(self, device: int, now: float, phase: int, stage: int) -> None:
        problem, begun = self.problem, self.begun
        microbatch = begun[phase][stage]
        begun[phase][stage] += 1
        if self.first[device] is None:
            self.first[device] = now
        else:
            self.idle[device] += now - self.free[device]
        end = now + problem.seconds[phase][stage]
        self.free[device] = end
        self.order.append((phase, stage, microbatch))
        heapq.heappush(self.events, (end, device))
        size = problem.activations[stage]
        if phase == F:
            self.held[device] += size
            self.sequence_at[device] += 1
        elif phase == B:
            self.held[device] -= size * (1 - problem.weight_memory) if problem.split else size
        else:
            self.held[device] -= size * problem.weight_memory
        for phase_, stage_, device_, transfer in self.users[phase][stage]:
            missing = self.missing[phase_][stage_]
            latest = self.latest[phase_][stage_]
            missing[microbatch] -= 1
            if end + transfer > latest[microbatch]:
                latest[microbatch] = end + transfer
            if not missing[microbatch]:
                arrival = self.arrival[phase_][stage_][microbatch] = latest[microbatch]
                heapq.heappush(self.events, (arrival, device_))

    def _choose(self, device: int, now: float) -> tuple[int, int] | None:
        """The phase and stage of the task that a free device takes now."""
        rules, begun = self.rules, self.begun
        forwards, backwards, weights = begun
        soon = math.inf  # the next arrival that is known
        best: tuple[float, ...] | None = None
        choice: tuple[int, int] | None = None
        short = False
        own = self.problem.stages_of[device]
        wait = rules.all_forwards_first and any(forwards[stage] < self.problem.microbatches for stage in own)
        for stage in own:
            for phase in (B, F):
                microbatch = begun[phase][stage]
                arrival = self.arrival[phase][stage][microbatch]
                if arrival == math.inf or (phase == B and (wait or self._out_of_turn(device, stage, microbatch))):
                    continue
                if phase == F and not self._has_credit(device, stage, microbatch):
                    short = short or not self._has_room(device, stage)
                    continue
                if arrival > now + self.eps:
                    soon = min(soon, arrival)
                    continue
                key = rules.key(phase, stage, microbatch)
                if best is None or key < best:
                    best, choice = key, (phase, stage)
        if choice is not None or not self.problem.split:
            return choice
        for stage in own:
            waiting = backwards[stage] - weights[stage]
            if not waiting or (rules.delay and not self._due(stage, waiting, short)):
                continue
            key = rules.key(W, stage, weights[stage])
            if best is None or key < best:
                best, choice = key, (W, stage)
        if choice is not None and soon < math.inf and self._worth_waiting(device, choice[1], soon - now):
            return None
        return choice

    def _out_of_turn(self, device: int, stage: int, microbatch: int) -> bool:
        """Whether a stage's next backward has to wait for another forward."""
        rules, forwards = self.rules, self.begun[F]
        if not rules.alternate:
            return False
        if rules.tasks_in_flight is not None:
            own = self.problem.stages_of[device]
            flying = sum(forwards[other] - self.begun[B][other] for other in own)
            left = any(forwards[other] < self.problem.microbatches for other in own)
            return left and flying < rules.tasks_in_flight[device]
        assert rules.in_flight is not None
        return forwards[stage] < self.problem.microbatches and forwards[stage] - microbatch < rules.in_flight[stage]

    def _has_credit(self, device: int, stage: int, microbatch: int) -> bool:
        """Whether the rules let a stage's next forward begin."""
        rules = self.rules
        done = self.begun[B][stage]
        if rules.in_flight is not None and microbatch - done >= rules.in_flight[stage]:
            return False
        if rules.warm_up is not None and not done and microbatch >= rules.warm_up[stage]:
            return False
        if rules.unfinished is not None and microbatch - self.begun[W][stage] >= rules.unfinished[stage]:
            return False
        if rules.sequence is not None and rules.sequence[device][self.sequence_at[device]] != (stage, microbatch):
            return False
        if rules.tasks_in_flight is not None:
            own = self.problem.stages_of[device]
            flying = sum(self.begun[F][other] - self.begun[B][other] for other in own)
            limit = rules.tasks_in_flight[device]
            if flying >= limit or self._needed(device, stage, self.ones) > limit:
                return False
        return self._has_room(device, stage)

    def _has_room(self, device: int, stage: int) -> bool:
        """Whether a device has memory for a stage's next forward, and for what has to run before any of it is free."""
        limit, sizes = self.problem.memory[device] + 1e-9, self.problem.activations
        if limit == math.inf:
            return True
        return self.held[device] + sizes[stage] <= limit and self._needed(device, stage, sizes) <= limit

    def _needed(self, device: int, stage: int, sizes: Sequence[float]) -> float:
        """What a device would hold if a stage's next forward ran, and then the oldest microbatch that has forwards to
        come there had them all, with those before it done."""
        own = self.problem.stages_of[device]
        if len(own) == 1:
            return sizes[stage]
        forwards, backwards = self.begun[F], self.begun[B]
        oldest = min(forwards[other] + (other == stage) for other in own)
        needed = 0.0
        for other in own:
            younger = forwards[other] + (other == stage) - max(oldest + 1, backwards[other])
            needed += sizes[other] * (1 + max(0, younger))
        return needed

    def _due(self, stage: int, waiting: int, short: bool) -> bool:
        assert self.rules.delay is not None
        return short or waiting > self.rules.delay[stage] or self.begun[B][stage] == self.problem.microbatches

    def _worth_waiting(self, device: int, stage: int, wait: float) -> bool:
        rules, seconds = self.rules, self.problem.seconds[W][stage]
        if rules.balance is None:
            return wait < rules.hold * seconds - self.eps
        longest = max(self.idle)
        return wait < seconds - self.eps and self.idle[device] + wait <= rules.balance * longest + self.eps
