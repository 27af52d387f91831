"""Starts: the best cut of an order of the groups into one segment for each device, by dynamic programming.

The load of every segment of an order comes from rectangles in the plane of its two ends: an accelerator pays for a net
exactly where the segment's ends lie in certain rectangles, so two cumulative sums give all loads at once.
"""

from __future__ import annotations

import heapq
from itertools import pairwise

import numpy as np
from scipy.linalg import eigh
from scipy.sparse import coo_matrix

from daggc.plan.maxload.groups import Groups, merge
from daggc.plan.maxload.problem import Floats, Ints

_BLOCKS = 1000  # the plane of segments has the square of it
_WORK = 200_000_000  # entries of planes that are compared


def segment_loads(groups: Groups, order: Ints) -> tuple[Floats, Floats]:
    """Loads of order[i:j] on an accelerator and on a CPU core: two float[len(order) + 1, len(order) + 1].

    Infinite where i > j. Groups that the order leaves out are on a CPU core.
    """
    count = len(order)
    place = np.full(len(groups), -1)  # before everything: in no segment
    place[order] = np.arange(count)
    corner = np.zeros((count + 2, count + 2))

    def add(low_i: int, high_i: int, low_j: int, high_j: int, cost: float) -> None:
        """The cost is paid by segments with low_i <= i <= high_i and low_j <= j <= high_j."""
        if low_i <= high_i and low_j <= high_j:
            corner[low_i, low_j] += cost
            corner[high_i + 1, low_j] -= cost
            corner[low_i, high_j + 1] -= cost
            corner[high_i + 1, high_j + 1] += cost

    def add_without(places: list[int], cost: float) -> None:
        """The cost is paid by segments that hold none of these places."""
        for left, right in pairwise([-1, *places, count]):
            add(left + 1, right, left + 1, right, cost)

    for owner, readers, cost in zip(groups.owner, groups.readers, groups.cost, strict=True):
        home, others = int(place[owner]), sorted(place[list(readers)].tolist())
        everyone = sorted([home, *others])
        # Out: the owner is here, but not everyone.
        add(0, home, home + 1, count, cost)
        add(0, everyone[0], everyone[-1] + 1, count, -cost)
        # In: the owner is not here, and not none of all.
        add_without([home], cost)
        add_without(everyone, -cost)
    transfers = corner.cumsum(axis=0).cumsum(axis=1)[: count + 1, : count + 1]
    backwards = np.tri(count + 1, k=-1, dtype=bool)

    def sums(values: Floats) -> Floats:
        finite = np.isfinite(values[order])
        total = np.concatenate([[0.0], np.cumsum(np.where(finite, values[order], 0.0))])
        never = np.concatenate([[0], np.cumsum(~finite)])
        result = total[None, :] - total[:, None]
        return np.where(backwards | (never[None, :] > never[:, None]), np.inf, result)

    # Sums of differences leave dust: no segment costs less than nothing.
    accelerator = np.maximum(sums(groups.accelerator) + transfers, 0.0)
    accelerator[sums(groups.size) > groups.memory * (1 + 1e-12)] = np.inf
    return accelerator, np.maximum(sums(groups.cpu), 0.0)


def best_cut(groups: Groups, order: Ints) -> Ints | None:
    """The cut of an order into segments, one for each device at most, whose largest load is least; None if none fits.

    Groups that no accelerator can hold are spread over the CPU cores first. An order of very many groups is cut
    between blocks of it. Returns int[groups].
    """
    if len(groups) > _BLOCKS:
        place = np.empty(len(groups), dtype=int)
        place[order] = np.arange(len(groups))
        label = place * _BLOCKS // len(groups)
        device = best_cut(merge(groups, label), np.arange(_BLOCKS))
        return None if device is None else device[label]
    device = np.full(len(groups), -1)
    base = np.zeros(groups.cpus)
    bound_to_cpu = np.flatnonzero(~np.isfinite(groups.accelerator))
    for g in bound_to_cpu[np.argsort(-groups.cpu[bound_to_cpu], kind="stable")].tolist():
        if not groups.cpus:
            return None
        least = int(base.argmin())
        device[g] = groups.accelerators + least
        base[least] += groups.cpu[g]
    order = order[device[order] < 0]
    base.sort()
    return _cut(groups, order, device, base)


def _cut(groups: Groups, order: Ints, device: Ints, base: Floats) -> Ints | None:
    """Fill in the devices of the groups in the order; ``base`` is what the CPU cores have already."""
    count = len(order)
    on_accelerator, on_cpu = segment_loads(groups, order)
    accelerators = min(groups.accelerators, count)
    cpus = min(groups.cpus, max(1, _WORK // (count + 1) ** 2 // (accelerators + 1)))
    # best[k, c][j]: the least largest load of order[:j] on k accelerators and c CPU cores.
    best = np.full((accelerators + 1, cpus + 1, count + 1), np.inf)
    kind = np.zeros(best.shape, dtype=int)
    start = np.zeros(best.shape, dtype=int)
    best[0, 0, 0] = 0
    for k in range(accelerators + 1):
        for c in range(cpus + 1):
            if k:
                _extend(best, kind, start, (k, c), (k - 1, c), on_accelerator, 0)
            if c:
                _extend(best, kind, start, (k, c), (k, c - 1), on_cpu + base[c - 1], 1)
    if not np.isfinite(best[accelerators, cpus, count]):
        return None
    cores = np.argsort(np.bincount(device[device >= 0] - groups.accelerators, groups.cpu[device >= 0], groups.cpus))
    k, c, end = accelerators, cpus, count
    while k or c:
        at = k, c, end
        if kind[at] == 0:
            k -= 1
            to = k
        else:
            c -= 1
            to = groups.accelerators + int(cores[c])
        device[order[start[at] : end]] = to
        end = int(start[at])
    return device


def _extend(
    best: Floats, kind: Ints, start: Ints, to: tuple[int, int], before: tuple[int, int], loads: Floats, of: int
) -> None:
    """One more device of a kind: what it makes better."""
    value = np.maximum(best[before][:, None], loads)
    first = value.argmin(axis=0)
    value = value[first, np.arange(len(first))]
    better = value < best[to]
    best[to][better], start[to][better], kind[to][better] = value[better], first[better], of


def orders(groups: Groups) -> list[Ints]:
    """Orders of the groups in which those that exchange much stand close: topological ones and a spectral one."""
    found = [_topological(groups, deep) for deep in (False, True)]
    spectral = _spectral(groups)
    if spectral is not None:
        found.append(spectral)
    return found


def _topological(groups: Groups, deep: bool) -> Ints:
    """Producers before readers where no cycle forbids; ``deep`` follows what became ready last, else the first."""
    count = len(groups)
    after: list[set[int]] = [set() for _ in range(count)]
    for owner, readers in zip(groups.owner, groups.readers, strict=True):
        after[owner].update(readers)
    waiting = np.zeros(count, dtype=int)
    for readers in after:
        waiting[list(readers)] += 1
    ready: list[tuple[int, int]] = [(0, g) for g in range(count) if not waiting[g]]
    heapq.heapify(ready)
    order: list[int] = []
    done = np.zeros(count, dtype=bool)
    while len(order) < count:
        # Where a cycle of groups is in the way, go on with the one that waits for the fewest.
        g = heapq.heappop(ready)[1] if ready else int(np.where(done, count + 1, waiting).argmin())
        if done[g]:
            continue
        done[g] = True
        order.append(g)
        for reader in sorted(after[g]):
            waiting[reader] -= 1
            if not waiting[reader] and not done[reader]:
                heapq.heappush(ready, (-len(order) if deep else len(order), reader))
    return np.array(order, dtype=int)


def _spectral(groups: Groups) -> Ints | None:
    """By the second eigenvector of the Laplacian, with the seconds of the transfers as weights."""
    count = len(groups)
    if not 4 <= count <= 2 * _BLOCKS or not groups.owner:
        return None
    rows, columns, weights = [], [], []
    for owner, readers, cost in zip(groups.owner, groups.readers, groups.cost, strict=True):
        for reader in readers:
            rows += [owner, reader]
            columns += [reader, owner]
            weights += [cost / len(readers)] * 2
    adjacency = coo_matrix((weights, (rows, columns)), shape=(count, count)).toarray()
    adjacency /= adjacency.max()
    adjacency += 1e-6 / count  # one part, whatever the nets are
    scale = 1 / np.sqrt(adjacency.sum(axis=1))
    vector = eigh(-adjacency * scale[:, None] * scale[None, :], subset_by_index=[1, 1])[1]
    fiedler = vector[:, 0] * scale
    fiedler *= np.sign(fiedler[np.abs(fiedler).argmax()])
    return np.lexsort((np.arange(count), fiedler.round(12)))
