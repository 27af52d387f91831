"""Groups on devices with their loads, kept up to date move by move: what the local search is made of.

Plain lists and loops: a move touches a handful of numbers, for which NumPy would be slower.
"""

from __future__ import annotations

from daggc.plan.maxload.groups import Groups
from daggc.plan.maxload.problem import Ints


class State:
    """An assignment that groups can be moved in.

    Attributes:
        at: the device of each group.
        loads: of each device.
        used: bytes on each device.
    """

    def __init__(self, groups: Groups, device: Ints):
        self.seconds: list[list[float]] = groups.seconds().tolist()
        self.size: list[float] = groups.size.tolist()
        self.accelerators = groups.accelerators
        self.room = [groups.memory * (1 + 1e-12)] * groups.accelerators + [float("inf")] * groups.cpus
        self.owns: list[list[int]] = [[] for _ in range(len(groups))]
        self.reads: list[list[int]] = [[] for _ in range(len(groups))]
        self.owner, self.cost = list(groups.owner), list(groups.cost)
        self.readers = [len(readers) for readers in groups.readers]
        for net, (owner, readers) in enumerate(zip(groups.owner, groups.readers, strict=True)):
            self.owns[owner].append(net)
            for reader in readers:
                self.reads[reader].append(net)
        self.ends = [(owner, *readers) for owner, readers in zip(groups.owner, groups.readers, strict=True)]
        self.near = [self._near(g) for g in range(len(groups))]
        self._place(device.tolist())

    def _near(self, g: int) -> list[int]:
        """The groups that share a net with this one; those of small nets come several times."""
        nets = self.owns[g] + self.reads[g]
        return [other for net in nets if len(self.ends[net]) <= 8 for other in self.ends[net] if other != g]

    def _place(self, at: list[int]) -> None:
        devices = len(self.room)
        self.at = at
        self.loads = [0.0] * devices
        self.used = [0.0] * devices
        for g, d in enumerate(at):
            self.loads[d] += self.seconds[g][d]
            self.used[d] += self.size[g]
        # readers_on[net][d]: how many readers of a net are on a device.
        self.readers_on: list[list[int]] = []
        for ends, cost in zip(self.ends, self.cost, strict=True):
            here = [0] * devices
            for reader in ends[1:]:
                here[at[reader]] += 1
            self.readers_on.append(here)
            home = at[ends[0]]
            for d in range(self.accelerators):
                if (here[d] < len(ends) - 1) if d == home else here[d]:
                    self.loads[d] += cost

    def after(self, g: int, to: int) -> tuple[float, float]:
        """The loads of the device that a group leaves and of the one that it joins; no other device's load changes."""
        of = self.at[g]
        left = self.loads[of] - self.seconds[g][of]
        joined = self.loads[to] + self.seconds[g][to]
        pays_of, pays_to = of < self.accelerators, to < self.accelerators
        readers_on, cost, readers, owner, at = self.readers_on, self.cost, self.readers, self.owner, self.at
        for net in self.owns[g]:
            here = readers_on[net]
            if pays_of:
                if here[of] < readers[net]:
                    left -= cost[net]
                if here[of]:
                    left += cost[net]
            if pays_to:
                if here[to]:
                    joined -= cost[net]
                if here[to] < readers[net]:
                    joined += cost[net]
        for net in self.reads[g]:
            here = readers_on[net]
            home = at[owner[net]]
            if pays_of:
                if of == home:
                    if here[of] == readers[net]:
                        left += cost[net]
                elif here[of] == 1:
                    left -= cost[net]
            if pays_to:
                if to == home:
                    if here[to] + 1 == readers[net]:
                        joined -= cost[net]
                elif not here[to]:
                    joined += cost[net]
        return left, joined

    def move(self, g: int, to: int, left: float, joined: float) -> None:
        """Move a group; the loads are those that ``after`` gave."""
        of = self.at[g]
        self.loads[of], self.loads[to] = left, joined
        self.used[of] -= self.size[g]
        self.used[to] += self.size[g]
        self.at[g] = to
        for net in self.reads[g]:
            here = self.readers_on[net]
            here[of] -= 1
            here[to] += 1
