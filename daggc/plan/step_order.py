"""The order of a step's tasks: the schedule of its stages, and what keeps a device to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from daggc.ir.graph import Graph
from daggc.plan.cost import graph_seconds
from daggc.plan.device import Cluster
from daggc.plan.part import Part
from daggc.plan.schedule import BACKWARD, FORWARD, PHASES, SPLIT_BACKWARD, WEIGHT_GRAD, Schedule, Task, schedule_named
from daggc.plan.schedule.replicas import replicated
from daggc.plan.schedule.tasks import Feeds, chain

HOLD_BACK = ("zb-1p", "zb-2p", "zb-h2", "zb-v")  # schedules in which a weight gradient may run later than it could


def schedule_of(
    name: str, replicas: Sequence[tuple[str, ...]], microbatches: int, main: Graph, options: Mapping[str, Any]
) -> Schedule:
    """The schedule of a name for the stages that a graph of calls has.

    Args:
        replicas: the devices of each stage.
        main: what ``outline`` gave for one microbatch.
        options: see :class:`daggc.plan.schedule.Options`.
    """
    numbers: dict[str, int] = {}
    devices = [[numbers.setdefault(device, len(numbers)) for device in own] for own in replicas]
    feeds = stage_feeds(main, len(replicas))
    if feeds != chain(len(replicas)):
        options = {**options, "feeds": feeds}
    # a model in one stage has no weight gradients as tasks of their own: nothing else waits for its cotangents
    split = name in SPLIT_BACKWARD or any(node.attrs["phase"] == WEIGHT_GRAD for node in main.nodes)
    return replicated(schedule_named(name), devices, microbatches, split, **options)


def stage_feeds(main: Graph, stages: int) -> Feeds:
    """For each stage, the stages whose forward results its forward reads."""
    makers = {
        value.name: int(node.attrs["stage"])
        for node in main.nodes
        if node.attrs["phase"] == FORWARD
        for value in node.outputs
    }
    feeds: list[set[int]] = [set() for _ in range(stages)]
    for node in main.nodes:
        if node.attrs["phase"] == FORWARD:
            feeds[int(node.attrs["stage"])].update(makers[v.name] for v in node.inputs if v.name in makers)
    return tuple(tuple(sorted(own)) for own in feeds)


def held_back(schedule: Schedule) -> dict[Task, tuple[Task, ...]]:
    """Tasks that wait for others of their device beside their inputs, so that its order is kept.

    A forward waits for the backward of its stage before it, so that no more microbatches are in flight. A weight
    gradient, which could always run at once, waits for the forward or backward before it where the schedule holds it
    back on purpose; a device of the others takes one when it has nothing else to do.
    """
    edges: dict[Task, tuple[Task, ...]] = {}
    for order in schedule.orders:
        latest: dict[int, Task] = {}
        before: Task | None = None
        for task in order:
            if task.phase == WEIGHT_GRAD:
                if schedule.name in HOLD_BACK and before != replace(task, phase=BACKWARD) and before is not None:
                    edges[task] = (before,)
                continue
            before = task
            if task.phase == BACKWARD:
                latest[task.stage] = task
            elif task.stage in latest:
                edges[task] = (latest[task.stage],)
    return edges


def stage_times(part: Part, devices: Sequence[str], cluster: Cluster) -> dict[str, Any]:
    """Seconds of each phase of each stage for one microbatch, and of what goes from stage to stage.

    Args:
        devices: where each stage runs; the first replica of those that have several.
    """
    times = {phase: [0.0] * len(devices) for phase in PHASES}
    made: dict[str, int] = {}
    moved: dict[tuple[int, int], float] = {}
    for node in part.main.nodes:
        stage, phase = int(node.attrs["stage"]), str(node.attrs["phase"])
        times[phase][stage] += graph_seconds(part.bodies[str(node.attrs["callee"])], cluster.device(devices[stage]))
        for value in node.inputs:
            source = made.get(value.name, stage)
            if devices[source] != devices[stage]:
                moved[source, stage] = moved.get((source, stage), 0.0) + value.type.nbytes
        made.update((value.name, stage) for value in node.outputs)
    links = {(a, b): cluster.between(devices[a], devices[b]).seconds(nbytes) for (a, b), nbytes in moved.items()}
    return {"seconds": times, "transfer": links}
