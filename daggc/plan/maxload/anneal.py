"""Local search by simulated annealing: groups, chains of neighbours and pairs move between devices.

The largest load alone hides what a move is worth while several devices are equally busy, so the search descends on the
sum of a power of the loads and keeps the assignment with the least largest load that it passes. Seeded, and limited in
moves: the same result in every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from random import Random

import numpy as np

from daggc.plan.maxload.groups import Groups
from daggc.plan.maxload.problem import Ints
from daggc.plan.maxload.state import State

_COLD = 0.002
_LONGEST = 40  # neighbours that are asked to follow a group


@dataclass(frozen=True)
class Heat:
    """How freely a search wanders.

    Attributes:
        power: of the loads: the higher, the less a device counts that is not among the busiest.
        hot: the first temperature, in units of (load of the busiest device)^power.
    """

    power: float = 12.0
    hot: float = 0.3


def anneal(groups: Groups, device: Ints, moves: int, seed: int, target: float, heat: Heat) -> Ints:
    """Improve an assignment.

    Args:
        groups: what is placed.
        device: int[groups], where to start; it must fit.
        moves: how many to try.
        seed: of the random choices.
        target: a lower bound, at which to stop.
        heat: a low one stays near the start.
    """
    search = _Search(groups, device, seed, heat)
    for step in range(moves):
        if not step % 4096:
            search.cool(step / moves)
            if search.best_value <= target:
                break
        search.step()
    return np.array(search.best, dtype=int)


class _Search:
    def __init__(self, groups: Groups, device: Ints, seed: int, heat: Heat):
        self.state = State(groups, device)
        self.random = Random(seed).random
        self.heat = heat
        self.power = heat.power
        self.devices = groups.devices
        self.allowed = [np.flatnonzero(row).tolist() for row in np.isfinite(groups.seconds())]
        self.movable = [g for g, devices in enumerate(self.allowed) if len(devices) > 1]
        self.best = list(self.state.at)
        self.best_value = max(self.state.loads)
        self.scale = self.best_value or 1.0
        self.temperature = heat.hot

    def cool(self, part: float) -> None:
        """Set the temperature for a part of the moves done, and measure loads against the best value so far."""
        self.temperature = self.heat.hot * (_COLD / self.heat.hot) ** part
        self.scale = self.best_value or 1.0

    def step(self) -> None:
        """Try one move."""
        if not self.movable:
            return
        random, state = self.random, self.state
        g = self.movable[int(random() * len(self.movable))]
        to = self._target(g)
        if to == state.at[g]:
            return
        kind = random()
        if kind < 0.7:
            self._one(g, to)
        elif kind < 0.8:
            self._several(self._chain(g, to))
        elif kind < 0.9:
            self._cascade(g, to)
        else:
            self._several(self._exchange(g, to))

    def _target(self, g: int) -> int:
        """Mostly a device that a neighbour is on."""
        random, state = self.random, self.state
        near = state.near[g]
        if near and random() < 0.75:
            to = state.at[near[int(random() * len(near))]]
            if state.seconds[g][to] != float("inf"):
                return to
        allowed = self.allowed[g]
        return allowed[int(random() * len(allowed))]

    def _accept(self, change: float) -> bool:
        return change <= 0 or self.random() < exp(-change / self.temperature)

    def _one(self, g: int, to: int) -> None:
        state, loads, scale, power = self.state, self.state.loads, self.scale, self.power
        if state.used[to] + state.size[g] > state.room[to]:
            return
        of = state.at[g]
        left, joined = state.after(g, to)
        change = (
            (left / scale) ** power
            + (joined / scale) ** power
            - (loads[of] / scale) ** power
            - (loads[to] / scale) ** power
        )
        if change <= 0 or self.random() < exp(-change / self.temperature):
            state.move(g, to, left, joined)
            self._keep()

    def _several(self, moves: list[tuple[int, int]]) -> None:
        """Several moves, accepted or taken back together."""
        state, scale, power = self.state, self.scale, self.power
        touched = {d for g, to in moves for d in (state.at[g], to)}
        before = {d: state.loads[d] for d in touched}
        back = [(g, state.at[g]) for g, _ in reversed(moves)]
        for g, to in moves:
            state.move(g, to, *state.after(g, to))
        change = sum((state.loads[d] / scale) ** power - (before[d] / scale) ** power for d in touched)
        if all(state.used[d] <= state.room[d] for d in touched) and self._accept(change):
            self._keep()
            return
        for g, of in back:
            state.move(g, of, *state.after(g, of))
        for d in touched:  # exactly as before: adding and taking away leaves dust
            state.loads[d] = before[d]

    def _cascade(self, g: int, to: int) -> None:
        """A group, and the neighbours that do better by following it, and theirs."""
        state, scale, power = self.state, self.scale, self.power
        of, loads = state.at[g], state.loads
        before = loads[of], loads[to]

        def energy(left: float, joined: float) -> float:
            return (left / scale) ** power + (joined / scale) ** power

        state.move(g, to, *state.after(g, to))
        moved, asked, reached = [g], 0, energy(loads[of], loads[to])
        waiting = [other for other in state.near[g] if state.at[other] == of]
        while waiting and asked < _LONGEST:
            other = waiting.pop(int(self.random() * len(waiting)))
            if state.at[other] != of or state.seconds[other][to] == float("inf"):
                continue
            asked += 1
            after = state.after(other, to)
            if energy(*after) < reached:
                state.move(other, to, *after)
                reached = energy(*after)
                moved.append(other)
                waiting += [another for another in state.near[other] if state.at[another] == of]
        if state.used[to] <= state.room[to] and self._accept(reached - energy(*before)):
            self._keep()
            return
        for member in reversed(moved):
            state.move(member, of, *state.after(member, of))
        loads[of], loads[to] = before

    def _chain(self, g: int, to: int) -> list[tuple[int, int]]:
        """A few connected groups of one device."""
        random, state = self.random, self.state
        of, members, length = state.at[g], [g], 2 + int(random() ** 2 * 10)
        seen = {g}
        for _ in range(2 * length):
            near = state.near[members[int(random() * len(members))]]
            if not near:
                break
            other = near[int(random() * len(near))]
            if other not in seen and state.at[other] == of and state.seconds[other][to] != float("inf"):
                seen.add(other)
                members.append(other)
                if len(members) == length:
                    break
        return [(member, to) for member in members]

    def _exchange(self, g: int, to: int) -> list[tuple[int, int]]:
        """A group, against one from the device that it joins."""
        random, state = self.random, self.state
        of = state.at[g]
        for _ in range(8):
            other = self.movable[int(random() * len(self.movable))]
            if state.at[other] == to and state.seconds[other][of] != float("inf"):
                return [(g, to), (other, of)]
        return [(g, to)]

    def _keep(self) -> None:
        value = max(self.state.loads)
        if value < self.best_value * (1 - 1e-9):
            self.best_value = value
            self.best = list(self.state.at)
