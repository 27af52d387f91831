"""daggc beside other ways to do the same, in one command."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.local import Row, measure
from benchmarks.models import CASES
from benchmarks.report import put_in_page, table, write_json


@click.command()
@click.argument("cases", nargs=-1, type=click.Choice(sorted(CASES)))
@click.option("--rounds", default=15, show_default=True, help="Each way is timed once a round; medians are shown.")
@click.option("--threads", default=[1], multiple=True, show_default=True, help="Of torch; may be given twice.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
@click.option("--docs", is_flag=True, help="Put the table into docs/performance.md.")
def main(cases: tuple[str, ...], rounds: int, threads: tuple[int, ...], out: Path | None, docs: bool) -> None:
    """Time CASES (all, if none is named) in this process: eager PyTorch and daggc, in turn."""
    rows: list[Row] = []
    for name in cases or [name for name in CASES if name != "tiny"]:
        for count in threads:
            rows.append(measure(CASES[name], rounds, count))
            click.echo(table(rows[-1:]).splitlines()[-1])
            if not rows[-1].same:
                click.echo(f"  {name}: the first numbers differ in their last bits")
    if out is not None:
        write_json(rows, out)
    if docs:
        put_in_page(table(rows))


if __name__ == "__main__":
    main()
