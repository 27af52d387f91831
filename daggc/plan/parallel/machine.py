"""A cluster of equal devices, as many on each host: what parallel plans are made for, and what talking costs there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from daggc.errors import PlanError
from daggc.plan.device import Cluster, Link
from daggc.plan.parallel.kernels import Chip


@dataclass(frozen=True)
class Machine:
    """Equal devices, numbered so that those of one host follow each other.

    Attributes:
        devices: how many.
        per_host: how many on each host.
        within, between: links of two devices of one host, and of two hosts.
    """

    chip: Chip
    devices: int
    per_host: int
    within: Link
    between: Link

    def link(self, span: int) -> Link:
        """The slowest link among ``span`` devices that follow each other."""
        return self.within if span <= self.per_host else self.between

    def all_reduce(self, nbytes: float, count: int, link: Link) -> float:
        """Seconds in which ``count`` devices sum up what each has (a ring: each sends all but a part twice)."""
        if count < 2 or not nbytes:
            return 0.0
        return 2 * (count - 1) * (nbytes / count / link.bandwidth + link.latency)

    def send(self, nbytes: float, tensor: int, link: Link) -> float:
        """Seconds in which the devices that share a layer send a value to those that share the next one.

        Each has the whole value, so each sends a part of it, and the receivers gather the parts on their host.
        """
        part = nbytes / tensor
        gathered = (tensor - 1) * (part / self.within.bandwidth + self.within.latency)
        return link.latency + part / link.bandwidth + gathered if nbytes else 0.0


def machine_of(cluster: Cluster, **chip: float) -> Machine:
    """The machine that a cluster is.

    Args:
        chip: of :class:`~daggc.plan.parallel.kernels.Chip`, such as ``reached=0.7``.

    Raises:
        PlanError: devices differ, or hosts have different numbers of them.
    """
    first = cluster.devices[0]
    for device in cluster.devices:
        if replace(device, name=first.name, host=first.host) != first:
            raise PlanError(f"parallel plans are for equal devices; {device.name} is not like {first.name}")
    counts = Counter(device.host for device in cluster.devices)
    if len(set(counts.values())) > 1:
        raise PlanError(f"parallel plans are for hosts of equally many devices, got {dict(counts)}")
    per_host = counts[first.host] if first.host else len(cluster.devices)
    hosts = [device.host for device in cluster.devices]
    if len(counts) * per_host != sum(hosts[i] == hosts[i - i % per_host] for i in range(len(hosts))):
        raise PlanError("parallel plans are for devices in order of their hosts")
    names = cluster.names
    within = cluster.between(names[0], names[1]) if per_host > 1 else cluster.link
    between = cluster.between(names[0], names[per_host]) if len(counts) > 1 else cluster.link
    processors = 108 if first.kind == "cuda" else 0
    return Machine(Chip(first, **{"processors": processors, **chip}), len(names), per_host, within, between)  # pyright: ignore[reportArgumentType]
