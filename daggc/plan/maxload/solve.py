"""Max-load placement: starts by dynamic programming, annealing, exact programs on parts, and a proved bound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from daggc.plan.maxload.anneal import Heat, anneal
from daggc.plan.maxload.bound import lower_bound
from daggc.plan.maxload.coarsen import coarsen
from daggc.plan.maxload.groups import Groups, fits, group, joined_by, loads_of, merge
from daggc.plan.maxload.neighbourhood import improve
from daggc.plan.maxload.pack import packed
from daggc.plan.maxload.problem import Assignment, Ints, Problem, evaluate
from daggc.plan.maxload.program import allowed_devices, solve_program
from daggc.plan.maxload.segments import best_cut, orders

_EXACT = 1e-6  # a gap at which an assignment counts as optimal


@dataclass(frozen=True)
class Effort:
    """How much is tried. Counts and not seconds, so that every run gives the same result.

    Attributes:
        moves: of annealing for each group, in each of several runs.
        least, most: moves of a run, however few or many the groups are.
        programs: integer programs on a few devices.
        free: groups in one of them.
        whole: groups x devices up to which the whole problem is given to the solver.
        nodes: of its branch and bound.
        close: the gap at which to stop.
    """

    moves: int = 800
    least: int = 50_000
    most: int = 250_000
    programs: int = 50
    free: int = 60
    whole: int = 400
    nodes: int = 2000
    close: float = 5e-4


def solve(problem: Problem, effort: Effort | None = None) -> Assignment:
    """Place a problem's nodes on its devices so that the largest load is as small as can be found.

    Raises:
        PlanError: the nodes do not fit in the accelerators' memory, or no device can run one of them.
    """
    effort = effort or Effort()
    if not problem.nodes:
        return Assignment(np.zeros(0, dtype=int), np.zeros(problem.devices), 0.0, 0.0, "nothing to place")
    groups = group(problem)
    search = _Search(groups, effort)
    search.run()
    device = search.best[groups.of_node]
    loads = evaluate(problem, device)
    value = float(loads.max())
    return Assignment(device, loads, value, min(search.bound, value), f"{search.how}; bound by {search.proof}")


class _Search:
    """The best assignment so far of the groups that it began with, and the bound."""

    def __init__(self, groups: Groups, effort: Effort):
        self.groups, self.effort = groups, effort
        self.best = packed(groups)
        self.value = float(loads_of(groups, self.best).max())
        self.how = "first fit"
        self.bound, self.proof = lower_bound(groups), "minimum cuts and work"
        self.programs = effort.programs

    @property
    def target(self) -> float:
        return self.bound * (1 + max(self.effort.close, _EXACT))

    @property
    def done(self) -> bool:
        return self.value <= self.target

    def offer(self, device: Ints, how: str) -> None:
        """Keep an assignment if it is better."""
        value = float(loads_of(self.groups, device).max())
        if value < self.value and fits(self.groups, device).all():
            self.best, self.value, self.how = device, value, how

    def run(self) -> None:
        """Starts, annealing, programs on a few devices, annealing of what they gave, the program of everything."""
        found = [self.best, *self.cuts()]
        cut = self.value
        for seed, heat in enumerate(_HEATS):
            if self.done:
                return
            start = found[seed % len(found)] if seed % 2 else self.best
            found.append(self.anneal(self.groups, start, seed, heat, "annealing"))
        for count, value in _COARSE:
            if self.done:
                return
            found.append(self.coarse(count * self.groups.devices, value * cut, seed=count))
        by_value = sorted(found, key=lambda device: float(loads_of(self.groups, device).max()))
        for start in distinct(by_value)[:_POLISHED]:
            self.divide(start, devices=2)
        self.divide(self.best, devices=3)
        for seed, heat in enumerate(_SHAKES):
            if self.done or self.programs <= 0:
                break
            self.divide(self.anneal(self.groups, self.best, seed, heat, "annealing"), devices=2)
            self.divide(self.best, devices=3)
        self.prove()

    def cuts(self) -> list[Ints]:
        """The best cuts of several orders into segments, the best one first."""
        cuts = [cut for order in orders(self.groups) if (cut := best_cut(self.groups, order)) is not None]
        for cut in cuts:
            self.offer(cut, "dynamic programming over an order")
        return sorted(cuts, key=lambda device: float(loads_of(self.groups, device).max()))

    def anneal(self, groups: Groups, start: Ints, seed: int, heat: Heat, how: str) -> Ints:
        """Anneal what cannot be told apart at the start's own value, int[groups]."""
        label = joined_by(groups, float(loads_of(groups, start).max()))
        small = merge(groups, label)
        first, number = np.unique(label, return_index=True, return_inverse=True)[1:]
        moves = min(max(self.effort.moves * len(small), self.effort.least), self.effort.most)
        device = anneal(small, start[first], moves, seed, self.target, heat)[number]
        if groups is self.groups:
            self.offer(device, how)
        return device

    def coarse(self, count: int, value: float, seed: int) -> Ints:
        """Search over few heavy groups, then over all from there, int[groups]."""
        label = coarsen(self.groups, count, value)
        number = np.unique(label, return_inverse=True)[1]
        heavy = merge(self.groups, label)
        cuts = [cut for order in orders(heavy) if (cut := best_cut(heavy, order)) is not None]
        start = min(cuts, key=lambda device: float(loads_of(heavy, device).max()), default=None)
        if start is None:
            return self.best
        start = self.anneal(heavy, start, seed, _HEATS[0], "")[number]
        return self.anneal(self.groups, start, seed, _COOL, "annealing of heavy groups, then of all")

    def divide(self, start: Ints, devices: int) -> None:
        """Divide what a few devices have anew by integer programs."""
        if self.done:
            return
        programs = min(self.programs, max(1, self.effort.programs // 5))
        better, solved = improve(
            self.groups, start, devices=devices, free=self.effort.free, programs=programs, target=self.target
        )
        self.programs -= solved
        self.offer(better, f"integer programs on {devices} devices")

    def prove(self) -> None:
        """Give all of a small problem to the solver, to find something better or to raise the bound."""
        small = merge(self.groups, joined_by(self.groups, self.value))
        if self.done or len(small) * small.devices > self.effort.whole:
            return
        solved = solve_program(
            small, allowed_devices(small), nodes=self.effort.nodes, below=self.value * (1 - _EXACT), gap=_EXACT
        )
        if solved.device is not None:
            number = small.of_node[np.unique(self.groups.of_node, return_index=True)[1]]
            self.offer(solved.device[number], "the integer program")
        if (bound := min(solved.bound, self.value)) > self.bound:
            self.bound, self.proof = bound, "the integer program" + ("" if solved.finished else ", stopped")


_COOL = Heat(12.0, 0.05)
_HEATS = (Heat(12.0, 0.3), Heat(4.0, 0.5), Heat(6.0, 1.0), Heat(12.0, 0.1))
_SHAKES = (_COOL, Heat(6.0, 0.5), Heat(12.0, 0.3), Heat(3.0, 1.0), _COOL)
# Groups for each device, and how heavy they may become, measured by the value of the best cut. Which is best differs.
_COARSE = ((20, 1.0), (8, 0.8), (4, 1.25))
_POLISHED = 3


def distinct(devices: list[Ints]) -> list[Ints]:
    """The different ones, in their order."""
    kept: dict[bytes, Ints] = {}
    for device in devices:
        kept.setdefault(device.tobytes(), device)
    return list(kept.values())
