"""Choosing how a step is cut and ordered: simulate what is possible, take the fastest that fits memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from daggc.errors import PlanError
from daggc.plan.device import Cluster
from daggc.plan.explain import nbytes, seconds
from daggc.plan.schedule import SPLIT_BACKWARD
from daggc.plan.simulate import Simulation

AUTO = "auto"
REMAT = ("none", "cheap", "full")  # ever more is computed again; see daggc.passes.remat
_PIPELINES = ("1f1b", "gpipe", "zb-h1", "zb-2p")
_MOST = 4  # microbatches a stage, times the devices: more only add overhead


@dataclass(frozen=True)
class Choice:
    """How a step is made.

    Attributes:
        stages: of the pipeline; None where the partitioner decides.
        replicas: of every stage.
        remat: what the backward computes again; ``auto`` is as little as fits memory.
    """

    microbatches: int = 1
    schedule: str = "1f1b"
    stages: int | None = None
    replicas: int = 1
    split_backward: bool = False
    remat: str = AUTO

    def __str__(self) -> str:
        stages = "" if self.stages is None else f", {self.stages} {'stage' if self.stages == 1 else 'stages'}"
        replicas = f", {self.replicas} replicas" if self.replicas > 1 else ""
        remat = f", recomputing: {self.remat}" if self.remat not in (AUTO, "none") else ""
        many = f"{self.microbatches} microbatches" if self.microbatches > 1 else "the batch whole"
        return f"{many}, {self.schedule}{stages}{replicas}{remat}"


@dataclass(frozen=True)
class Tried:
    """A choice, what a step of it is predicted to take, and why it was not taken."""

    choice: Choice
    seconds: float | None
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.choice}: {'not possible' if self.seconds is None else seconds(self.seconds)}; {self.reason}"


def possible(
    devices: int,
    batch: int,
    *,
    microbatches: int | str,
    schedule: str,
    replicas: int | str,
    stages: int | None = None,
    split_backward: bool = False,
    remat: str = AUTO,
) -> list[Choice]:
    """Every choice that what the user fixed leaves open; ``auto`` fixes nothing.

    Args:
        batch: samples, of which every microbatch has at least one; 1 if the batch may not be cut.
    """
    counts = _powers(min(batch, _MOST * devices)) if isinstance(microbatches, str) else [microbatches]
    copies = _powers(min(devices, batch)) if isinstance(replicas, str) else [replicas]
    found: dict[Choice, None] = {}
    for copy in copies:
        for depth in _depths(devices // max(copy, 1), stages, any_cut=isinstance(microbatches, str)):
            for count in counts:
                if isinstance(microbatches, str) and count < copy:
                    continue
                for name in _schedules(schedule, count // copy, 1 if copy == devices else depth):
                    split = split_backward or name in SPLIT_BACKWARD
                    found[Choice(count, name, depth, copy, split, remat)] = None
    return list(found)


def _powers(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]


def _depths(devices: int, stages: int | None, any_cut: bool) -> Iterator[int | None]:
    yield stages
    if stages is None and any_cut and devices > 1:
        yield 1  # all on one device: where transfers cost more than a second device gives


def _schedules(schedule: str, microbatches: int, stages: int | None) -> Sequence[str]:
    if schedule != AUTO:
        return [schedule]
    return _PIPELINES if microbatches > 1 and stages != 1 else ["1f1b"]


def take_best(
    choices: Sequence[Choice], simulate: Callable[[Choice], Simulation], cluster: Cluster
) -> tuple[Choice, tuple[Tried, ...]]:
    """Simulate every choice and take the fastest that fits.

    Args:
        simulate: a step of a choice whose ``remat`` is decided. Raises PlanError where it is not possible.

    Returns:
        The choice, its ``remat`` decided, and all that were tried, fastest first.

    Raises:
        PlanError: none fits; says by how many bytes the best of them does not.
    """
    tried: list[Tried] = []
    wrong: PlanError | None = None
    for choice in choices:
        failed: PlanError | None = None
        for level in REMAT if choice.remat == AUTO else (choice.remat,):
            exact = replace(choice, remat=level)
            try:
                done = simulate(exact)
                require_room(done, cluster)
            except PlanError as error:
                failed = error
            else:
                tried.append(Tried(exact, done.makespan))
                break
        else:
            wrong = wrong or failed
            tried.append(Tried(choice, None, str(failed)))
    possible_ones = [one for one in tried if one.seconds is not None]
    if not possible_ones:
        raise wrong or PlanError("there is nothing to choose from")
    best = min(possible_ones, key=lambda one: one.seconds or 0.0)
    ranked = sorted(tried, key=lambda one: (one is not best, one.seconds is None, one.seconds or 0.0))
    return best.choice, tuple(replace(one, reason=one.reason or _against(one, best)) for one in ranked)


def _against(one: Tried, best: Tried) -> str:
    if one is best or not one.seconds or not best.seconds:
        return "chosen"
    return f"{one.seconds / best.seconds - 1:.0%} longer"


def require_room(done: Simulation, cluster: Cluster) -> None:
    """Raises PlanError if a step does not fit the memory of a device, with the bytes that are short."""
    over = {device: peak - cluster.device(device).memory for device, peak in done.peaks.items()}
    device = max(over, key=lambda name: over[name], default="")
    if device and over[device] > 0:
        have, need = cluster.device(device).memory, done.peaks[device]
        raise PlanError(
            f"a step needs {nbytes(need)} on {device}, which has {nbytes(have)}: {over[device]:,.0f} bytes are short; "
            "more devices, more microbatches or a smaller batch would help"
        )
