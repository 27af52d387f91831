"""Predictions corrected by what steps really took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from daggc.ir.graph import Graph, Program
from daggc.plan.cost import Costs, body_seconds
from daggc.plan.device import Cluster
from daggc.runtime.worker import Record

_FACTOR = (0.2, 5.0)  # beyond these a task was disturbed, or did not run as the graph says


@dataclass(frozen=True)
class MeasuredTask:
    """What tasks of one body took on one device.

    Attributes:
        body: the graph they ran.
        seconds: the median, from a task's first argument to its last op.
        count: tasks that were measured.
    """

    device: str
    body: Graph
    seconds: float
    count: int = 1


def measured_tasks(
    step: Graph, program: Program, records: Mapping[str, Sequence[Record]], skip: int = 1
) -> list[MeasuredTask]:
    """Records of a train step (:meth:`~daggc.runtime.train.TrainStep.records`) by device and body.

    Args:
        step: the placed graph of a step; its calls have the names that records have.
        skip: how many of the first runs of each task do not count: code is compiled in them, and memory mapped.
    """
    callees = {
        str(node.attrs.get("task") or node.attrs["callee"]): str(node.attrs["callee"])
        for node in step.nodes
        if node.op == "call"
    }
    times: dict[tuple[str, str], list[float]] = {}
    for device, own in records.items():
        runs: dict[str, int] = {}
        for record in sorted(own, key=lambda record: record.start):
            runs[record.name] = runs.get(record.name, 0) + 1
            if record.name in callees and runs[record.name] > skip:
                times.setdefault((device, callees[record.name]), []).append(record.end - record.start)
    return [
        MeasuredTask(device, program[callee], median(own), len(own)) for (device, callee), own in sorted(times.items())
    ]


def predicted_seconds(cluster: Cluster, task: MeasuredTask) -> float:
    """What a cluster predicts for a task's ops, without the overhead of the task."""
    return body_seconds(task.body, cluster.device(task.device))


def refined(cluster: Cluster, tasks: Iterable[MeasuredTask]) -> Cluster:
    """The cluster with times of exact nodes such that the tasks take what was measured.

    All nodes of a task are corrected by one factor; a node that is in several tasks by the mean of theirs, weighted
    with how long the tasks ran. The tasks may then be cut otherwise: their nodes keep their times.
    """
    sums: dict[str, dict[str, np.ndarray]] = {}  # device -> key -> (weight, weight times seconds)
    for task in tasks:
        device = cluster.device(task.device)
        costs = Costs.of(task.body.nodes)
        times = costs.seconds(device)
        if not times.sum() > 0:
            continue
        spent = task.seconds - device.argument * len(task.body.inputs)
        factor = min(max(spent / times.sum(), _FACTOR[0]), _FACTOR[1])
        alone = times / costs.slowdowns(device)  # the device's slowdown is applied to its profile
        weight = task.seconds * task.count
        own = sums.setdefault(task.device, {})
        for key, seconds in zip(costs.keys, alone, strict=True):
            own[key] = own.get(key, np.zeros(2)) + (weight, weight * factor * seconds)
    devices = []
    for device in cluster.devices:
        corrected = {key: float(total / weight) for key, (weight, total) in sums.get(device.name, {}).items()}
        devices.append(replace(device, profile={**device.profile, **corrected}) if corrected else device)
    return replace(cluster, devices=tuple(devices))
