"""Whether thousands of steps change what a step takes, or what the processes hold."""

from __future__ import annotations

import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch

import daggc
from benchmarks.models import CASES, Case
from benchmarks.processes import Held, everywhere, held, separate_processes, types
from daggc.runtime.train import TrainStep

_WARM = 64  # steps before the first is counted: they compile code and map memory
_PROBES = 10  # eager steps between blocks
_WINDOW = 1000  # steps at the beginning and at the end that are compared
_FLAT = 0.02  # part by which a process may grow from the first window to the end


@dataclass(frozen=True)
class Block:
    """Steps submitted one after the other.

    Attributes:
        steps: that have run when it ends.
        step: seconds of one; ``probe``: of an eager step in this process, the mean of before and after.
        held: by process, when it has ended.
    """

    steps: int
    step: float
    probe: float
    held: dict[str, Held]


@dataclass(frozen=True)
class Growth:
    """What a process held after the first window, in bytes, and by how many it grew a step from there on."""

    start: float
    slope: float
    steps: int

    @property
    def part(self) -> float:
        """By which part of what it held it has grown."""
        return self.slope * self.steps / self.start


def eager_steps(case: Case) -> Callable[[], float]:
    """Gives the median time of some eager steps; they go on training."""
    model, (*inputs, target) = case.make()
    assert case.loss is not None and case.optimizer is not None
    loss, optimizer = case.loss, case.optimizer(model.parameters())

    def run() -> float:
        seconds = []
        for _ in range(_PROBES):
            start = time.perf_counter()
            optimizer.zero_grad()
            loss(model(*inputs), target).backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    return run


def seconds_a_step(step: TrainStep, batch: Sequence[torch.Tensor], count: int) -> float:
    """Of steps submitted one after the other."""
    start = time.perf_counter()
    losses = [step(*batch) for _ in range(count)]
    losses[-1].item()
    return (time.perf_counter() - start) / count


def growth(blocks: Sequence[Block], process: str, first: int) -> dict[str, Growth]:
    """Least squares through what a process held, after the first blocks."""
    later = blocks[first - 1 :]
    steps = np.array([block.steps for block in later], dtype=float)
    found: dict[str, Growth] = {}
    for name in ("resident", "used"):
        values = np.array([getattr(block.held[process], name) for block in later], dtype=float)
        slope, start = np.polyfit(steps - steps[0], values, 1)
        found[name] = Growth(float(start), float(slope), int(steps[-1] - steps[0]))
    return found


def window(blocks: Sequence[Block]) -> int:
    """How many blocks make a window: those of 1,000 steps, or a third of them all."""
    return max(1, min(sum(block.steps <= _WINDOW for block in blocks), len(blocks) // 3))


def ratio(blocks: Sequence[Block]) -> float:
    """The median time of a step by that of the probe beside it."""
    return statistics.median(block.step / block.probe for block in blocks)


def report(blocks: Sequence[Block]) -> str:
    """The figures as text."""
    size = window(blocks)
    first, last = blocks[:size], blocks[-size:]
    lines = []
    for name, own in (("first", first), ("last", last)):
        step, probe = (statistics.median(getattr(block, kind) for block in own) for kind in ("step", "probe"))
        lines.append(
            f"{name} {size} blocks (to step {own[-1].steps}): a step {step * 1e3:.2f} ms, eager {probe * 1e3:.2f} ms, "
            f"ratio {ratio(own):.3f}"
        )
    change = ratio(last) / ratio(first) - 1
    lines.append(f"the ratio changed by {change:+.1%} (may be 3%)")
    for process in blocks[0].held:
        own = growth(blocks, process, size)
        resident, used = own["resident"], own["used"]
        flat = "flat" if resident.part <= _FLAT else "GROWS"
        lines.append(
            f"{process:10} {resident.start / 1e6:7.1f} MB at step {first[-1].steps}, "
            f"{resident.slope / 1e3:+.3f} kB a step, {resident.part:+.2%} in {resident.steps} steps: {flat}; "
            f"in use of glibc's {used.start / 1e6:.1f} MB, {used.slope / 1e3:+.3f} kB a step"
        )
    return "\n".join(lines)


def changes(before: Mapping[str, Mapping[str, int]], after: Mapping[str, Mapping[str, int]], steps: int) -> str:
    """Of which types there are more objects, by process."""
    lines = []
    for process, own in after.items():
        more = {name: count - before[process].get(name, 0) for name, count in own.items()}
        top = sorted(more.items(), key=lambda item: -item[1])[:12]
        lines.append(f"{process}: " + ", ".join(f"{name} {count:+d}" for name, count in top if count > steps / 100))
    return "\n".join(lines)


@click.command()
@click.option("--steps", default=10_000, show_default=True)
@click.option("--every", default=100, show_default=True, help="Steps of a block: then eager ones, and memory.")
@click.option("--case", "name", default="small-gpt", show_default=True, type=click.Choice(sorted(CASES)))
@click.option("--workers", default=2, show_default=True)
@click.option("--stages", default=2, show_default=True)
@click.option("--microbatches", default=2, show_default=True)
@click.option("--objects", is_flag=True, help="Show of which types there are more objects at the end.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
def main(
    steps: int, every: int, name: str, workers: int, stages: int, microbatches: int, objects: bool, out: Path | None
) -> None:
    """Run STEPS of a training on workers; eager steps between them tell what the machine does meanwhile."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    case = CASES[name]
    probe = eager_steps(case)
    blocks: list[Block] = []
    with separate_processes(workers) as client:
        model, batch = case.make()
        assert case.optimizer is not None
        step = daggc.compile(model, client=client).train_step(
            case.loss, case.optimizer(model.parameters()), stages=stages, microbatches=microbatches, seed=0
        )
        seconds_a_step(step, batch, _WARM)
        before, begun, earlier = {}, 0, probe()
        for done in range(every, steps + 1, every):
            seconds = seconds_a_step(step, batch, every)
            later = probe()
            blocks.append(Block(done, seconds, (earlier + later) / 2, everywhere(client, held)))
            earlier = later
            if objects and done >= steps // 3 and not before:
                before, begun = everywhere(client, types), done
        click.echo(report(blocks))
        if objects:
            click.echo(changes(before, everywhere(client, types), steps - begun))
    if out is not None:
        out.write_text(json.dumps([asdict(block) for block in blocks], indent=1) + "\n")


if __name__ == "__main__":
    main()
