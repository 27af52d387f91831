"""What running a step on Dask's workers takes beside its tasks: time, and memory of processes."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from daggc.plan.device import Cluster
from daggc.plan.simulate import Runtime
from daggc.runtime.channel.direct import INSIDE
from daggc.runtime.resident import AHEAD

_COLD = 4.0  # times a hop in a chain of tasks that do nothing takes one in a step (fitted, as in simulate/placed.py)
_LANE = 8.0  # times the handling of a task is what a lane takes in a step, on the client and in event loops (fitted)
# What a worker holds beside its tensors, fitted on 70 processes: glibc needs room to align a tensor, and what a tensor
# leaves is too small for the next one of its size where small objects have settled beside it.
_SLACK = 1.05  # bytes for each byte of tensors, at the peak of a step
_HOLES, _MOST_HOLES = 0.05, 0.5  # bytes for each byte that a step allocates; at most for each byte at the peak
_PROCESS = 3e6  # bytes to run one more program


def runtime_of(cluster: Cluster, lanes: bool) -> Runtime:
    """What Dask takes beside the tasks of a step.

    Before the first task of a step, its update waits for a task that says that all devices have ended, and the next
    step waits for the update: two messages. In lanes, a step is a task on each worker, and waits for the one before it
    there alone. What a process holds was measured, on settings as local_workers has them.
    """
    held = Runtime(barrier=True, slack=_SLACK, holes=_HOLES, most_holes=_MOST_HOLES, process=_PROCESS, ahead=AHEAD)
    if lanes:
        begin = median(device.overhead + device.hop for device in cluster.devices)
        lane = _LANE * median(device.handling for device in cluster.devices)
        return replace(held, begin=begin, per_device=lane, in_place=True, whole_results=False, shares=INSIDE)
    message = _COLD * median(device.hop for device in cluster.devices)
    return replace(held, begin=2 * message, message=message, versions=2)
