"""Bubble rates of schedules beside the published ones, and the activations that each rank holds.

Run it as tools/schedule_table. The rows are of Tables 5 and 9 of "Zero Bubble Pipeline Parallelism" (Qi et al.):
stages p, microbatches m, milliseconds of F, B, W of a stage and of a transfer between stages. A bubble rate is
1 - m (F + B + W) / the longest span of a stage, from its first task's start to its last one's end. ZB-2p has the
memory of 2p microbatches, M_W = 0.45 M_B of each unfinished W counted. The last column is a bound: no schedule in that
memory has a smaller bubble. Exits with 1 if a rate is not the published one (ZB-2p: is larger).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from daggc.plan.schedule import BACKWARD, FORWARD, SPLIT_BACKWARD, WEIGHT_GRAD, Schedule, schedule_named
from daggc.plan.schedule.problem import problem_of
from daggc.plan.schedule.search import span_bound
from daggc.plan.simulate import simulate_schedule

COLUMNS = ("1f1b", "zb-h1", "zb-1p", "zb-2p")
CHUNKS = {"interleaved": 2, "zb-v": 2}


@dataclass(frozen=True)
class Row:
    """A pipeline of equal stages (times in ms) and the published bubble rates of COLUMNS."""

    model: str
    stages: int
    microbatches: int
    forward: float
    backward: float
    weight: float
    transfer: float
    rates: tuple[float, ...] = ()

    @property
    def work(self) -> float:
        """Milliseconds that a stage works."""
        return self.microbatches * (self.forward + self.backward + self.weight)


PUBLISHED = (
    Row("1.5B", 8, 24, 18.522, 18.086, 9.337, 0.601, (0.2431, 0.1585, 0.1585, 0.0433)),
    Row("1.5B", 8, 64, 18.546, 18.097, 9.321, 0.762, (0.1240, 0.0674, 0.0674, 0.0026)),
    Row("6.2B", 8, 24, 29.718, 29.444, 19.927, 0.527, (0.2347, 0.1323, 0.1323, 0.0029)),
    Row("14.6B", 16, 48, 11.347, 11.248, 8.132, 0.377, (0.2552, 0.1397, 0.1397, 0.0066)),
    Row("14.6B", 16, 128, 11.325, 11.308, 8.109, 0.378, (0.1251, 0.0576, 0.0576, 0.0028)),
    Row("28.3B", 32, 96, 10.419, 10.207, 7.715, 0.408, (0.2646, 0.1421, 0.1421, 0.0038)),
)


@dataclass(frozen=True)
class Outcome:
    """A schedule of a row, its bubble rate, and the seconds it took to make."""

    schedule: Schedule
    rate: float
    seconds: float


def outcome(row: Row, name: str) -> Outcome:
    """Make a schedule for a row and simulate it. Schedules of two stages a device cut each stage of the row in two."""
    chunks = CHUNKS.get(name, 1)
    split = name in SPLIT_BACKWARD
    times = {FORWARD: row.forward, BACKWARD: row.backward if split else row.backward + row.weight}
    times = {phase: time / chunks for phase, time in (times | {WEIGHT_GRAD: row.weight}).items()}
    before = time.perf_counter()
    schedule = schedule_named(name)(
        row.stages * chunks, row.microbatches, None, split_backward=split, seconds=times, transfer=row.transfer
    )
    seconds = time.perf_counter() - before
    starts, ends = [float("inf")] * row.stages, [0.0] * row.stages
    simulation = simulate_schedule(schedule, times, row.transfer)
    for task in simulation.tasks:
        if task.job.stage is not None:
            device = schedule.device_of[task.job.stage]
            starts[device], ends[device] = min(starts[device], task.start), max(ends[device], task.end)
    span = max(end - start for start, end in zip(starts, ends, strict=True))
    return Outcome(schedule, 1 - row.work / span, seconds)


def agrees(name: str, rate: float, published: float) -> bool:
    """To four digits; a search may find a smaller bubble."""
    return round(rate, 4) <= published if name == "zb-2p" else round(rate, 4) == published


def least_rate(row: Row) -> float:
    """A bubble rate that no schedule in the memory of 2p microbatches falls below."""
    times = {FORWARD: row.forward, BACKWARD: row.backward, WEIGHT_GRAD: row.weight}
    problem = problem_of(
        row.stages, row.microbatches, None, True, seconds=times, transfer=row.transfer, memory=2 * row.stages
    )
    return max(0.0, 1 - row.work / span_bound(problem))


def published_peak(name: str, row: Row, rank: int) -> float:
    """Activations that a rank holds at most by the formulas of the literature, in M_B."""
    p, m = row.stages, row.microbatches
    chunks = CHUNKS.get(name, 1)
    return {
        "gpipe": m,
        "1f1b": min(m, p - rank),
        "interleaved": min(m, (2 * (p - rank - 1) + (chunks - 1) * p + 1) / chunks),
        "zb-h1": min(m, p),
        "zb-h2": min(m, 2 * p - 1),
        "zb-1p": min(m, p),
        "zb-2p": min(m, 2 * p),
        "zb-v": min(m, p),
    }[name]


def rates_table(rows: Sequence[Row]) -> tuple[Table, bool]:
    """The table of bubble rates, and whether all agree with the published ones."""
    table = Table(box=box.SIMPLE, title="bubble rate (published)", title_justify="left")
    for heading in ("model", "p", "m", *COLUMNS, "bound", "zb-2p peak", "seconds"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    good = True
    for row in rows:
        cells: list[str] = []
        spent: list[str] = []
        peak = 0.0
        for index, name in enumerate(COLUMNS):
            result = outcome(row, name)
            spent.append(f"{result.seconds:.2f}")
            cell = f"{result.rate:.4f}"
            if row.rates:
                same = agrees(name, result.rate, row.rates[index])
                good = good and same
                cell += f" ({row.rates[index]:.4f}{'' if same else ' !'})"
            cells.append(cell)
            if name == "zb-2p":
                peak = max(result.schedule.peak_activations())
        table.add_row(
            row.model, str(row.stages), str(row.microbatches), *cells, f"{least_rate(row):.4f}",
            f"{peak:.2f} of {2 * row.stages}", " ".join(spent),
        )  # fmt: skip
    return table, good


def peaks_table(row: Row, ranks: Sequence[int]) -> Table:
    """Peak activations of some ranks for every schedule of a row, and the formula's."""
    title = f"peak activations by rank, in M_B (formula): p = {row.stages}, m = {row.microbatches}"
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for heading in ("schedule", *(f"rank {rank}" for rank in ranks), "bubble rate"):
        table.add_column(heading, justify="left" if heading == "schedule" else "right", no_wrap=True)
    for name in ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-1p", "zb-2p", "zb-v"):
        result = outcome(row, name)
        peaks = result.schedule.peak_activations()
        cells = [f"{peaks[rank]:.2f} ({published_peak(name, row, rank):g})" for rank in ranks]
        table.add_row(name, *cells, f"{result.rate:.4f}")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--row", nargs=6, action="append", metavar=("P", "M", "F", "B", "W", "TC"), help="another pipeline, times in ms"
    )
    parser.add_argument("--ranks", action="store_true", help="peak activations of every rank of every row")
    options = parser.parse_args(arguments)
    rows: Sequence[Row] = PUBLISHED
    if options.row:
        rows = [Row("", int(p), int(m), float(f), float(b), float(w), float(tc)) for p, m, f, b, w, tc in options.row]
    console = Console(width=180)
    table, good = rates_table(rows)
    console.print(table)
    for row in rows if options.ranks else rows[:1]:
        every = range(row.stages)
        for start in range(0, row.stages, 8):
            console.print(peaks_table(row, every[start : start + 8]))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
