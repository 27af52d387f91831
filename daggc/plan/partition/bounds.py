"""Times that no placement can beat, and so how far from the best an answer can be at most.

Both bounds leave out transfers and memory, so they hold for every placement, and are not always reached.
"""

from __future__ import annotations

import numpy as np

from daggc.ir.graph import Graph
from daggc.plan.cost import Costs
from daggc.plan.device import Cluster
from daggc.plan.partition.work import Work

_STEPS = 60  # of the ascent on the dual


def work_bound(work: Work, cluster: Cluster) -> float:
    """Seconds that the busiest device of any placement is busy for one batch at least.

    The linear relaxation of the assignment, in which nodes may be divided over devices; or the largest node, which
    is not divided, where it is fastest. By duality every choice of weights ``y`` of the devices, not negative and
    of sum 1, gives a bound: the sum over nodes of their least ``y[d] * seconds[node, d]``. Devices whose speeds
    differ by one factor for all nodes have the best weights at once, in proportion to their speeds; others after
    a few steps uphill.
    """
    seconds = np.stack([work.seconds(device) for device in cluster.devices], axis=1)
    if not len(seconds):
        return 0.0
    speeds = 1 / np.maximum(seconds.sum(axis=0), 1e-30)
    weights = speeds / speeds.sum()
    best = 0.0
    step = 0.5
    for _ in range(_STEPS if len(set(map(_rates, cluster.devices))) > 1 else 1):
        priced = seconds * weights
        where = priced.argmin(axis=1)
        best = max(best, float(priced[np.arange(len(where)), where].sum()))
        load = np.bincount(where, seconds[np.arange(len(where)), where], len(weights))  # the gradient
        weights = weights * np.exp(step * (load / max(load.max(), 1e-30) - 1))
        weights /= weights.sum()
        step *= 0.95
    return max(best, float(seconds.min(axis=1).max()))


def _rates(device: object) -> str:
    """What a device's speed depends on."""
    return str({name: value for name, value in vars(device).items() if name not in ("name", "memory", "host")})


def latency_bound(joint: Graph, work: Work, cluster: Cluster) -> float:
    """Seconds from a batch's input to its last result at least: the longest path, or all work spread evenly.

    Every node of the path takes what it takes on the device that is fastest for it; one task a phase has its
    overhead.
    """
    costs = work.costs if len(work.costs.flops) == len(joint.nodes) else Costs.of(joint.nodes)
    fastest = np.min([costs.seconds(device) for device in cluster.devices], axis=0).tolist()
    ends: dict[str, float] = {}
    longest = 0.0
    for node, seconds in zip(joint.nodes, fastest, strict=True):
        end = seconds + max((ends.get(value.name, 0.0) for value in node.inputs), default=0.0)
        ends.update((value.name, end) for value in node.outputs)
        longest = max(longest, end)
    overhead = work.passes * min(device.overhead for device in cluster.devices)
    return max(longest + overhead, work_bound(work, cluster))
