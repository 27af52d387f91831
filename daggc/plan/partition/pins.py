"""The user's wishes: which module goes on which device, and which not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from daggc.errors import PlanError
from daggc.ir.graph import Node
from daggc.plan.device import Cluster
from daggc.plan.outline import unit_of


@dataclass(frozen=True)
class Wishes:
    """What the user wants of some nodes.

    Attributes:
        pins: for each node, the index of the one device it may be on, or None if there are several.
        allowed: [n, D] whether each node may be on each device.
    """

    pins: tuple[int | None, ...]
    allowed: np.ndarray

    def ordered(self, places: Sequence[int]) -> Wishes:
        """The wishes of the nodes at these places, in this order."""
        return Wishes(tuple(self.pins[place] for place in places), self.allowed[list(places)])


def resolve_pins(nodes: Sequence[Node], pins: Mapping[str, str], cluster: Cluster) -> Wishes:
    """Where each node may be.

    Args:
        pins: pattern of module paths (``blocks.0``, ``blocks.[12]``, ``*.attn``) -> names of devices, separated
            by commas. ``cpu:1`` is where the modules shall be (on one of several that are named); ``!cpu:1``,
            where they shall not be. A pattern takes in the modules inside those it matches. Of several that
            match, the last that says where counts, and all that say where not.

    Raises:
        PlanError: a device does not exist, a pattern matches no module, or a module is left without a device.
    """
    paths = [node.path for node in nodes]
    wanted: dict[str, np.ndarray] = {}
    banned: dict[str, np.ndarray] = {}
    known = dict.fromkeys(paths)
    for pattern, names in pins.items():
        given = [name.strip() for name in names.split(",")]
        matched = [path for path in known if fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")]
        own = _devices([name for name in given if not name.startswith("!")], cluster)
        not_there = _devices([name.removeprefix("!") for name in given if name.startswith("!")], cluster)
        if not matched:
            units = [unit for unit in dict.fromkeys(map(unit_of, paths)) if unit]
            shown = ", ".join(units[:12]) + (", ..." if len(units) > 12 else "")
            raise PlanError(f"the pin {pattern!r} -> {names} matches no module that computes; there are {shown}")
        for path in matched:
            if own.any():
                wanted[path] = own
            banned[path] = banned.get(path, False) | not_there
    everywhere = np.ones(len(cluster.devices), bool)
    by_path = {path: wanted.get(path, everywhere) & ~banned.get(path, ~everywhere) for path in known}
    for path, own in by_path.items():
        if not own.any():
            raise PlanError(f"the pins leave {path!r} no device; there are {', '.join(cluster.names)}")
    bound = {path: int(np.flatnonzero(own)[0]) for path, own in by_path.items() if own.sum() == 1 and path in banned}
    allowed = np.array([by_path[path] for path in paths]).reshape(len(paths), len(cluster.devices))
    return Wishes(tuple(bound.get(path) for path in paths), allowed)


def _devices(names: Sequence[str], cluster: Cluster) -> np.ndarray:
    """[D] whether each device is one of these."""
    for name in names:
        cluster.device(name)  # an error names those there are
    return np.array([name in names for name in cluster.names], bool)
