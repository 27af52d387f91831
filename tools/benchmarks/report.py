"""The figures as JSON, and as tables between markers of docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.local import Row
from benchmarks.results import Results
from benchmarks.ways import REFERENCE, TARGETS, WAYS, in_words, settings_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
LOCAL, WORKERS = "", " workers"
"""The parts of the page, as their markers name them."""


def table(rows: Sequence[Row]) -> str:
    """Of what was measured in this process, in Markdown."""
    lines = [
        "| model | threads | eager, ms | daggc, ms | of eager | at most | eager, MB | daggc, MB | memory of eager |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = f"{row.eager_ms:,.1f} | {row.daggc_ms:,.1f} | {row.ratio:.3f} | {row.limit:.2f}"
        sizes = f"{row.eager_bytes / 1e6:,.0f} | {row.daggc_bytes / 1e6:,.0f} | {row.memory:.2f}"
        lines.append(f"| {row.case} | {row.threads} | {times} | {sizes} |")
    return "\n".join(lines)


def ways_table(case: str, results: Results) -> str:
    """How long a step of a case takes each way, in Markdown; ways that were neither timed nor refused are left out."""
    lines = [
        f"| {case} | seconds | of {WAYS[case][REFERENCE].title} | first loss | settings |",
        "|---|---|---|---|---|",
    ]
    for name, way in WAYS[case].items():
        seconds, ratio = results.seconds(name), results.ratio(name, REFERENCE)
        if seconds is None or ratio is None:
            if name in results.notes and name not in results.losses:
                lines.append(f"| {way.title} | {results.notes[name]} | | | |")
            continue
        own = settings_of(way, name, results)
        settings = in_words(own) + (f": {results.notes[name]}" if "auto" in own.values() else "")
        lines.append(f"| {way.title} | {seconds:.3f} | {ratio:.3f} | {results.losses[name][0]:.5f} | {settings} |")
    return "\n".join(lines)


def targets_table(cases: Mapping[str, Results]) -> str:
    """What was wanted, in Markdown."""
    lines = ["| model | | beside | ratio | at most | rounds |", "|---|---|---|---|---|---|"]
    for case, results in cases.items():
        for target in TARGETS[case]:
            ratio = results.ratio(target.way, target.reference)
            if ratio is not None:
                one, other = (WAYS[case][name].title for name in (target.way, target.reference))
                count = results.count(target.way, target.reference)
                lines.append(f"| {case} | {one} | {other} | {ratio:.3f} | {target.limit:.2f} | {count} |")
    return "\n".join(lines)


def workers_text(cases: Mapping[str, Results]) -> str:
    """The tables of all cases, then what was wanted of them."""
    return "\n\n".join([*(ways_table(case, results) for case, results in cases.items()), targets_table(cases)])


def read_json(path: Path) -> tuple[list[Row], dict[str, Results]]:
    """What :func:`write_json` wrote: rows of this process, and results by case; nothing if there is no file."""
    found = json.loads(path.read_text()) if path.exists() else {"local": [], "workers": {}}
    return [_row(own) for own in found["local"]], {case: Results(**own) for case, own in found["workers"].items()}


def write_json(local: Sequence[Row], cases: Mapping[str, Results], path: Path) -> None:
    """All figures, in one file that later runs add to."""
    workers = {case: results.as_json() for case, results in cases.items()}
    path.write_text(json.dumps({"local": [_record(row) for row in local], "workers": workers}, indent=1) + "\n")


def _record(row: Row) -> dict[str, Any]:
    return {**asdict(row), "memory": row.memory}


def _row(record: Mapping[str, Any]) -> Row:
    return Row(**{name: value for name, value in record.items() if name != "memory"})


def put_in_page(text: str, part: str = LOCAL, page: Path = PAGE) -> None:
    """Replace what is between the markers of a part. Raises ValueError if the page has none."""
    begin, end = (f"<!-- tools/bench{part}: {edge} -->" for edge in ("begin", "end"))
    before, first, rest = page.read_text().partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise ValueError(f"{page} has no line {begin} with a line {end} after it")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")
