"""Generated programs through everything: round trip, every pass, VJP, generated code, partition and plan.

Program number n of a seed is the same everywhere. Half of them are differentiable in f64 and have their gradient
compared with finite differences; the others mix dtypes. Every hundredth is long.
"""

from __future__ import annotations

import json
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import click
import torch
from models import captured
from properties import Broken, Judged
from results import FOLDER, Row, Store, fingerprint, in_processes, make_rows, part_of
from richness import Richness, compare, of_programs, table

import daggc.passes  # noqa: F401  # registers every pass
from daggc.ir.graph import Program
from daggc.ir.printer import print_program
from daggc.testing.choices import Choices, Replayed, Seeded, shrink
from daggc.testing.likeness import Likeness
from daggc.testing.programs import grow_program

CHUNK = 250  # programs of a row
SECONDS = 60  # of CPU time, for one program
SHRINK_SECONDS = 20  # likewise
SHRUNK = 2  # failures of one property that a process shrinks; a defect that is met often is shrunk often enough
MIXES = (
    ("f32", "i64", "bool"),
    ("f64", "f32", "bf16", "f16"),
    ("bf16", "f32", "i64"),
    ("f16", "f32"),
    ("c64", "c128", "f64"),
    ("f64", "i32", "i16", "i8", "u8"),
)
TOOLS = ("generated.py", "properties.py")


def is_differentiable(number: int) -> bool:
    return number % 2 == 0


def grow(choices: Choices, number: int) -> Program:
    """The program of this number that these choices make."""
    size: dict[str, Any] = {"max_ops": 8}
    if number % 100 >= 98:
        size = {"max_ops": 120, "length": 60}
    elif number % 10 >= 8:
        size = {"max_ops": 24, "length": 40}
    kinds: dict[str, Any] = {"dtypes": MIXES[number // 2 % len(MIXES)]}
    if is_differentiable(number):
        kinds = {"differentiable": True}
    return grow_program(choices, like_models=True, **size, **kinds)


class _TooLong(Exception):
    """A program took longer than it may."""


def _ring(*_: object) -> None:
    raise _TooLong(f"took more than {SECONDS} seconds of CPU time")


def judge(choices: Choices, number: int, richness: Richness | None = None) -> Counter[str]:
    """Check one program. Raises Broken."""
    signal.signal(signal.SIGPROF, _ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        program = grow(choices, number)
        judged = Judged(program, is_differentiable(number), number)
        after = judged.check()
    except Broken:
        raise
    except Exception as wrong:
        raise Broken("grow", f"{type(wrong).__name__}: {wrong}") from wrong
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if richness is not None:
        richness.add(after or program)
    return judged.counts


def broken(numbers: Sequence[int], number: int) -> Broken | None:
    """How the program of recorded choices fails, if it does."""
    try:
        judge(Replayed(numbers), number)
    except Broken as wrong:
        return wrong
    return None


def failure(seed: int, number: int, small: bool) -> Row:
    """What is to be known of a program that failed; with ``small`` of the smallest one that fails alike."""
    source = Seeded(seed * 2**32 + number)
    try:
        judge(source, number)
    except Broken as wrong:
        found, property = wrong, wrong.property
    else:
        return {"number": number, "property": "repeat", "message": "it failed once, and not again", "program": ""}
    numbers = list(source.numbers)
    if small:

        def fails(trial: Sequence[int]) -> bool:
            again = broken(trial, number)
            return again is not None and again.property == property

        numbers = shrink(numbers, fails, SHRINK_SECONDS)
        found = broken(numbers, number) or found
    try:
        text = print_program(grow(Replayed(numbers), number))
    except Exception as wrong:
        text = f"(it cannot be grown: {wrong})"
    return {"number": number, "property": property, "message": str(found)[:3000], "program": text, "choices": numbers}


def make_row(name: str, known: Counter[str]) -> Row:
    """Check the programs of one row, ``SEED:FIRST-LAST``."""
    seed, _, span = name.partition(":")
    first, last = map(int, span.split("-"))
    counts: Counter[str] = Counter()
    richness = Richness()
    failures: list[Row] = []
    start = time.process_time()
    for number in range(first, last + 1):
        try:
            counts += judge(Seeded(int(seed) * 2**32 + number), number, richness)
        except Broken as wrong:
            failures.append(failure(int(seed), number, small=known[wrong.property] < SHRUNK))
            known[wrong.property] += 1
    return {
        "name": name,
        "status": "failed" if failures else "passed",
        "programs": last + 1 - first,
        "cpu": round(time.process_time() - start, 2),
        "counts": counts,
        "failures": failures,
        "richness": richness.to_json(),
    }


def show_failure(seed: int, row: Row) -> None:
    click.echo(f"\nprogram {row['number']} of seed {seed}: {row['message']}\n{row['program']}")
    click.echo(f"again: tools/generated --seed {seed} --number {row['number']}")


@click.command(help=__doc__)
@click.option("--programs", "count", default=1000, show_default=True, help="How many.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--number", "numbers", multiple=True, type=int, help="Only the program of this number; shrink it if it fails."
)
@click.option("--shard", help="i/n: only every n-th part of the work, from the i-th.")
@click.option("--jobs", default=1, show_default=True, help="Processes.")
@click.option("--fresh", is_flag=True, help="Forget what is known.")
@click.option("--learn", is_flag=True, help="Write again which ops follow which in models, then stop.")
@click.option("--models/--no-models", "beside", default=True, help="Show the models' histograms beside.")
def main(
    count: int,
    seed: int,
    numbers: tuple[int, ...],
    shard: str | None,
    jobs: int,
    fresh: bool,
    learn: bool,
    beside: bool,
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if learn:
        Likeness.of([program.forward for program in captured().values()]).save()
        return
    if numbers:
        failed = [number for number in numbers if _one(seed, number)]
        sys.exit(1 if failed else 0)
    store = Store("generated", fingerprint(*TOOLS))
    if fresh and shard is None:
        store.path.unlink(missing_ok=True)
    names = [f"{seed}:{first}-{min(first + CHUNK, count) - 1}" for first in range(0, count, CHUNK)]
    if jobs > 1 and shard is None:
        in_processes(jobs, ["--programs", str(count), "--seed", str(seed)])
    known: Counter[str] = Counter()
    shown: list[Row] = []

    def show(row: Row) -> None:
        shown.append(row)
        if sys.stderr.isatty():
            click.echo(f"\r{sum(r.get('programs', 0) for r in shown)} of {count} programs", nl=False, err=True)

    make_rows(store, part_of(names, shard), lambda name: make_row(name, known), False, show)
    report(shown, seed, beside and shard is None)
    sys.exit(1 if any(row["status"] != "passed" for row in shown) else 0)


def _one(seed: int, number: int) -> bool:
    """Whether one program fails; says how."""
    try:
        judge(Seeded(seed * 2**32 + number), number)
    except Broken:
        show_failure(seed, failure(seed, number, small=True))
        return True
    click.echo(f"program {number} of seed {seed}: every property holds")
    return False


def report(rows: list[Row], seed: int, beside: bool) -> None:
    """Print what was checked, what failed, and how rich the programs were; leave that as JSON too."""
    whole = [row for row in rows if "counts" in row]
    counts = Counter[str]()
    for row in whole:
        counts.update(row["counts"])
    failures = [found for row in whole for found in row["failures"]]
    generated = Richness.sum(row["richness"] for row in whole)
    programs, seconds = sum(row["programs"] for row in whole), sum(row["cpu"] for row in whole)
    click.echo(f"{programs} programs in {seconds:.0f} s of CPU time, {1e3 * seconds / max(programs, 1):.1f} ms each")
    for name, number in sorted(counts.items()):
        click.echo(f"  {number:8} {name}")
    if beside:
        models = {name: of_programs([program]) for name, program in captured().items()}
        click.echo("\n" + table(generated, models))
        (FOLDER / "generated.json").write_text(
            json.dumps({"programs": programs, "counts": counts, "failures": failures} | compare(generated, models))
        )
        (FOLDER / "generated.md").write_text(page(programs, counts, failures, table(generated, models)))
    for row in rows:
        if "counts" not in row:
            click.echo(f"\n{row['name']}: {row['reason']}")
    for found in failures:
        show_failure(seed, found)
    click.echo(
        f"\n{len(failures)} of {programs} programs failed" if failures else "\nevery property holds of every program"
    )


def page(programs: int, counts: Counter[str], failures: Sequence[Row], histograms: str) -> str:
    """The section of docs/coverage.md."""
    lines = [f"{number:9,} {name}" for name, number in sorted(counts.items())]
    found = [
        f"* {row['property']}, program {row['number']}: {' '.join(row['message'].split())[:160]}" for row in failures
    ]
    return "\n".join(
        [
            "## Generated programs",
            "",
            f"{programs:,} programs, {len(failures)} failures. How often each property held, and what was not judged:",
            "",
            *["```", *lines, "```"],
            "",
            *(found and ["What failed:", "", *found, ""]),
            "How rich they are, beside five models captured with their VJP:",
            "",
            *["```", *histograms.splitlines(), "```"],
            "",
        ]
    )


if __name__ == "__main__":
    main()
