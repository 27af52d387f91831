"""Cutting the forward graph into stages: dynamic programming over a line of the nodes, and list scheduling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from daggc.ir.graph import Graph
from daggc.plan.device import Cluster
from daggc.plan.partition.choose import choose
from daggc.plan.partition.cut import Alternative, Cut, Segment, check_pins, device_loads, memory_of
from daggc.plan.partition.order import planning_order
from daggc.plan.partition.pins import resolve_pins
from daggc.plan.partition.sketch import Predicted
from daggc.plan.partition.work import TRAINED, Work, work_of

__all__ = [
    "Alternative",
    "Cut",
    "Partition",
    "Predicted",
    "Segment",
    "Work",
    "device_loads",
    "memory_of",
    "partition",
]


@dataclass(frozen=True)
class Partition:
    """A cut, what it was judged by, and the stage of each forward node by its first output's name."""

    work: Work
    cut: Cut
    stage_of: Mapping[str, int]
    predicted: Predicted


def partition(
    joint: Graph,
    primal: Graph,
    cluster: Cluster,
    *,
    stages: int | None = None,
    pins: Mapping[str, str] | None = None,
    microbatches: int = 1,
    trained: float = TRAINED,
    how: str = "auto",
    turns: Sequence[int] | None = None,
    in_flight: int | None = None,
) -> Partition:
    """Cut ``primal`` into stages so that a step is predicted to be fast, within every device's memory.

    Args:
        joint: what ``differentiate`` made of ``primal``, or ``primal`` itself for inference.
        stages, pins: what the user overrides; see :func:`~daggc.plan.partition.cut.cut_work` and
            :func:`~daggc.plan.partition.pins.resolve_pins`.
        trained: bytes that live with a trained parameter for each byte of its own.
        how: ``line`` (segments of a line of the nodes, each device as busy as the others), ``list`` (list
            scheduling: what is independent runs at the same time), or ``auto``, the one that is predicted faster.
        turns: the device of each stage of a line, by index, in place of ``stages``.
        in_flight: the most microbatches of which a device holds residuals; by default what 1F1B holds.

    Raises:
        PlanError: nothing fits, or an override cannot be kept.
    """
    wishes = resolve_pins(primal.nodes, pins or {}, cluster)
    order = planning_order(primal, wishes.pins)
    place = {node.outputs[0].name: index for index, node in enumerate(primal.nodes)}
    wishes = wishes.ordered([place[node.outputs[0].name] for node in order])
    work = work_of(joint, primal, order, trained)
    check_pins(work, wishes, cluster)
    chosen = choose(primal, work, cluster, wishes, stages, microbatches, how, turns, in_flight)
    stage_of = {
        chosen.work.nodes[position].outputs[0].name: number
        for number, segment in enumerate(chosen.cut.segments)
        for position in range(segment.start, segment.stop)
    }
    return Partition(chosen.work, chosen.cut, stage_of, chosen.predicted)
