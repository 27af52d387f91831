"""The integer program of max-load placement, solved by HiGHS (``scipy.optimize.milp``).

Binary x[g, d] says that group g is on device d. For a net of cost c with owner o and readers r, out[k] >= x[o, k] -
x[r, k] and in[k] >= x[r, k] - x[o, k] for each accelerator k, and c (out[k] + in[k]) is added to its load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from daggc.plan.maxload.groups import Groups, group
from daggc.plan.maxload.problem import Assignment, Bools, Ints, Problem, evaluate

OPTIMAL, LIMIT, INFEASIBLE = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Solved:
    """What the solver said: a device for each group or None, a lower bound, and whether nothing better exists."""

    device: Ints | None
    bound: float
    finished: bool


def optimum(problem: Problem, seconds: float) -> Assignment | None:
    """The best assignment that HiGHS finds in so many seconds, and its proved bound; None if it finds none.

    The oracle that tests and benchmarks compare with: nothing but colours is decided before HiGHS is called. The time
    limit makes it differ from run to run where it is reached.
    """
    groups = group(problem)
    solved = solve_program(groups, allowed_devices(groups), seconds=seconds)
    if solved.device is None:
        return None
    device = solved.device[groups.of_node]
    loads = evaluate(problem, device)
    value = float(loads.max())
    return Assignment(device, loads, value, min(solved.bound, value), "HiGHS" if solved.finished else "HiGHS, stopped")


def allowed_devices(groups: Groups) -> Bools:
    """Which group may be on which device, bool[groups, devices], of the many equal renumberings of devices only one."""
    allowed = np.isfinite(groups.seconds())
    for first, count, weight in (
        (0, groups.accelerators, groups.accelerator),
        (groups.accelerators, groups.cpus, groups.cpu),
    ):
        heavy = np.argsort(-np.where(np.isfinite(weight), weight, -1), kind="stable")[:count]
        for rank, heaviest in enumerate(heavy.tolist()):
            allowed[heaviest, first + rank + 1 : first + count] = False
    return allowed


def solve_program(
    groups: Groups,
    allowed: Bools,
    *,
    seconds: float | None = None,
    nodes: int | None = None,
    below: float = np.inf,
    gap: float = 1e-6,
    only: Sequence[int] | None = None,
) -> Solved:
    """Minimise the largest load.

    Args:
        groups: what is placed.
        allowed: bool[groups, devices]; one True in a row fixes its group.
        seconds: time limit; where it is reached, the result may differ from run to run.
        nodes: limit of branch-and-bound nodes, which is the same in every run.
        below: assignments of a greater value are of no interest; none found means that there is none.
        gap: relative gap at which to stop.
        only: the devices whose loads count, all by default.
    """
    model = _Model(groups, allowed, below, range(groups.devices) if only is None else only)
    options: dict[str, float | int] = {"mip_rel_gap": gap}
    if seconds is not None:
        options["time_limit"] = seconds
    if nodes is not None:
        options["node_limit"] = nodes
    done = milp(
        model.objective,
        integrality=model.integrality,
        bounds=model.bounds,
        constraints=[model.constraints] if model.constraints.A.shape[0] else [],
        options=options,
    )
    if done.status == INFEASIBLE:
        return Solved(None, below, True)
    bound = done.mip_dual_bound if done.mip_dual_bound is not None and np.isfinite(done.mip_dual_bound) else 0.0
    if done.x is None:
        return Solved(None, float(bound), False)
    return Solved(model.device(done.x), float(bound), done.status == OPTIMAL)


class _Model:
    """Columns: one x for each allowed (group, device), out and in for each (net, accelerator) that can pay, the value.

    A group with one allowed device has no columns; what it does to the loads is a constant.
    """

    def __init__(self, groups: Groups, allowed: Bools, below: float, only: Sequence[int]):
        self.allowed = allowed
        free = allowed.sum(axis=1) > 1
        self.column = np.full(allowed.shape, -1)
        chosen = allowed & free[:, None]
        count = int(chosen.sum())
        self.column[chosen] = np.arange(count)
        self.rows: list[tuple[list[int], list[float], float, float]] = []
        seconds = groups.seconds()
        loads: list[dict[int, float]] = [{} for _ in range(groups.devices)]
        constant = np.zeros(groups.devices)
        room = np.full(groups.accelerators, groups.memory)
        for g, d in zip(*np.nonzero(allowed), strict=True):
            if (x := int(self.column[g, d])) >= 0:
                loads[d][x] = float(seconds[g, d])
            else:
                constant[d] += seconds[g, d]
                if d < groups.accelerators:
                    room[d] -= groups.size[g]
        for g in np.flatnonzero(free):
            columns = self.column[g][allowed[g]].tolist()
            self._row(columns, [1.0] * len(columns), 1, 1)
        for k in range(groups.accelerators):
            here = np.flatnonzero(self.column[:, k] >= 0)
            if groups.size[here].sum() > room[k]:
                unit = max(groups.memory, 1.0)
                self._row(self.column[here, k].tolist(), (groups.size[here] / unit).tolist(), -np.inf, room[k] / unit)
        continuous = count
        for owner, readers, cost in zip(groups.owner, groups.readers, groups.cost, strict=True):
            for k in range(groups.accelerators):
                for plus, minus in (([owner], readers), (readers, [owner])):
                    paid = self._net(plus, minus, k, continuous)
                    if paid is None:
                        continue
                    if paid:
                        constant[k] += cost
                    else:
                        loads[k][continuous] = cost
                        continuous += 1
        value = continuous
        for d in only:
            if loads[d] or constant[d]:
                self._row([*loads[d], value], [*loads[d].values(), -1.0], -np.inf, -constant[d])
        self.objective = np.zeros(value + 1)
        self.objective[value] = 1
        self.integrality = np.zeros(value + 1)
        self.integrality[:count] = 1
        lower: Any = np.zeros(value + 1)
        upper: Any = np.ones(value + 1)
        upper[value] = below
        self.bounds = Bounds(lower, upper)
        self.constraints = self._matrix(value + 1)

    def _net(
        self, plus: list[int] | tuple[int, ...], minus: list[int] | tuple[int, ...], k: int, new: int
    ) -> bool | None:
        """Rows ``column new >= x[p, k] - x[m, k]``; None: never paid, True: always paid, False: depends."""
        rows: list[tuple[list[int], list[float], float]] = []
        for p in plus:
            if not self.allowed[p, k]:
                continue
            for m in minus:
                at_p, at_m = int(self.column[p, k]), int(self.column[m, k])
                if not self.allowed[m, k]:
                    if at_p < 0:
                        return True
                    rows.append(([new, at_p], [1.0, -1.0], 0.0))
                elif at_m >= 0:
                    if at_p < 0:
                        rows.append(([new, at_m], [1.0, 1.0], 1.0))
                    else:
                        rows.append(([new, at_p, at_m], [1.0, -1.0, 1.0], 0.0))
        for columns, values, lower in rows:
            self._row(columns, values, lower, np.inf)
        return False if rows else None

    def _row(self, columns: list[int], values: list[float], lower: float, upper: float) -> None:
        self.rows.append((columns, values, lower, upper))

    def _matrix(self, width: int) -> LinearConstraint:
        starts = np.cumsum([0, *(len(columns) for columns, _, _, _ in self.rows)])
        columns = np.array([column for row in self.rows for column in row[0]], dtype=int)
        values = np.array([value for row in self.rows for value in row[1]], dtype=float)
        matrix = csr_array((values, columns, starts), shape=(len(self.rows), width))
        lower: Any = [row[2] for row in self.rows]
        upper: Any = [row[3] for row in self.rows]
        return LinearConstraint(matrix, lower, upper)

    def device(self, x: np.ndarray) -> Ints:
        """int[groups]: the device of each group in a solution."""
        chosen = np.where(self.column >= 0, x[self.column], self.allowed.astype(float))
        return np.where(self.allowed, chosen, -1.0).argmax(axis=1)
