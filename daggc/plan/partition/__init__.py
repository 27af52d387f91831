"""Cutting the forward graph into stages: memory-aware dynamic programming over a topological order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from daggc.ir.graph import Graph
from daggc.plan.device import Cluster
from daggc.plan.partition.cut import Alternative, Cut, Segment, cut_work, device_loads, memory_of
from daggc.plan.partition.order import planning_order
from daggc.plan.partition.pins import resolve_pins
from daggc.plan.partition.work import TRAINED, Work, work_of

__all__ = ["Alternative", "Cut", "Partition", "Segment", "Work", "device_loads", "memory_of", "partition"]


@dataclass(frozen=True)
class Partition:
    """A cut, what it was judged by, and the stage of each forward node by its first output's name."""

    work: Work
    cut: Cut
    stage_of: Mapping[str, int]


def partition(
    joint: Graph,
    primal: Graph,
    cluster: Cluster,
    *,
    stages: int | None = None,
    pins: Mapping[str, str] | None = None,
    microbatches: int = 1,
    trained: float = TRAINED,
) -> Partition:
    """Cut ``primal`` into stages so that the slowest device is as fast as can be, within every device's memory.

    Args:
        joint: what ``differentiate`` made of ``primal``, or ``primal`` itself for inference.
        stages, pins: what the user overrides; see :func:`cut_work` and :func:`resolve_pins`.
        trained: bytes that live with a trained parameter for each byte of its own.

    Raises:
        PlanError: nothing fits, or an override cannot be kept.
    """
    wishes = resolve_pins(primal.nodes, pins or {}, cluster)
    order = planning_order(primal, wishes)
    pin_of = {node.outputs[0].name: pin for node, pin in zip(primal.nodes, wishes, strict=True)}
    work = work_of(joint, primal, order, trained)
    cut = cut_work(work, cluster, [pin_of[node.outputs[0].name] for node in order], stages, microbatches)
    stage_of = {
        order[position].outputs[0].name: number
        for number, segment in enumerate(cut.segments)
        for position in range(segment.start, segment.stop)
    }
    return Partition(work, cut, stage_of)
