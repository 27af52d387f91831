"""The user's wishes: which module goes on which device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from daggc.errors import PlanError
from daggc.ir.graph import Node
from daggc.plan.device import Cluster
from daggc.plan.outline import unit_of


def resolve_pins(nodes: Sequence[Node], pins: Mapping[str, str], cluster: Cluster) -> list[int | None]:
    """The index of the device that each node is pinned to, or None.

    Args:
        pins: pattern of module paths (``blocks.0``, ``blocks.[12]``, ``*.attn``) -> name of a device. A pattern
            takes in the modules inside those it matches. Of several that match, the last counts.

    Raises:
        PlanError: a device does not exist, or a pattern matches no module.
    """
    paths = [node.path for node in nodes]
    by_path: dict[str, int | None] = dict.fromkeys(paths)
    for pattern, name in pins.items():
        cluster.device(name)
        matched = [path for path in by_path if fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")]
        if not matched:
            units = [unit for unit in dict.fromkeys(map(unit_of, paths)) if unit]
            shown = ", ".join(units[:12]) + (", ..." if len(units) > 12 else "")
            raise PlanError(f"the pin {pattern!r} -> {name} matches no module that computes; there are {shown}")
        by_path.update(dict.fromkeys(matched, cluster.names.index(name)))
    return [by_path[path] for path in paths]
