"""The figures as JSON, and as a table between two markers of docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.local import Row

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- tools/bench: begin -->", "<!-- tools/bench: end -->"


def table(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [
        "| model | threads | eager, ms | daggc, ms | of eager | at most | eager, MB | daggc, MB | memory of eager |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = f"{row.eager_ms:,.1f} | {row.daggc_ms:,.1f} | {row.ratio:.3f} | {row.limit:.2f}"
        sizes = f"{row.eager_bytes / 1e6:,.0f} | {row.daggc_bytes / 1e6:,.0f} | {row.memory:.2f}"
        lines.append(f"| {row.case} | {row.threads} | {times} | {sizes} |")
    return "\n".join(lines)


def write_json(rows: Sequence[Row], path: Path) -> None:
    """All figures, with the ratio of memory."""
    path.write_text(json.dumps([{**asdict(row), "memory": row.memory} for row in rows], indent=1) + "\n")


def put_in_page(text: str, page: Path = PAGE) -> None:
    """Replace what is between the markers. Raises ValueError if the page has none."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no line {BEGIN} with a line {END} after it")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
