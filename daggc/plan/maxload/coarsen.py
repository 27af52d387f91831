"""Fewer, heavier groups: those joined by the dearest nets become one, as long as it stays light and small.

A search over heavy groups makes the moves that a search over light ones hardly finds: whole blocks of a network.
"""

from __future__ import annotations

import numpy as np

from daggc.plan.maxload.groups import Groups
from daggc.plan.maxload.problem import Ints


def coarsen(groups: Groups, count: int, value: float, among: Ints | None = None) -> Ints:
    """Labels of about ``count`` groups, int[groups].

    Args:
        groups: what is placed.
        count: how many groups to leave; more are left where the rest would be too heavy or too large.
        value: of a known assignment; a merged group's seconds stay below a third of it.
        among: int[groups]; only groups of one number merge, and none of a negative number.
    """
    part = [0] * len(groups) if among is None else among.tolist()
    parent = list(range(len(groups)))

    def root(g: int) -> int:
        while parent[g] != g:
            parent[g] = parent[parent[g]]
            g = parent[g]
        return g

    kinds = np.isfinite(groups.accelerator).tolist()
    seconds = np.where(kinds, groups.accelerator, 0.0).tolist()
    size = groups.size.tolist()
    most, largest = value / 3, groups.memory / 4
    left = len(groups)
    for net in np.argsort(-np.array(groups.cost), kind="stable").tolist():
        for reader in groups.readers[net]:
            if left <= count:
                break
            a, b = sorted((root(groups.owner[net]), root(reader)))
            if a == b or kinds[a] != kinds[b] or part[a] != part[b] or part[a] < 0:
                continue
            if seconds[a] + seconds[b] > most or (size[a] + size[b] > largest and size[a] and size[b]):
                continue
            parent[b] = a
            seconds[a] += seconds[b]
            size[a] += size[b]
            left -= 1
    return np.array([root(g) for g in range(len(groups))], dtype=int)
