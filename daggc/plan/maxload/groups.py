"""What is placed: groups of nodes that share a device, and the nets of values that pass between groups.

A net is the output of one group (its owner) with the groups that read it. Where its groups sit on several devices, the
owner's accelerator pays its cost once, and so does every other accelerator with a reader. Moving a group therefore
changes only the load of the device that it leaves and of the device that it joins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from daggc.plan.maxload.problem import NO_COLOUR, Bools, Floats, Ints, Problem, transfer_of_nodes


@dataclass(frozen=True, eq=False)
class Groups:
    """A placement problem over groups.

    Args:
        of_node: int[nodes], the group of each node.
        accelerator: float[groups], time on an accelerator; infinite where one cannot run or hold the group.
        cpu: float[groups], time on a CPU core; infinite where there is none.
        size: float[groups], bytes.
        owner: the owner of each net.
        readers: the other groups of each net, sorted; never empty.
        cost: the transfer time of each net; positive.
        accelerators, cpus, memory: as in Problem.
    """

    of_node: Ints
    accelerator: Floats
    cpu: Floats
    size: Floats
    owner: tuple[int, ...]
    readers: tuple[tuple[int, ...], ...]
    cost: tuple[float, ...]
    accelerators: int
    cpus: int
    memory: float

    def __len__(self) -> int:
        return len(self.size)

    @property
    def devices(self) -> int:
        """How many accelerators and CPU cores there are."""
        return self.accelerators + self.cpus

    def seconds(self) -> Floats:
        """The time of each group on each device without transfers, float[groups, devices]; infinite: never there."""
        return np.concatenate(
            [
                np.repeat(self.accelerator[:, None], self.accelerators, axis=1),
                np.repeat(self.cpu[:, None], self.cpus, axis=1),
            ],
            axis=1,
        )


def group(problem: Problem) -> Groups:
    """Merge the nodes of each colour; every other node is a group of its own."""
    label = np.arange(problem.nodes)
    coloured = problem.colour != NO_COLOUR
    _, first, inverse = np.unique(problem.colour[coloured], return_index=True, return_inverse=True)
    label[coloured] = np.flatnonzero(coloured)[first][inverse]
    cost = transfer_of_nodes(problem)
    readers: dict[int, set[int]] = {}
    for source, target in problem.edges.tolist():
        if cost[source] > 0 and source != target:
            readers.setdefault(source, set()).add(target)
    nodes = Groups(
        of_node=np.arange(problem.nodes),
        accelerator=np.where(problem.supported, problem.accelerator_seconds, np.inf),
        cpu=problem.cpu_seconds if problem.cpus else np.full(problem.nodes, np.inf),
        size=problem.size,
        owner=tuple(readers),
        readers=tuple(tuple(sorted(targets)) for targets in readers.values()),
        cost=tuple(float(cost[source]) for source in readers),
        accelerators=problem.accelerators,
        cpus=problem.cpus,
        memory=problem.memory,
    )
    return merge(nodes, label)


def merge(groups: Groups, label: Ints) -> Groups:
    """Groups of groups: those with one label (int[groups]) become one. Nets with the same ends become one."""
    _, inverse = np.unique(label, return_inverse=True)
    count = int(inverse.max()) + 1 if len(inverse) else 0
    nets: dict[tuple[int, tuple[int, ...]], float] = {}
    of = inverse.tolist()
    for owner, readers, cost in zip(groups.owner, groups.readers, groups.cost, strict=True):
        at = of[owner]
        if others := {of[reader] for reader in readers} - {at}:
            key = at, tuple(sorted(others))
            nets[key] = nets.get(key, 0.0) + cost
    size = _sums(groups.size, inverse, count)
    accelerator = _sums(groups.accelerator, inverse, count)
    if not groups.accelerators:
        accelerator = np.full(count, np.inf)
    return Groups(
        of_node=inverse[groups.of_node],
        accelerator=np.where(size <= groups.memory, accelerator, np.inf),
        cpu=_sums(groups.cpu, inverse, count),
        size=size,
        owner=tuple(owner for owner, _ in nets),
        readers=tuple(readers for _, readers in nets),
        cost=tuple(nets.values()),
        accelerators=groups.accelerators,
        cpus=groups.cpus,
        memory=groups.memory,
    )


def _sums(values: Floats, label: Ints, count: int) -> Floats:
    total = np.zeros(count)
    np.add.at(total, label, values)
    return total


def joined_by(groups: Groups, limit: float) -> Ints:
    """Labels of groups that share a device in every assignment whose value is at most ``limit``, int[groups].

    A net that costs more than the limit is paid by no accelerator, so its owner and a reader are on one device, or on
    two CPU cores.
    """
    apart = groups.cpus > 1
    pairs = [
        (owner, reader)
        for owner, readers, cost in zip(groups.owner, groups.readers, groups.cost, strict=True)
        if cost > limit
        for reader in readers
        if not apart or groups.cpu[owner] > limit or groups.cpu[reader] > limit
    ]
    return components(len(groups), pairs)


def components(count: int, pairs: list[tuple[int, int]]) -> Ints:
    """Labels of the connected parts of a graph."""
    if not pairs:
        return np.arange(count)
    left, right = np.array(pairs).T
    links = coo_matrix((np.ones(len(left)), (left, right)), shape=(count, count))
    return connected_components(links, directed=False)[1].astype(int)


def loads_of(groups: Groups, device: Ints) -> Floats:
    """The load of every device, float[devices], of groups on devices (int[groups])."""
    loads = np.zeros(groups.devices)
    np.add.at(loads, device, groups.seconds()[np.arange(len(groups)), device])
    at = device.tolist()
    for owner, readers, cost in zip(groups.owner, groups.readers, groups.cost, strict=True):
        home = at[owner]
        others = {at[reader] for reader in readers} - {home}
        if others and home < groups.accelerators:
            loads[home] += cost
        for other in others:
            if other < groups.accelerators:
                loads[other] += cost
    return loads


def fits(groups: Groups, device: Ints) -> Bools:
    """Whether what each accelerator holds fits its memory, bool[accelerators]."""
    used = np.zeros(groups.devices)
    np.add.at(used, device, groups.size)
    return used[: groups.accelerators] <= groups.memory * (1 + 1e-12)
