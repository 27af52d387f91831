"""Lower bounds on the value of every assignment.

* The lightest device that can hold a group: over all sets of groups that contain it, the least load of an accelerator
  that holds exactly that set. Seconds add up and transfers are a cut function, so this is a minimum cut.
* Work: the seconds of all groups, divided in fractions between accelerators and CPU cores.

Both are sharper under a limit, when it is asked whether some assignment has at most that value: groups that would be
too slow on a CPU core are on accelerators, and the other way round. Bisection finds the smallest limit not refuted.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from daggc.plan.maxload.groups import Groups
from daggc.plan.maxload.problem import Floats

_UNITS = 2**29  # capacities of flows are integers of 32 bits; each is rounded down, so bounds stay bounds


def lightest_holders(groups: Groups, at_least: float = 0.0) -> Floats:
    """For each group the least load of an accelerator that holds it, float[groups].

    Args:
        groups: what is placed.
        at_least: how small a number is of interest: below it, a smaller lower bound may be returned.
    """
    found = groups.accelerator.copy()
    reach = groups.accelerator + _transfers(groups)  # a device with this group alone: no minimum is above it
    flow = _Flow(groups, float(reach[np.isfinite(reach)].max(initial=0.0)))
    for g in np.flatnonzero(np.isfinite(groups.accelerator) & (reach > at_least) & (groups.accelerator < reach)):
        found[g] = max(found[g], flow.least(int(g)))
    return found


def _transfers(groups: Groups) -> Floats:
    total = np.zeros(len(groups))
    for owner, readers, cost in zip(groups.owner, groups.readers, groups.cost, strict=True):
        total[[owner, *readers]] += cost
    return total


class _Flow:
    """The network whose cuts are loads: a group on the source's side is on the device.

    A net's output is paid where the owner is here and a reader is not: owner -> hub (cost), hub -> reader (infinite);
    its input where a reader is here and the owner is not: reader -> hub (infinite), hub -> owner (cost).
    """

    def __init__(self, groups: Groups, largest: float):
        """No flow is above ``largest``, so more capacity than that is endless."""
        count = len(groups)
        self.sink = count
        self.unit = largest / _UNITS if largest > 0 else 1.0
        endless = 2 * _UNITS
        links: list[tuple[int, int, int]] = []
        for g, seconds in enumerate(groups.accelerator.tolist()):
            links.append((g, self.sink, int(min(seconds / self.unit, endless))))
        hub = count + 1
        for owner, readers, cost in zip(groups.owner, groups.readers, groups.cost, strict=True):
            capacity = int(min(cost / self.unit, endless))
            links += [(owner, hub, capacity), (hub + 1, owner, capacity)]
            for reader in readers:
                links += [(hub, reader, endless), (reader, hub + 1, endless)]
            hub += 2
        start, end, capacity = np.array(links, dtype=np.int32).T if links else np.zeros((3, 0), dtype=np.int32)
        self.network = csr_array((capacity, (start, end)), shape=(hub, hub), dtype=np.int32)

    def least(self, g: int) -> float:
        return float(maximum_flow(self.network, g, self.sink).flow_value) * self.unit


def lower_bound(groups: Groups) -> float:
    """No assignment of the groups has a smaller value."""
    holder = lightest_holders(groups, at_least=_refuted_up_to(groups, groups.accelerator))
    return _refuted_up_to(groups, holder)


def _refuted_up_to(groups: Groups, holder: Floats) -> float:
    """The largest limit that counting refutes."""
    if not len(groups):
        return 0.0
    low = float(np.minimum(holder, groups.cpu).max())
    if not np.isfinite(low):
        return low
    high = max(low, _ceiling(groups))
    if _can_hold(groups, holder, low):
        return low
    for _ in range(50):
        middle = (low + high) / 2
        if _can_hold(groups, holder, middle):
            high = middle
        else:
            low = middle
    return low


def _ceiling(groups: Groups) -> float:
    seconds = np.where(np.isfinite(groups.accelerator), groups.accelerator, 0).sum()
    return float(seconds + np.where(np.isfinite(groups.cpu), groups.cpu, 0).sum())


def _can_hold(groups: Groups, holder: Floats, limit: float) -> bool:
    """False: no assignment has a value of at most the limit. Groups divide, devices of a kind are one pool."""
    slack = limit * (1 + 1e-12)
    never_cpu, never_accelerator = groups.cpu > slack, holder > slack
    if (never_cpu & never_accelerator).any():
        return False
    either = ~never_cpu & ~never_accelerator
    accelerators = slack * groups.accelerators - groups.accelerator[never_cpu].sum()
    cpus = slack * groups.cpus - groups.cpu[never_accelerator].sum()
    room = groups.memory * groups.accelerators * (1 + 1e-12) - groups.size[never_cpu].sum()
    if accelerators < 0 or cpus < 0 or room < 0:
        return False
    # The CPU cores take the groups that save accelerators the most for a second of theirs.
    return _left_over(groups.accelerator[either], groups.cpu[either], cpus) <= accelerators and (
        _left_over(groups.size[either], groups.cpu[either], cpus) <= room
    )


def _left_over(saved: Floats, price: Floats, budget: float) -> float:
    """The least sum of ``saved`` that remains when fractions are bought for at most ``budget``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        worth = np.where(price > 0, saved / price, np.inf)
    order = np.argsort(-worth, kind="stable")
    before = np.cumsum(price[order]) - price[order]
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.where(price[order] > 0, (budget - before) / price[order], 1.0)
    return float((saved[order] * (1 - np.clip(part, 0, 1))).sum())
