"""Dynamic programming over segments of a line, vectorised over all pairs of cut points.

Cut points are numbered 0..K. For each of m segments in turn a matrix tells the load of the segment from cut
point a to cut point b, infinite where it may not be. Two programs run over them:

* ``best[j, b] = min over a of max(best[j-1, a], load_j[a, b])``: the least load of the slowest segment, and
* the same with a sum in place of the maximum: among the cuts that keep below that load, the cheapest.

Every row of ``best`` is one starting point, so that cuts whose first segment is fixed are found together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def least_maximum(loads: Sequence[np.ndarray], starts: np.ndarray) -> np.ndarray:
    """The least largest load of a cut into ``len(loads)`` segments.

    Args:
        loads: one [K+1, K+1] matrix a segment.
        starts: S cut points where the first segment may start.

    Returns:
        [S, K+1]: for each start and each end of the last segment; infinite where there is no cut.
    """
    best = _initial(loads[0].shape[0], starts, -np.inf)
    for load in loads:
        best = np.stack([np.maximum(row[:, None], load).min(axis=0) for row in best])
    return best


def least_sum(costs: Sequence[np.ndarray], start: int, end: int) -> tuple[float, tuple[int, ...]]:
    """The cheapest cut from ``start`` to ``end``: its cost and its cut points, both ends included."""
    best = _initial(costs[0].shape[0], np.array([start]), 0.0)[0]
    choices: list[np.ndarray] = []
    for cost in costs:
        total = best[:, None] + cost
        choices.append(total.argmin(axis=0))
        best = total.min(axis=0)
    points = [end]
    for choice in reversed(choices):
        points.append(int(choice[points[-1]]))
    return float(best[end]), tuple(reversed(points))


def _initial(points: int, starts: np.ndarray, value: float) -> np.ndarray:
    best = np.full((len(starts), points), np.inf)
    best[np.arange(len(starts)), starts] = value
    return best
