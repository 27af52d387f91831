"""Whether everything fits in memory, and an assignment in which it does."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from daggc.errors import PlanError
from daggc.plan.maxload.groups import Groups
from daggc.plan.maxload.problem import Ints

_NODES = 20_000  # of branch and bound, where packing is hard


def packed(groups: Groups) -> Ints:
    """An assignment that fits, int[groups], with work spread as it comes.

    Raises:
        PlanError: nothing fits; the message has the bytes that are missing.
    """
    _check_each(groups)
    only = np.flatnonzero(~np.isfinite(groups.cpu))
    device = _first_fit(groups, only)
    if device is None:
        device = _program(groups, only)
    loads = np.zeros(groups.devices)
    used = np.zeros(groups.devices)
    np.add.at(loads, device[only], groups.accelerator[only])
    np.add.at(used, device[only], groups.size[only])
    seconds = groups.seconds()
    rest = np.flatnonzero(np.isfinite(groups.cpu))
    for g in rest[np.lexsort((rest, -groups.size[rest]))].tolist():
        after = loads + seconds[g]
        after[: groups.accelerators][used[: groups.accelerators] + groups.size[g] > groups.memory] = np.inf
        to = int(after.argmin())
        device[g] = to
        loads[to] = after[to]
        used[to] += groups.size[g]
    return device


def _check_each(groups: Groups) -> None:
    nowhere = np.flatnonzero(~np.isfinite(groups.accelerator) & ~np.isfinite(groups.cpu))
    if nowhere.size:
        largest = int(nowhere[groups.size[nowhere].argmax()])
        node = int(np.flatnonzero(groups.of_node == largest)[0])
        if groups.accelerators and (short := groups.size[largest] - groups.memory) > 0:
            raise PlanError(
                f"placement: node {node} and those of its colour hold {groups.size[largest]:.0f} bytes, an accelerator "
                f"has {groups.memory:.0f} and there is no CPU core that can take them: {short:.0f} bytes short"
            )
        raise PlanError(f"placement: no device can run node {node} and those of its colour")
    short = groups.size[~np.isfinite(groups.cpu)].sum() - groups.accelerators * groups.memory * (1 + 1e-12)
    if short > 0:
        raise PlanError(
            f"placement: nodes that only accelerators can run hold {short:.0f} bytes more than the "
            f"{groups.accelerators} accelerators of {groups.memory:.0f} bytes have: {short:.0f} bytes short"
        )


def _first_fit(groups: Groups, only: Ints) -> Ints | None:
    """Largest first, each to the accelerator with the most room."""
    device = np.full(len(groups), -1)
    room = np.full(groups.accelerators, groups.memory * (1 + 1e-12))
    for g in only[np.lexsort((only, -groups.size[only]))].tolist():
        to = int(room.argmax())
        if groups.size[g] > room[to]:
            return None
        device[g] = to
        room[to] -= groups.size[g]
    return device


def _program(groups: Groups, only: Ints) -> Ints:
    """Bin packing with as few bytes over as possible, as an integer program."""
    bins, items = groups.accelerators, len(only)
    unit = max(groups.memory, 1.0)
    x = np.arange(items * bins)  # x[item, bin], then the bytes over of each bin
    size = np.repeat(groups.size[only] / unit, bins)
    columns = np.concatenate([x, x, items * bins + np.arange(bins)])
    rows = np.concatenate([x // bins, items + x % bins, items + np.arange(bins)])
    values = np.concatenate([np.ones(items * bins), size, -np.ones(bins)])
    matrix = coo_array((values, (rows, columns)), shape=(items + bins, items * bins + bins)).tocsr()
    lower: Any = np.concatenate([np.ones(items), np.full(bins, -np.inf)])
    upper: Any = np.concatenate([np.ones(items * bins), np.full(bins, np.inf)])
    most: Any = np.ones(items + bins)
    done = milp(
        np.concatenate([np.zeros(items * bins), np.ones(bins)]),
        integrality=np.concatenate([np.ones(items * bins), np.zeros(bins)]),
        bounds=Bounds(0, upper),
        constraints=LinearConstraint(matrix, lower, most),
        options={"node_limit": _NODES},
    )
    if done.x is None:
        raise PlanError(f"placement: no way was found to pack {items} groups into {bins} accelerators")
    device = np.full(len(groups), -1)
    device[only] = done.x[: items * bins].reshape(items, bins).argmax(axis=1)
    used = np.bincount(device[only], groups.size[only], minlength=bins)
    over = np.maximum(used - groups.memory * (1 + 1e-9), 0).sum()
    if over > 0:
        raise PlanError(
            f"placement: nodes that only accelerators can run cannot be packed into {bins} accelerators of "
            f"{groups.memory:.0f} bytes: {over:.0f} bytes short"
            + ("" if done.status == 0 else " in the best packing that was found")
        )
    return device
