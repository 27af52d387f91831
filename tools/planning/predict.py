"""Predicted against measured: the time of a step, and the memory of each worker, over a fixed list of plans.

For each number of workers, workers are started and calibrated once. Of each model, every plan is predicted before any
step of that model has run; then each is run. Calibration has seen none of the models: its suite is of other sizes.
Then the plan that ``auto`` chooses is run too, unless it is one of the list, and compared with the best of the list.
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
from models import MODELS, Example, example
from rich.console import Console
from rich.table import Table

import daggc
from daggc.runtime.local_workers import local_workers
from daggc.runtime.step_program import StepProgram
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


AUTO = {"microbatches": "auto", "schedule": "auto", "replicas": "auto"}


@dataclass
class Row:
    """What was predicted and measured of a case; seconds and bytes.

    Attributes:
        auto: what was chosen, where the choice was open; ``best`` then is the fastest of the list, and ``ratio`` of
            the chosen plan's time to its, where the two run in turns.
    """

    model: str
    workers: int
    case: str
    predicted: float
    measured: float = math.nan
    memory: dict[str, tuple[float, float]] = field(default_factory=dict)
    auto: str = ""
    best: str = ""
    ratio: float = 1.0

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def begin(case: Case, one: Example, client: Any) -> TrainStep:
    compiled = daggc.compile(one.model, client=client)
    optimizer = torch.optim.AdamW(one.model.parameters(), lr=1e-4)
    return compiled.train_step(one.loss, optimizer, seed=0, force_microbatches=one.force, **case.options)


def run(step: TrainStep, one: Example, seconds: float) -> tuple[float, dict[str, float]]:
    """The median time of a step while steps are submitted ahead, and bytes at most on each worker."""
    for _ in range(2):
        step(*one.batch)
    float(step(*one.batch))
    step.compare()  # what loading the state took does not count
    times = ahead(step, one, seconds)
    return statistics.median(times), dict(step.compare().measured_memory)


def ahead(step: TrainStep, one: Example, seconds: float) -> list[float]:
    """Times of steps that are submitted while the one before runs, four at least."""
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
    return times[1:]


def paired(first: tuple[TrainStep, Example], second: tuple[TrainStep, Example], seconds: float) -> float:
    """Of the times of two steps that run in turns, the median ratio: what else the machine does strikes both."""
    for step, one in (first, second):
        float(step(*one.batch))
    ratios: list[float] = []
    for _ in range(3):
        times = [statistics.median(ahead(step, one, seconds / 3)) for step, one in (first, second)]
        ratios.append(times[0] / times[1])
    for step, _ in (first, second):
        step.close()
    return statistics.median(ratios)


@click.command(help=__doc__)
@click.option("--models", default="", help="Only these models, by comma.")
@click.option("--only", default="", help="Only cases whose text contains this.")
@click.option("--seconds", default=3.0, show_default=True, help="For which each plan runs, after three steps.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path),
    help="Write rows here (JSON) after each model; models that are there already are not run again.",
)  # fmt: skip
def main(models: str, only: str, seconds: float, out: Path | None) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = [Row(**row) for row in json.loads(out.read_text())] if out and out.exists() else []
    done = {(row.model, row.workers) for row in rows}
    wanted = [name.strip() for name in models.split(",")] if models else list(MODELS)
    if unknown := set(wanted) - set(MODELS):
        raise click.BadParameter(f"no model {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    for workers in (2, 3):
        chosen = [case for case in CASES if case.workers == workers and only in str(case) and case.model in wanted]
        chosen = [case for case in chosen if (case.model, workers) not in done]
        if not chosen:
            continue
        with local_workers(workers) as client:
            daggc.calibrate(client)
            for model in dict.fromkeys(case.model for case in chosen):
                rows += measure_model([case for case in chosen if case.model == model], client, seconds)
                if out is not None:
                    out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    Console(width=150).print(table([row for row in rows if not row.auto]))
    click.echo(summary([row for row in rows if not row.auto]))
    Console(width=150).print(choices(rows))


def measure_model(cases: Sequence[Case], client: Any, seconds: float) -> list[Row]:
    """Predict all plans of a model and the one that ``auto`` chooses, then run them."""
    open_case = Case(cases[0].model, cases[0].workers, AUTO)
    made: list[tuple[Case, Example, TrainStep, StepProgram]] = []
    for case in (*cases, open_case):
        one = example(case.model)
        step = begin(case, one, client)
        made.append((case, one, step, step.plan_for(*one.batch)))
    rows: list[Row] = []
    known: dict[Any, int] = {}
    for case, one, step, program in made:
        makespan, peaks = program.predicted.makespan, program.predicted.peaks
        row = Row(case.model, case.workers, str(case), makespan)
        if case is open_case:
            row.auto = str(program.tried[0].choice)
        same = known.setdefault((str(program.step), program.layout), len(rows))
        if same < len(rows):
            row.measured, row.memory = rows[same].measured, rows[same].memory
        else:
            row.measured, memory = run(step, one, seconds)
            row.memory = {device: (peaks.get(device, 0.0), most) for device, most in memory.items()}
        rows.append(row)
        times = f"predicted {row.predicted * 1e3:.1f} ms, measured {row.measured * 1e3:.1f} ms"
        click.echo(f"{case}{row.auto and f' ({row.auto})'}: {times}", err=True)
        step.close()
    best = min(range(len(cases)), key=lambda index: rows[index].measured)
    rows[-1].best = rows[best].case
    if known[str(made[-1][3].step), made[-1][3].layout] != best:
        rows[-1].ratio = paired((made[-1][2], made[-1][1]), (made[best][2], made[best][1]), seconds)
    return rows


def choices(rows: Sequence[Row]) -> Table:
    """What ``auto`` chose of each model beside the best of its plans."""
    shown = Table()
    for head in ("model", "workers", "auto", "best of the list", "ms", "auto / best"):
        shown.add_column(head, justify="right" if head in ("ms", "auto / best") else "left")
    for row in rows:
        listed = {
            one.case: one for one in rows if not one.auto and (one.model, one.workers) == (row.model, row.workers)
        }
        if row.auto and len(listed) > 1:
            name, best = row.best.split(" workers, ")[1], listed[row.best].measured
            shown.add_row(row.model, str(row.workers), row.auto, name, f"{best * 1e3:.1f}", f"{row.ratio:.3f}")
    return shown


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
    memory = np.array([abs(a / b - 1) for row in rows for a, b in row.memory.values() if a and b])
    lines = [f"{len(rows)} plans: median error {np.median(errors):.1%}, 90th percentile {np.quantile(errors, 0.9):.1%}"]
    if len(rows) > 2:
        lines.append(f"  rank correlation {np.corrcoef(ranks[0], ranks[1])[0, 1]:.3f}")
    if len(memory):
        close = f"{np.mean(memory <= 0.15):.0%} of {len(memory)} processes within 15%"
        lines.append(f"  memory: median error {np.median(memory):.1%}, {close}, at most {memory.max():.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
