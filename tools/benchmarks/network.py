"""What a training step sends: by way and kind as planned, and by way as counted where tensors become bytes."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

import daggc
from benchmarks.models import CASES, Case
from daggc.backend.serializers import take_sent_to
from daggc.runtime.local_workers import local_workers
from daggc.runtime.traffic import CLIENT, Sent, sent, tell_receivers, total
from daggc.runtime.train import TrainStep

PLANS: Mapping[str, Mapping[str, Any]] = {
    "1f1b": {"stages": 2, "microbatches": 4},
    "gpipe": {"stages": 2, "microbatches": 4, "schedule": "gpipe"},
    "zb-h1": {"stages": 2, "microbatches": 4, "schedule": "zb-h1"},
    "replicas": {"stages": 1, "microbatches": 4, "replicas": 2},
}


@dataclass(frozen=True)
class Profile:
    """What a plan's step sends.

    Attributes:
        planned: every tensor.
        counted: bytes of all steps by device that sent and device that received (``client`` included).
        steps: that were counted.
    """

    plan: str
    planned: tuple[Sent, ...]
    counted: dict[tuple[str, str], int]
    steps: int

    @property
    def exact(self) -> bool:
        """Whether every way has carried what was planned, to the byte."""
        ways = {(tensor.source, tensor.target) for tensor in self.planned} | self.counted.keys()
        return all(self.counted.get(way, 0) == self.steps * total(self.on(*way)) for way in ways)

    @property
    def still(self) -> bool:
        """Whether no parameter, buffer or optimizer state is sent."""
        return not any(tensor.what in ("param", "state", "buffer") for tensor in self.planned)

    def on(self, source: str, target: str) -> list[Sent]:
        """What goes one way."""
        return [tensor for tensor in self.planned if (tensor.source, tensor.target) == (source, target)]


def profile(plan: str, step: TrainStep, batch: Sequence[torch.Tensor], steps: int) -> Profile:
    """Run a step some times and count; ``step``: of workers that know their receivers."""
    assert step.pool is not None
    step(*batch).item()  # compiles, and brings the state to the workers
    client, names = step.pool.client, {address: device for device, address in step.pool.addresses.items()}
    client.run(take_sent_to)
    losses = [step(*batch) for _ in range(steps)]
    losses[-1].item()
    counted: dict[tuple[str, str], int] = {}
    for address, receivers in client.run(take_sent_to).items():
        for receiver, nbytes in receivers.items():
            counted[names[address], names.get(receiver, CLIENT)] = nbytes
    assert step.step_program is not None
    return Profile(plan, sent(step.step_program.step.graph), counted, steps)


def measure(case: Case, plans: Mapping[str, Mapping[str, Any]], workers: int, steps: int) -> list[Profile]:
    """Profiles of a model's step by plan."""
    found = []
    with local_workers(workers) as client:
        for plan, options in plans.items():
            model, batch = case.make()
            assert case.optimizer is not None
            step = daggc.compile(model, client=client).train_step(
                case.loss, case.optimizer(model.parameters()), seed=0, **options
            )
            client.run(tell_receivers)
            found.append(profile(plan, step, batch, steps))
            step.close()
    return found


def show(found: Sequence[Profile]) -> None:
    """Print profiles as tables."""
    for one in found:
        table = Table("from", "to", "what", "tensors", "bytes planned", "bytes counted", title=f"{one.plan}, a step")
        for way in sorted({(tensor.source, tensor.target) for tensor in one.planned} | one.counted.keys()):
            own = one.on(*way)
            for what in dict.fromkeys(tensor.what for tensor in own):
                alike = [tensor for tensor in own if tensor.what == what]
                table.add_row(*way, what, str(len(alike)), f"{total(alike):,}", "")
            counted = one.counted.get(way, 0) / one.steps
            table.add_row(*way, "all", str(len(own)), f"{total(own):,}", f"{counted:,.10g}", end_section=True)
        Console(width=110).print(table)
        verdict = "equal" if one.exact else "NOT EQUAL"
        state = "parameters stay where they are" if one.still else "replicas get new values of parameters"
        click.echo(f"{one.steps} steps: planned and counted are {verdict}; {state}\n")


def to_json(one: Profile) -> dict[str, Any]:
    """Plain data."""
    counted = [{"from": source, "to": target, "bytes": nbytes} for (source, target), nbytes in one.counted.items()]
    planned = [asdict(tensor) for tensor in one.planned]
    return {"plan": one.plan, "steps": one.steps, "exact": one.exact, "planned": planned, "counted": counted}


@click.command()
@click.option("--case", "name", default="small-gpt", show_default=True, type=click.Choice(sorted(CASES)))
@click.option("--plan", "plans", multiple=True, type=click.Choice(sorted(PLANS)), help="Only this; may be repeated.")
@click.option("--workers", default=2, show_default=True)
@click.option("--steps", default=25, show_default=True, help="To count.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
def main(name: str, plans: tuple[str, ...], workers: int, steps: int, out: Path | None) -> None:
    """Bytes of tensors that a step sends, planned and counted. Exits with 1 if they differ."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found = measure(CASES[name], {plan: PLANS[plan] for plan in plans or PLANS}, workers, steps)
    show(found)
    if out is not None:
        out.write_text(json.dumps([to_json(one) for one in found], indent=1) + "\n")
    raise SystemExit(not all(one.exact for one in found))


if __name__ == "__main__":
    main()
