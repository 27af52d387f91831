"""What of a joint graph the backward computes again, as a plan wants it."""

from __future__ import annotations

from collections.abc import Mapping

from daggc.errors import PlanError
from daggc.ir.graph import Graph, Node
from daggc.passes.remat import LEVELS, rematerialize
from daggc.plan.outline import origin_of, unit_of


def recomputing(joint: Graph, primal: Graph, level: str, stage_of: Mapping[str, int] | None = None) -> Graph:
    """The joint graph with forward values computed again in the backward, module by module.

    A module (a block: its path down to its first number) keeps what enters it and, with ``cheap``, what is dear to
    compute; a stage computes nothing of another stage again.

    Args:
        level: ``none``, or one of :data:`daggc.passes.remat.LEVELS`.
        stage_of: first output name of each forward node -> stage; without it, all is one stage.

    Raises:
        PlanError: there is no such level.
    """
    if level == "none":
        return joint
    if level not in LEVELS:
        raise PlanError(f"recomputation is one of none, {', '.join(LEVELS)} or auto, got {level!r}")
    numbers: dict[tuple[int, str], int] = {}
    groups: dict[str, int] = {}
    stage_of = stage_of or {}
    for node in primal.nodes:
        name = node.outputs[0].name
        groups[name] = numbers.setdefault((stage_of.get(name, 0), unit_of(node.path)), len(numbers))

    def group_of(node: Node) -> int:
        return groups.get(origin_of(node), len(numbers))

    return rematerialize(joint, {port.ref for port in primal.outputs}, group_of, LEVELS[level])
