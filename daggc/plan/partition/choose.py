"""Lines and list schedules, compared by what a step is predicted to take.

Lines are cut for a full pipeline: the slowest device is as fast as can be. List schedules are made for one batch:
what is independent runs at the same time. Both are predicted alike (:mod:`daggc.plan.partition.sketch`), and the
faster one is taken. A list schedule that leaves to some device next to nothing to do is not a fair answer to
"use these workers", and a model that is a chain has none that would be better; then it stays with the line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from daggc.errors import PlanError
from daggc.ir.graph import Graph
from daggc.plan.device import Cluster
from daggc.plan.explain import seconds as as_text
from daggc.plan.partition.coarsen import PIECES, coarsen, node_parallelism
from daggc.plan.partition.cut import Alternative, Cut, Segment, cut_work
from daggc.plan.partition.listing import ALGORITHMS
from daggc.plan.partition.pins import Wishes
from daggc.plan.partition.sketch import Placement, Predicted, placement_of, predict
from daggc.plan.partition.staging import Staging
from daggc.plan.partition.work import Work

HOW = ("auto", "line", "list")
WORTH = 1.1  # with less parallelism in a model, list schedules are not tried
GAIN = 0.97  # of the line's time, what a list schedule has to stay below
FAIR = 0.25  # of a fair share, what a list schedule has to give every device, unless the line gives less
DEVICES = 64  # with more, list schedules are not tried


@dataclass(frozen=True)
class Candidate:
    """A placement and what it is predicted to take."""

    description: str
    placement: Placement
    predicted: Predicted

    def least(self) -> float:
        """The least part of its fair share that a device does."""
        return min(self.predicted.shares.values(), default=1.0)


@dataclass(frozen=True)
class Chosen:
    """A cut, the work in the order that its segments are of, and what it is predicted to take."""

    work: Work
    cut: Cut
    predicted: Predicted


def choose(
    primal: Graph,
    work: Work,
    cluster: Cluster,
    wishes: Wishes,
    stages: int | None,
    microbatches: int,
    how: str,
    turns: Sequence[int] | None = None,
    in_flight: int | None = None,
) -> Chosen:
    """The best of the lines, the list schedules, or both.

    Args:
        wishes: in planning order.
        how: ``line``, ``list`` or ``auto``.
        turns: the device of each segment of a line, by index; there are no list schedules then.
        in_flight: the most microbatches of which residuals are held at a time.

    Raises:
        PlanError: nothing fits, or ``how`` is none of these.
    """
    if how not in HOW:
        raise PlanError(f"partition is one of {', '.join(HOW)}, got {how!r}")
    stages = stages if turns is None else len(turns)
    held = microbatches if in_flight is None else min(microbatches, in_flight)
    if how == "list" and stages is not None:
        raise PlanError("a list schedule has as many stages as it takes; stages= goes with partition='line'")
    cut: Cut | None = None
    wrong: PlanError | None = None
    if how != "list":
        try:
            cut = cut_work(work, cluster, wishes, stages, held, turns)
        except PlanError as error:
            if how == "line" or stages is not None:
                raise
            wrong = error
    line = _line(work, cluster, cut, microbatches, held) if cut else None
    reason = ""
    lists: list[Candidate] = []
    if how == "list" or (how == "auto" and stages is None):
        reason = "" if how == "list" else _not_worth(primal, work, cluster, wishes)
        if not reason:
            lists = list_candidates(primal, work, cluster, wishes, microbatches, held)
            reason = "" if lists else "no schedule fits the devices' memory and keeps shared parameters in one place"
    best = min(lists, key=lambda one: _order(one, line), default=None)
    if best is not None and (line is None or cut is None or _beats(best, line, cut)):
        return _list_chosen(work, cluster, best, lists, cut, microbatches, held)
    if cut is None or line is None:
        raise wrong or PlanError(f"a list schedule is not possible: {reason}")
    others = [_alternative(one, line) for one in lists]
    if reason and len(cluster.devices) > 1:
        others.append(Alternative("list schedules", None, reason))
    known = {
        other.description: _line(work, cluster, other, microbatches, held).predicted.seconds for other in cut.others
    }
    chosen, *lines = cut.alternatives
    lines = [replace(other, predicted=known.get(other.description)) for other in lines]
    chosen = replace(chosen, predicted=line.predicted.seconds)
    return Chosen(work, replace(cut, alternatives=(chosen, *lines, *others), others=()), line.predicted)


def list_candidates(
    primal: Graph, work: Work, cluster: Cluster, wishes: Wishes, microbatches: int, held: int
) -> list[Candidate]:
    """What each algorithm finds that fits the devices' memory; ``held``: microbatches that may be in flight."""
    in_flight = min(held, len(cluster.devices)) if work.passes == 2 else 1
    found: dict[tuple, Candidate] = {}
    for pieces in PIECES:
        units = coarsen(primal, work, cluster, wishes.allowed, pieces)
        staging = Staging(units, work.flows, cluster, work.passes, microbatches, in_flight)
        for name, algorithm in ALGORITHMS.items():
            assignment = algorithm(units, cluster, work.passes, in_flight)
            if assignment is None:
                continue
            placement = staging.stages(assignment)
            key = placement.stage.tobytes(), placement.devices
            name = f"{name} of {units.count} units"
            if key in found:
                same = found[key]
                found[key] = replace(same, description=f"{same.description[:-1]}, {name})")
                continue
            predicted = predict(work, cluster, placement, microbatches, held)
            if predicted.fits(cluster):
                found[key] = Candidate(_describe(placement, cluster, name), placement, predicted)
    return list(found.values())


def _describe(placement: Placement, cluster: Cluster, name: str) -> str:
    used = sorted(set(placement.devices))
    count = len(placement.devices)
    names = ", ".join(cluster.names[device] for device in used)
    return f"{count} {'stage' if count == 1 else 'stages'} on {names} by list scheduling ({name})"


def _line(work: Work, cluster: Cluster, cut: Cut, microbatches: int, held: int) -> Candidate:
    parts = [(segment.start, segment.stop, segment.device) for segment in cut.segments]
    placement = placement_of(parts, len(work.nodes))
    return Candidate(cut.description, placement, predict(work, cluster, placement, microbatches, held))


def _not_worth(primal: Graph, work: Work, cluster: Cluster, wishes: Wishes) -> str:
    """Why list schedules are not tried; empty if they are."""
    if len(cluster.devices) == 1:
        return "there is one device"
    if len(cluster.devices) > DEVICES:
        return f"not tried on more than {DEVICES} devices"
    parallelism = node_parallelism(primal, work, cluster, wishes.allowed)
    if parallelism < WORTH:
        return f"the model is a chain: of its work at most {parallelism:.2f} times the longest way can run in parallel"
    return ""


def _order(one: Candidate, line: Candidate | None) -> tuple[bool, float]:
    """Fair ones first, then the fastest."""
    least = min(FAIR, line.least()) if line else 0.0
    return one.least() < least, one.predicted.seconds


def _beats(best: Candidate, line: Candidate, cut: Cut) -> bool:
    """Whether a list schedule is to be taken rather than the line."""
    if best.predicted.seconds >= GAIN * line.predicted.seconds or best.least() < min(FAIR, line.least()):
        return False
    # fewer devices than the line only where the line cannot use them either: not everything on one
    return len(best.predicted.shares) >= min(2, len(line.predicted.shares))


def _alternative(one: Candidate, chosen: Candidate) -> Alternative:
    """A candidate that is not chosen, and why."""
    ratio = one.predicted.seconds / max(chosen.predicted.seconds, 1e-30) - 1
    time = as_text(one.predicted.seconds)
    if ratio >= 0.005:
        reason = f"a step takes {time}, {ratio:.0%} longer"
    elif one.least() < chosen.least() and one.least() < FAIR:
        reason = f"a step takes {time}, but a device has next to nothing to do"
    elif len(one.predicted.shares) < len(chosen.predicted.shares):
        reason = f"a step takes {time}, but devices are left without work"
    else:
        reason = f"a step takes {time}, no less"
    return Alternative(one.description, one.predicted.slowest, reason, one.predicted.seconds)


def _list_chosen(
    work: Work,
    cluster: Cluster,
    best: Candidate,
    lists: Sequence[Candidate],
    cut: Cut | None,
    microbatches: int,
    held: int,
) -> Chosen:
    """The list schedule as segments of a new order of the nodes."""
    order = np.lexsort((np.arange(len(work.nodes)), best.placement.stage))
    stage = best.placement.stage[order]
    edges = np.searchsorted(stage, np.arange(len(best.placement.devices) + 1))
    segments = tuple(
        Segment(int(a), int(b), device) for a, b, device in zip(edges, edges[1:], best.placement.devices, strict=False)
    )
    seconds = best.predicted.seconds
    rest = [one for one in lists if one is not best]
    rest += [_line(work, cluster, one, microbatches, held) for one in ((cut, *cut.others) if cut else ())]
    known = {one.description for one in rest}
    impossible = [other for other in (cut.alternatives if cut else ()) if other.description not in known]
    chosen = Alternative(best.description, best.predicted.slowest, "chosen", seconds)
    others = [_alternative(one, best) for one in sorted(rest, key=lambda one: one.predicted.seconds)]
    notes = ()
    unused = len(cluster.devices) - len(best.predicted.shares)
    if unused:
        notes = (f"{len(best.predicted.shares)} of {len(cluster.devices)} devices are used: more would not be faster",)
    made = Cut(segments, best.predicted.slowest, best.least(), best.description, (chosen, *others, *impossible), notes)
    return Chosen(work.reordered(order), made, best.predicted)
