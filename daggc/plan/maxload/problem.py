"""The max-load placement problem: nodes of a DAG on accelerators and CPU cores, the busiest device least loaded.

"Efficient Algorithms for Device Placement of DNN Graph Operators", NeurIPS 2020: in a pipeline the slowest device
sets the pace, so the load of the busiest device is the time between two samples.

Devices are numbered: accelerators 0 .. accelerators - 1, CPU cores from there on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from daggc.errors import PlanError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NO_COLOUR = -1


@dataclass(frozen=True, eq=False)
class Problem:
    """Nodes, the values that pass between them, and the devices.

    Args:
        accelerator_seconds: float[nodes], time on an accelerator; any one unit of time will do throughout.
        cpu_seconds: float[nodes], time on a CPU core.
        size: float[nodes], bytes that a node holds on its accelerator; CPU cores have room for everything.
        supported: bool[nodes], whether an accelerator can run the node.
        colour: int[nodes]; nodes of one colour share a device, NO_COLOUR binds to nobody.
        edges: int[edges, 2], producer and consumer.
        transfer_seconds: float[edges], time to move the producer's output between an accelerator and the host. A
            producer has one output: where its edges differ, the largest counts.
        accelerators: how many, all alike.
        cpus: how many CPU cores, all alike.
        memory: bytes of one accelerator.

    Raises:
        PlanError: arrays that do not fit each other, negative or missing numbers, edges to nowhere.
    """

    accelerator_seconds: Floats
    cpu_seconds: Floats
    size: Floats
    supported: Bools
    colour: Ints
    edges: Ints
    transfer_seconds: Floats
    accelerators: int
    cpus: int
    memory: float

    def __post_init__(self) -> None:
        nodes, edges = len(self.accelerator_seconds), len(self.edges)
        shapes = {
            "cpu_seconds": (nodes,),
            "size": (nodes,),
            "supported": (nodes,),
            "colour": (nodes,),
            "edges": (edges, 2),
            "transfer_seconds": (edges,),
        }
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise PlanError(f"placement: {name} must have shape {shape}, got {getattr(self, name).shape}")
        for name in ("accelerator_seconds", "cpu_seconds", "size", "transfer_seconds"):
            numbers = getattr(self, name)
            if not (numbers >= 0).all():
                raise PlanError(f"placement: {name} must not be negative, got {numbers[~(numbers >= 0)][0]}")
        if edges and not ((self.edges >= 0) & (self.edges < nodes)).all():
            raise PlanError(f"placement: edges must name nodes 0 to {nodes - 1}")
        if self.accelerators < 0 or self.cpus < 0 or not self.accelerators + self.cpus or not self.memory >= 0:
            raise PlanError(
                "placement: at least one device is needed and no number may be negative, got "
                f"{self.accelerators} accelerators of {self.memory} bytes and {self.cpus} CPU cores"
            )

    @property
    def devices(self) -> int:
        """How many accelerators and CPU cores there are."""
        return self.accelerators + self.cpus

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return len(self.accelerator_seconds)


@dataclass(frozen=True, eq=False)
class Assignment:
    """A device for every node.

    Args:
        device: int[nodes].
        loads: float[devices].
        value: the largest load.
        bound: no assignment has a smaller value.
        how: what found it, and what proved the bound.
    """

    device: Ints
    loads: Floats
    value: float
    bound: float
    how: str

    @property
    def gap(self) -> float:
        """How far above the best the value can be, as a fraction of the bound; 0 is proved optimal."""
        if self.value <= self.bound:
            return 0.0
        return self.value / self.bound - 1 if self.bound > 0 else float("inf")


def transfer_of_nodes(problem: Problem) -> Floats:
    """The time to move each node's output, float[nodes]; zero for a node that nobody reads."""
    cost = np.zeros(problem.nodes)
    np.maximum.at(cost, problem.edges[:, 0], problem.transfer_seconds)
    return cost


def evaluate(problem: Problem, device: Ints) -> Floats:
    """The load of every device, float[devices].

    An accelerator's load is the time of its nodes, plus the transfer of each of its nodes' outputs that another device
    reads (once), plus the transfer of each output of another device that it reads (once). A CPU core pays no transfer.
    """
    loads = np.zeros(problem.devices)
    on_accelerator = device < problem.accelerators
    np.add.at(loads, device, np.where(on_accelerator, problem.accelerator_seconds, problem.cpu_seconds))
    cost = transfer_of_nodes(problem)
    source, target = problem.edges.T
    crossing = device[source] != device[target]
    leaving = np.unique(source[crossing & on_accelerator[source]])
    np.add.at(loads, device[leaving], cost[leaving])
    entering = crossing & on_accelerator[target]
    pairs = np.unique(np.stack([source[entering], device[target[entering]]], axis=1), axis=0)
    np.add.at(loads, pairs[:, 1], cost[pairs[:, 0]])
    return loads


def violations(problem: Problem, device: Ints) -> list[str]:
    """What makes an assignment impossible, in words; empty when it can be run."""
    if device.shape != (problem.nodes,):
        return [f"{problem.nodes} nodes need a device each, got shape {device.shape}"]
    if not ((device >= 0) & (device < problem.devices)).all():
        return [f"devices are 0 to {problem.devices - 1}, got {device.min()} to {device.max()}"]
    found = []
    on_accelerator = device < problem.accelerators
    if (astray := np.flatnonzero(on_accelerator & ~problem.supported)).size:
        found.append(f"{astray.size} nodes that accelerators cannot run are on one, such as node {astray[0]}")
    used = np.bincount(device[on_accelerator], problem.size[on_accelerator], minlength=problem.accelerators)
    found += [
        f"accelerator {k} holds {used[k]:.0f} bytes of {problem.memory:.0f}"
        for k in np.flatnonzero(used > problem.memory * (1 + 1e-12))
    ]
    for colour in np.unique(problem.colour[problem.colour != NO_COLOUR]):
        if (devices := np.unique(device[problem.colour == colour])).size > 1:
            found.append(f"colour {colour} is on devices {', '.join(map(str, devices))}")
    return found
