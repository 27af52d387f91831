"""Exact improvement of a few devices at a time: what is on them is divided anew by the integer program.

Groups that move among some devices change the loads of no others, so a division of those devices that is better in
itself is better. Groups on one device are first merged along their dearest nets down to a number that HiGHS divides
quickly: another number, other programs.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from daggc.plan.maxload.coarsen import coarsen
from daggc.plan.maxload.groups import Groups, loads_of, merge
from daggc.plan.maxload.problem import Ints
from daggc.plan.maxload.program import solve_program

_STEP = 1e-4  # the least improvement of interest, as a fraction
_NODES = 60  # of branch and bound


def improve(groups: Groups, device: Ints, *, devices: int, free: int, programs: int, target: float) -> tuple[Ints, int]:
    """Relieve the busiest device with others until no set of ``devices`` helps.

    Args:
        groups: what is placed.
        device: int[groups], where to start.
        devices: how many devices a program divides anew.
        free: how many groups it has at most.
        programs: how many may be solved.
        target: a lower bound, at which to stop.

    Returns:
        The assignment, and how many programs were solved.
    """
    solved = 0
    while solved < programs:
        loads = loads_of(groups, device)
        busiest = int(loads.argmax())
        if loads[busiest] <= target:
            break
        others = sorted(np.flatnonzero(np.arange(groups.devices) != busiest).tolist(), key=loads.__getitem__)
        for rest in combinations(others, min(devices - 1, len(others))):
            better = _divide(groups, device, [busiest, *rest], float(loads[busiest]), free)
            solved += 1
            if better is not None:
                device = better
                break
            if solved >= programs:
                return device, solved
        else:
            break
    return device, solved


def _divide(groups: Groups, device: Ints, among: list[int], value: float, free: int) -> Ints | None:
    """A division of what these devices have in which each has a load below ``value``, or None."""
    here = np.isin(device, among)
    fixed = int((~here).sum())
    label = coarsen(groups, free + fixed, value, among=np.where(here, device, -1))
    small = merge(groups, label)
    number = np.unique(label, return_inverse=True)[1]
    at = np.empty(len(small), dtype=int)
    at[number] = device
    allowed = np.zeros((len(small), groups.devices), dtype=bool)
    allowed[:, among] = np.isfinite(small.seconds()[:, among])
    allowed[~np.isin(at, among)] = False
    allowed[np.arange(len(small)), at] = True
    found = solve_program(small, allowed, nodes=_NODES, below=value * (1 - _STEP), only=among).device
    if found is None:
        return None
    moved = found[number]
    return moved if loads_of(groups, moved)[among].max() < value else None
