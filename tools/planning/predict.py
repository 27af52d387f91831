"""Predicted against measured: the time of a step, and the memory of each worker, over a fixed list of plans.

For each number of workers, workers are started and calibrated once. Of each model, every plan is predicted before any
step of that model has run; then each is run. Calibration has seen none of the models: its suite is of other sizes.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from models import Example, example
from rich.console import Console
from rich.table import Table

import daggc
from daggc.runtime.local_workers import local_workers
from daggc.runtime.train import TrainStep


@dataclass(frozen=True)
class Case:
    """A plan: a model, a number of workers, and what ``train_step`` is told."""

    model: str
    workers: int
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.model}, {self.workers} workers, {shown or 'one batch'}"


SPLIT = {"split_backward": True}
TWO: dict[str, Sequence[dict[str, Any]]] = {
    "gpt": (
        {},
        {"microbatches": 4},
        {"microbatches": 8, "schedule": "gpipe"},
        {"microbatches": 4, "schedule": "zb-h1", **SPLIT},
        {"microbatches": 4, "replicas": 2},
        {"microbatches": 4, "pins": {"tokens": "cpu:0", "blocks.0": "cpu:0", "blocks.1": "cpu:1", "head": "cpu:1"}},
    ),
    "small gpt": ({"microbatches": 2}, {"microbatches": 2, "replicas": 2}, {"microbatches": 4, "schedule": "gpipe"}),
    "mlp": ({"microbatches": 2}, {"microbatches": 4, "schedule": "zb-h1", **SPLIT}, {"microbatches": 2, "replicas": 2}),
    "bert": ({"microbatches": 4}, {"microbatches": 2, "replicas": 2}, {"microbatches": 8, "schedule": "gpipe"}),
    "resnet": ({"microbatches": 4}, {"microbatches": 2, "replicas": 2}, {"stages": 1}),
    "resnet bn": ({"microbatches": 2, "replicas": 2}, {"microbatches": 4}),
    "lstm": ({"microbatches": 4}, {"microbatches": 2, "replicas": 2}),
    "towers": ({}, {"partition": "line"}),
    "branches": ({}, {"partition": "line"}, {"microbatches": 2, "replicas": 2}),
}
THREE: dict[str, Sequence[dict[str, Any]]] = {
    "gpt": ({"microbatches": 8}, {"microbatches": 6, "replicas": 3}),
    "bert": ({"microbatches": 8}, {"microbatches": 4, "schedule": "gpipe"}),
    "resnet": ({"microbatches": 8}, {"microbatches": 6, "replicas": 3}),
    "mlp": ({"microbatches": 4},),
}
CASES = [
    Case(model, workers, options)
    for workers, table in ((2, TWO), (3, THREE))
    for model, rows in table.items()
    for options in rows
]


@dataclass
class Row:
    """What was predicted and measured of a case; seconds and bytes."""

    case: str
    predicted: float
    measured: float = math.nan
    memory: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def begin(case: Case, one: Example, client: Any) -> TrainStep:
    compiled = daggc.compile(one.model, client=client)
    optimizer = torch.optim.AdamW(one.model.parameters(), lr=1e-4)
    return compiled.train_step(one.loss, optimizer, seed=0, force_microbatches=one.force, **case.options)


def run(case: Case, step: TrainStep, one: Example, seconds: float) -> tuple[float, dict[str, float]]:
    """The median time of a step while steps are submitted ahead, and bytes at most on each worker."""
    for _ in range(3):
        loss = step(*one.batch)
    float(loss)
    step.compare()  # what loading the state took does not count
    times: list[float] = []
    end = time.perf_counter() + seconds
    pending = step(*one.batch)
    last = time.perf_counter()
    while time.perf_counter() < end or len(times) < 5:
        following = step(*one.batch)
        float(pending)
        now = time.perf_counter()
        times.append(now - last)
        last, pending = now, following
    float(pending)
    return statistics.median(times[1:]), dict(step.compare().measured_memory)


@click.command(help=__doc__)
@click.option("--only", default="", help="Only cases whose text contains this.")
@click.option("--seconds", default=3.0, show_default=True, help="For which each plan runs, after three steps.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write rows here (JSON).")
def main(only: str, seconds: float, out: Path | None) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for workers in (2, 3):
        chosen = [case for case in CASES if case.workers == workers and only in str(case)]
        if not chosen:
            continue
        with local_workers(workers) as client:
            daggc.calibrate(client)
            for model in dict.fromkeys(case.model for case in chosen):
                rows += measure_model(model, [case for case in chosen if case.model == model], client, seconds)
    Console(width=130).print(table(rows))
    click.echo(summary(rows))
    if out is not None:
        out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def measure_model(model: str, cases: Sequence[Case], client: Any, seconds: float) -> list[Row]:
    """Predict all plans of a model, then run them."""
    made: list[tuple[Case, Example, TrainStep, Any]] = []
    for case in cases:
        one = example(model)
        step = begin(case, one, client)
        made.append((case, one, step, step.plan_for(*one.batch)))
    rows: list[Row] = []
    for case, one, step, program in made:
        simulation = program.predicted
        measured, memory = run(case, step, one, seconds)
        peaks = {device: (simulation.peaks.get(device, 0.0), most) for device, most in memory.items()}
        rows.append(Row(str(case), simulation.makespan, measured, peaks))
        click.echo(f"{case}: predicted {simulation.makespan * 1e3:.1f} ms, measured {measured * 1e3:.1f} ms", err=True)
        step.close()
    return rows


def table(rows: Sequence[Row]) -> Table:
    shown = Table()
    for head in ("plan", "predicted ms", "measured ms", "error", "memory predicted/measured MB"):
        shown.add_column(head, justify="left" if head == "plan" else "right")
    for row in rows:
        memory = " ".join(f"{a / 1e6:.0f}/{b / 1e6:.0f}" for a, b in row.memory.values())
        times = f"{row.predicted * 1e3:.1f}", f"{row.measured * 1e3:.1f}", f"{row.error:+.1%}"
        shown.add_row(row.case, *times, memory)
    return shown


def summary(rows: Sequence[Row]) -> str:
    errors = np.array([abs(row.error) for row in rows])
    ranks = [np.argsort(np.argsort([getattr(row, name) for row in rows])) for name in ("predicted", "measured")]
    memory = np.array([abs(a / b - 1) for row in rows for a, b in row.memory.values() if b > 0])
    lines = [f"{len(rows)} plans: median error {np.median(errors):.1%}, 90th percentile {np.quantile(errors, 0.9):.1%}"]
    if len(rows) > 2:
        lines.append(f"  rank correlation {np.corrcoef(ranks[0], ranks[1])[0, 1]:.3f}")
    if len(memory):
        lines.append(f"  memory: median error {np.median(memory):.1%}, at most {memory.max():.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
