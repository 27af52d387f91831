"""daggc beside other ways to do the same, in one command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.contenders import WayError
from benchmarks.local import Row, measure
from benchmarks.models import CASES
from benchmarks.report import (
    LOCAL,
    WORKERS,
    put_in_page,
    read_json,
    table,
    targets_table,
    ways_table,
    workers_text,
    write_json,
)
from benchmarks.results import Results
from benchmarks.two_workers import LossError, compare, search
from benchmarks.ways import STEPS, WAYS


@click.command()
@click.argument("cases", nargs=-1, type=click.Choice(sorted(CASES)))
@click.option(
    "--only",
    type=click.Choice(["local", "workers", "tables"]),
    help="In this process; on two workers; or only the tables of what is in --json.",
)
@click.option("--rounds", type=int, help="Each way is timed once a round; medians are shown. [local: 15, workers: 3]")
@click.option(
    "--threads", default=[1], multiple=True, show_default=True, help="Of torch in this process; may be given twice."
)
@click.option("--ways", help="Workers: only these, as in eager-1,daggc-any.")
@click.option("--steps", type=int, help="Workers: steps that are timed together. [gpt: 3, resnet18: 10]")
@click.option(
    "--search",
    "searches",
    is_flag=True,
    help="Workers: find the best settings of the ways, for later runs with the same --json.",
)
@click.option("--fresh", is_flag=True, help="Workers: drop what was timed of the ways before; they have changed.")
@click.option(
    "--json",
    "out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the figures here, added to those of runs before.",
)
@click.option("--docs", is_flag=True, help="Put the tables into docs/performance.md.")
def main(
    cases: tuple[str, ...], only: str | None, rounds: int | None, threads: tuple[int, ...], ways: str | None,
    steps: int | None, searches: bool, fresh: bool, out: Path | None, docs: bool,
) -> None:  # fmt: skip
    """Time CASES (all, if none is named): in this process eager PyTorch and daggc, in turn, with their memory; on two
    workers of one thread daggc, eager and other ways to use two cores. Pieces of a run add up in the file of --json."""
    local, found = read_json(out) if out else ([], {})
    try:
        if only in (None, "local"):
            rows = in_process(cases, rounds or 15, threads)
            keys = {(row.case, row.threads) for row in rows}
            local = [row for row in local if (row.case, row.threads) not in keys] + rows
        if only in (None, "workers"):
            names = ways.split(",") if ways else None
            for case in [case for case in cases or WAYS if case in WAYS]:
                results = found.setdefault(case, Results())
                on_workers(case, names, results, rounds or 3, steps or STEPS[case], only_search=searches, fresh=fresh)
    except (WayError, LossError) as wrong:
        click.echo(f"{type(wrong).__name__}: {wrong}", err=True)
        sys.exit(1)
    finally:
        if out is not None and only != "tables":
            write_json(local, found, out)
    timed = {case: results for case, results in found.items() if results.rounds}
    if only == "tables":
        click.echo(f"{table(local)}\n\n{workers_text(timed)}")
    elif timed:
        click.echo(targets_table(timed))
    if docs and local:
        put_in_page(table(local), LOCAL)
    if docs and timed:
        put_in_page(workers_text(timed), WORKERS)


def in_process(cases: Sequence[str], rounds: int, threads: Sequence[int]) -> list[Row]:
    """Measure in this process, and say each row as it is found."""
    rows: list[Row] = []
    for name in cases or [name for name in CASES if name != "tiny"]:
        for count in threads:
            rows.append(measure(CASES[name], rounds, count))
            click.echo(table(rows[-1:]).splitlines()[-1])
            if not rows[-1].same:
                click.echo(f"  {name}: the first numbers differ in their last bits")
    return rows


def on_workers(
    case: str, names: Sequence[str] | None, results: Results, rounds: int, steps: int, *, only_search: bool, fresh: bool
) -> None:
    """Search the best settings of the ways, or time them with those known."""
    unknown = [name for name in names or () if name not in WAYS[case]]
    if unknown:
        raise click.UsageError(f"{case} has no way {unknown[0]}; there are {', '.join(WAYS[case])}")
    names = list(names or WAYS[case])
    if fresh:
        results.forget(names)
    if only_search:
        for name in names:
            search(case, name, results, click.echo)
    else:
        compare(case, names, results, rounds, steps, click.echo)
        click.echo(ways_table(case, results))


if __name__ == "__main__":
    main()
