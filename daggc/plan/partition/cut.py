"""Choosing a cut: which devices, which segments of the planning order, and why.

Three shapes are tried, and the one whose slowest device is fastest is taken.

* A line: segments 0, 1, ..., D-1 on devices 0, 1, ..., D-1.
* Around: 0, 1, ..., D-1 and then 0 again, when a parameter of the first segment is used again at the end (the
  embedding of a language model is often its head). The first device holds the parameter once and has two
  segments.
* Runs, for pins that contradict both: a segment for each run of nodes pinned to one device.

A device has to do at least 0.6 of its fair share of the model's FLOPs; where no cut allows that, a half, a
quarter, and then anything. Where a device more does not make the slowest one faster, it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise

import numpy as np

from daggc.errors import PlanError
from daggc.plan.device import Cluster
from daggc.plan.partition.chain import least_maximum, least_sum
from daggc.plan.partition.pins import Wishes
from daggc.plan.partition.segments import Points, Segments, candidate_points, gaps_of, positions_of
from daggc.plan.partition.work import Span, Work

FAIR = (0.6, 0.5, 0.25, 0.0)  # of a device's fair share, the least that it must do
SLACK = 1.02  # by which the slowest device may exceed the least load, for better balance and better places
STARTS = 40  # ends of the first segment that are tried, going around
TORN = 3  # parameters that a cut may go around for, and places to do so for one
_BETWEEN = 2e-3  # what a cut inside a module costs, as a part of the slowest device's load


@dataclass(frozen=True)
class Segment:
    """Positions ``start`` to ``stop`` of the planning order, on the device of this index."""

    start: int
    stop: int
    device: int


@dataclass(frozen=True)
class Alternative:
    """A cut that was considered.

    Attributes:
        seconds: load of its slowest device, None if there is none such.
        predicted: seconds of a step, by which cuts are compared.
    """

    description: str
    seconds: float | None
    reason: str = ""
    predicted: float | None = None


@dataclass(frozen=True)
class Cut:
    """The cut that was chosen.

    Attributes:
        segments: in planning order.
        seconds: load of the slowest device.
        fair: the part of a fair share that every device does at least.
        alternatives: what was considered, the chosen one first.
        notes: what a user should know.
        others: further lines that are possible.
    """

    segments: tuple[Segment, ...]
    seconds: float
    fair: float
    description: str
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()
    others: tuple[Cut, ...] = ()


def cut_work(
    work: Work,
    cluster: Cluster,
    wishes: Wishes,
    stages: int | None = None,
    microbatches: int = 1,
    turns: Sequence[int] | None = None,
) -> Cut:
    """Cut a work into segments on the devices of a cluster.

    Args:
        wishes: where each node may be, in planning order.
        stages: how many segments to make; by default as many as there are devices, if that helps.
        microbatches: that may be in flight; stages hold residuals of as many of them as 1F1B has in flight.
        turns: the device of each segment, by index.

    Raises:
        PlanError: the model does not fit the devices' memory (with what is short, in bytes), there are fewer
            places to cut than ``stages``, or the pins cannot be kept.
    """
    if stages is not None and stages < 1:
        raise PlanError(f"a plan has at least one stage, stages={stages} was asked for")
    pins = np.array([-1 if pin is None else pin for pin in wishes.pins], int)
    search = _Search(work, cluster, pins, wishes.allowed, microbatches, turns)
    stages = stages if turns is None else len(turns)
    most = stages or len(cluster.devices)
    notes: list[str] = []
    found: Cut | None = None
    for count in range(most, most - 1 if stages else 0, -1):
        cut = search.best(count)
        if found is None:
            found = cut
            if cut is None and count > 1 and not stages:
                notes.append(f"no cut for {count} devices keeps memory, pins and shared parameters; fewer are used")
        elif cut is not None and cut.seconds <= found.seconds * 1.01:
            notes.append(f"{count} of {most} devices are used: one more would not make the slowest one faster")
            found = cut
        else:
            break
        if found is not None and found.fair > 0:
            break
    if found is None:
        raise PlanError(_why_none(search, stages))
    if found.fair < 0.5 and len(found.segments) > 1:
        notes.append("no cut gives every device half of its fair share of the work")
    if len(found.segments) > 1 and not stages:
        search.best(1)
    others = _compared(search.considered, found)
    chosen = Alternative(found.description, found.seconds, "chosen")
    cuts = tuple(cut for cut in search.cuts.values() if cut.description != found.description)
    return replace(found, alternatives=(chosen, *others), notes=tuple(notes), others=cuts)


def _compared(considered: Sequence[Alternative], found: Cut) -> list[Alternative]:
    """What was not chosen, fastest first, and why not."""
    others = {other.description: other for other in considered if other.description != found.description}
    ranked = sorted(others.values(), key=lambda other: (other.seconds is None, other.seconds or 0.0))
    reasoned: list[Alternative] = []
    for other in ranked:
        reason = other.reason
        if other.seconds is not None:
            ratio = other.seconds / max(found.seconds, 1e-30) - 1
            reason = f"its slowest device takes {ratio:.0%} longer" if ratio > 0 else "leaves devices without work"
        reasoned.append(replace(other, reason=reason))
    return reasoned


@dataclass
class _Search:
    """The candidates for each number of devices; ``considered`` collects them for the explanation."""

    work: Work
    cluster: Cluster
    pins: np.ndarray
    allowed: np.ndarray
    microbatches: int
    turns: Sequence[int] | None = None
    considered: list[Alternative] = field(default_factory=list)
    cuts: dict[str, Cut] = field(default_factory=dict)

    def best(self, count: int) -> Cut | None:
        """The best cut on ``count`` devices that gives each as fair a share as can be had."""
        for fair in FAIR:
            found = [cut for cut in self.candidates(count, fair) if cut is not None]
            if found:
                best = min(found, key=lambda cut: cut.seconds)
                found.sort(key=lambda cut: -cut.seconds)  # of one description the fastest stays
                self.considered += [Alternative(cut.description, cut.seconds) for cut in found]
                self.cuts.update((cut.description, cut) for cut in found)
                return best
        return None

    def candidates(self, count: int, fair: float) -> Iterator[Cut | None]:
        for order in self.device_orders(count):
            line = self.line(order, self.work.spans, fair, "in a line")
            if line is None and count > 1:
                self.considered.append(Alternative(self.describe(order, "in a line"), None, self.obstacle(fair)))
            yield line
            if 1 < count <= len(self.cluster.devices):
                yield from self.around(order, fair)
        if fair == 0 and self.turns is None and (self.pins >= 0).any():
            runs = _runs(self.pins)
            if len(runs) > 1 and len(set(runs)) <= count:
                yield self.line(runs, self.work.spans, fair, "by runs of pinned modules")
                yield self.line(runs, (), fair, "by runs of pinned modules, parameters shared")
        if count > len(self.cluster.devices):
            (turns,) = self.device_orders(count)
            yield self.line(turns, (), fair, "by turns, parameters shared")

    def device_orders(self, count: int) -> list[list[int]]:
        """Sequences of devices to lay segments on: the cluster's own order and one that follows the pins."""
        devices = self.cluster.devices
        if self.turns is not None:
            return [list(self.turns)]
        if count > len(devices):
            return [[index % len(devices) for index in range(count)]]
        pinned = {
            int(pin): float(np.flatnonzero(self.pins == pin).mean()) for pin in np.unique(self.pins[self.pins >= 0])
        }
        if len(pinned) > count:
            return []
        fastest = sorted(range(len(devices)), key=lambda i: (i not in pinned, -devices[i].rate("gemm"), i))[:count]
        own = sorted(fastest)
        n = len(self.pins)
        by_pins = sorted(own, key=lambda i: (pinned.get(i, (own.index(i) + 0.5) * n / count), i))
        orders = [own] if by_pins == own else [own, by_pins]
        if not self.allowed[self.pins < 0].all():  # what may not come first may come later
            orders += [own[turn:] + own[:turn] for turn in range(1, count)]
        return orders

    def segments(self, spans: Sequence[Span]) -> Segments:
        device = self.cluster.devices[0]
        changes = np.flatnonzero(np.diff(self.pins)) + 1
        points = candidate_points(self.work, self.work.seconds(device), spans, changes.tolist())
        return Segments(self.work, self.cluster, points, self.allowed, self.microbatches)

    def least_shares(self, order: Sequence[int], fair: float) -> np.ndarray:
        """The share of the work that each segment has at least: a part of what would keep devices busy equally long.

        Three tenths of ten equal nodes are enough, however they are rounded.
        """
        speeds = np.array([1 / max(self.work.seconds(self.cluster.devices[i]).sum(), 1e-30) for i in order])
        return fair * (1 - 1e-9) * speeds / speeds.sum()

    def limited(self, segments: Segments, order: Sequence[int], fair: float, around: bool = False) -> list[np.ndarray]:
        """The load matrix of each segment of a line, infinite where memory, a pin or a fair share forbids it."""
        devices = [self.cluster.devices[index] for index in order]
        shares, least = segments.shares(), self.least_shares(order, fair)
        loads: list[np.ndarray] = []
        for j, (index, device) in enumerate(zip(order, devices, strict=True)):
            before = devices[j - 1] if j else None
            after = devices[j + 1] if j + 1 < len(devices) else (devices[0] if around else None)
            load = segments.loads(device, before, after)
            room = device.memory / order.count(index)
            bad = (segments.memory(len(order) - 1 - j + around) > room) | (segments.foreign(index) > 0)
            loads.append(np.where(bad | (shares < least[j]), np.inf, load))
        return loads

    def line(self, order: Sequence[int], spans: Sequence[Span], fair: float, shape: str) -> Cut | None:
        """Segments 0, 1, ... on the devices of ``order``, no cut within a span."""
        segments = self.segments(spans)
        end = len(segments.points.at) - 1
        if end < len(order):
            return None
        loads = self.limited(segments, list(order), fair)
        slowest = float(least_maximum(loads, np.array([0]))[0, end])
        if not np.isfinite(slowest):
            return None
        _, chosen = least_sum(_costs(loads, slowest, segments.points), 0, end)
        at = positions_of(segments.points, chosen)
        parts = tuple(Segment(a, b, i) for (a, b), i in zip(pairwise(at), order, strict=True))
        if len(spans) < len(self.work.spans) and not _together(parts, self.work.spans):
            return None
        return Cut(parts, self.loads_of(parts), fair, self.describe(order, shape))

    def describe(self, order: Sequence[int], shape: str) -> str:
        count = "1 stage" if len(order) == 1 else f"{len(order)} stages"
        return f"{count} {shape} ({', '.join(self.cluster.names[index] for index in order)})"

    def obstacle(self, fair: float) -> str:
        """What can stand against a line."""
        widest = max(self.work.spans, key=lambda span: span.uses[-1] - span.uses[0], default=None)
        limits = [f"has {widest.ref} in one place"] if widest else []
        limits += ["keeps the pins"] if not self.allowed.all() else []
        limits += ["fits memory", *([f"gives each device {fair:.0%} of a fair share"] if fair else [])]
        return f"no cut {', '.join(limits)}"

    def around(self, order: Sequence[int], fair: float) -> Iterator[Cut | None]:
        """The last segment on the first device again, for each choice of parameters that it comes back for.

        That is one of those with the widest gaps between its uses, and each of its gaps; or several, and the widest
        gap of each.
        """
        seconds = self.work.seconds(self.cluster.devices[0])
        torn = sorted(((gaps_of(span, seconds), span) for span in self.work.spans), key=lambda own: -own[0][0][0])
        torn = torn[:TORN]
        tries = [([span], [gap]) for gaps, span in torn for gap in gaps[:TORN]]
        for count in range(2, len(torn) + 1):
            tries += [([span for _, span in some], [gaps[0] for gaps, _ in some]) for some in combinations(torn, count)]
        for spans, gaps in tries:
            low, high = max(before for _, before, _ in gaps) + 1, min(after for _, _, after in gaps)
            if low < high:
                kept = [span for span in self.work.spans if span not in spans]
                yield self.wrapped(list(order), kept, (low, high), fair, ", ".join(span.ref for span in spans))

    def wrapped(
        self, order: list[int], spans: Sequence[Span], gap: tuple[int, int], fair: float, shared: str
    ) -> Cut | None:
        """The first cut at ``gap[0]`` or later, the last at ``gap[1]`` or earlier; the middle is a line."""
        segments = self.segments(spans)
        at = segments.points.at
        starts = np.flatnonzero((at >= gap[0]) & (at < gap[1]))
        ends = np.flatnonzero((at > gap[0]) & (at <= gap[1]))
        if len(starts) == 0 or len(ends) == 0:
            return None
        starts = np.unique(starts[np.linspace(0, len(starts) - 1, STARTS).astype(int)])
        middle = self.limited(segments, order, fair, around=True)[1:]
        inner = least_maximum(middle, starts)[:, ends]
        own = self.ends_of(segments, order, fair)[np.ix_(starts, ends)]
        slowest = np.maximum(inner, own)
        least = float(slowest.min())
        if not np.isfinite(least):
            return None
        balance = np.where(slowest <= least * SLACK, own**2 + inner**2, np.inf)
        first, last = np.unravel_index(int(balance.argmin()), balance.shape)
        _, chosen = least_sum(
            _costs(middle, float(slowest[first, last]), segments.points), int(starts[first]), int(ends[last])
        )
        edges = (0, *positions_of(segments.points, chosen), len(self.work.nodes))
        parts = tuple(Segment(a, b, i) for (a, b), i in zip(pairwise(edges), [*order, order[0]], strict=True))
        name = self.cluster.names[order[0]]
        description = self.describe(order, "in a line") + f" and back to {name}, which has {shared}"
        return Cut(parts, self.loads_of(parts), fair, description)

    def ends_of(self, segments: Segments, order: Sequence[int], fair: float) -> np.ndarray:
        """[K+1, K+1] load of the first device, when the first segment ends at a and the last starts at z."""
        devices = [self.cluster.devices[index] for index in order]
        own, end = devices[0], -1
        head = segments.loads(own, None, devices[1])[0]
        tail = segments.loads(own, devices[-1], None)[:, end]
        memory = segments.memory(len(order))[0][:, None] + segments.memory(0)[:, end][None, :]
        foreign, shares = segments.foreign(order[0]), segments.shares()
        bad = (memory > own.memory) | (foreign[0][:, None] + foreign[:, end][None, :] > 0)
        bad |= shares[0][:, None] + shares[:, end][None, :] < self.least_shares(order, fair)[0]
        return np.where(bad, np.inf, head[:, None] + tail[None, :])

    def loads_of(self, parts: Sequence[Segment]) -> float:
        """Load of the slowest device, which may have several segments."""
        return max(device_loads(self.work, self.cluster, parts).values())


def device_loads(work: Work, cluster: Cluster, parts: Sequence[Segment]) -> dict[int, float]:
    """Seconds of each device, by index: computation, overheads, and transfers at both ends of its segments."""
    loads: dict[int, float] = {}
    for number, part in enumerate(parts):
        device = cluster.devices[part.device]
        seconds = float(work.seconds(device)[part.start : part.stop].sum()) + device.overhead * work.passes
        for other, at in ((number - 1, part.start), (number + 1, part.stop)):
            if 0 <= other < len(parts):
                link = cluster.between(device.name, cluster.devices[parts[other].device].name)
                seconds += float(work.sent[at] + work.returned[at]) / link.bandwidth
        loads[part.device] = loads.get(part.device, 0.0) + seconds
    return loads


def memory_of(work: Work, parts: Sequence[Segment], number: int, microbatches: int) -> float:
    """Bytes of one segment."""
    here = slice(parts[number].start, parts[number].stop)
    in_flight = min(microbatches, len(parts) - number) if work.passes == 2 else 1
    return float(work.resident[here].sum() + in_flight * work.residuals[here].sum() + work.working[here].max(initial=0))


def _costs(loads: Sequence[np.ndarray], slowest: float, points: Points) -> list[np.ndarray]:
    """What to minimise among cuts as good as the best: imbalance, and cuts inside modules."""
    scale = max(slowest, 1e-30)
    inside = _BETWEEN * ~points.between
    return [np.where(load <= scale * SLACK, (load / scale) ** 2 + inside[None, :], np.inf) for load in loads]


def _runs(pins: np.ndarray) -> list[int]:
    """Devices of the runs of nodes pinned to one device, in order."""
    pinned = pins[pins >= 0]
    return [int(pin) for index, pin in enumerate(pinned) if index == 0 or pinned[index - 1] != pin]


def _together(parts: Sequence[Segment], spans: Sequence[Span]) -> bool:
    """Whether every span lies on one device."""
    starts = np.array([part.start for part in parts])
    devices = np.array([part.device for part in parts])
    return all(
        len(set(devices[np.searchsorted(starts, np.array(span.uses), side="right") - 1].tolist())) == 1
        for span in spans
    )


def check_pins(work: Work, wishes: Wishes, cluster: Cluster) -> None:
    """Raises PlanError if what lives in one place is used by modules that may not be on one device."""
    for span in work.spans:
        uses = list(span.uses)
        if wishes.allowed[uses].all(axis=0).any():
            continue
        where: dict[str, str] = {}
        for use in uses:
            if not wishes.allowed[use].all():
                names = " or ".join(np.array(cluster.names)[wishes.allowed[use]].tolist())
                where.setdefault(names, f"{work.nodes[use].path!r} (pinned to {names})")
        raise PlanError(
            f"{span.ref} is used in {' and '.join(where.values())}: it lives in one place, so they must be on one "
            "device"
        )


def _why_none(search: _Search, stages: int | None) -> str:
    work, devices = search.work, search.cluster.devices
    need = float(work.resident.sum() + work.residuals.sum() + work.working.max(initial=0))
    have = sum(device.memory for device in devices)
    what = "parameters, gradients, optimizer state and activations" if work.passes == 2 else "parameters"
    if need > have:
        return (
            f"the model does not fit: its {what} take {need:,.0f} bytes, the devices have {have:,.0f} together: "
            f"{need - have:,.0f} bytes are short"
        )
    excess = _least_excess(search, stages)
    if excess > 0:
        return (
            f"the model does not fit: its {what} take {need:,.0f} bytes of {have:,.0f}, but in the best cut that "
            f"keeps shared parameters and pins together one device is {excess:,.0f} bytes short"
        )
    if not search.allowed.all():
        return (
            "the pins cannot be kept: no cut into segments has every pinned module on its device and every shared "
            "parameter in one place; pin fewer modules, or neighbours to one device"
        )
    return f"the model cannot be cut into {stages} stages: there are too few places where no shared parameter is torn"


def _least_excess(search: _Search, stages: int | None) -> float:
    """Bytes by which the fullest device overflows in the cut where that is least, over the shapes of a line."""
    least = np.inf
    for count in [stages] if stages else range(len(search.cluster.devices), 0, -1):
        for order in search.device_orders(count):
            segments = search.segments(search.work.spans)
            end = len(segments.points.at) - 1
            if end < len(order):
                continue
            over = [
                np.where(np.tri(end + 1, dtype=bool), np.inf, segments.memory(len(order) - 1 - j) - room)
                for j, room in enumerate(search.cluster.devices[index].memory / order.count(index) for index in order)
            ]
            least = min(least, float(least_maximum(over, np.array([0]))[0, end]))
    return least if np.isfinite(least) else 0.0
