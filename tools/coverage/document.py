"""docs/coverage.md, from the rows that the coverage tools have kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import click
import model_zoo
import modules
import opdb
import torch
from results import FOLDER, ROOT, Row, Store

HEAD = """# Coverage

What of PyTorch daggc takes, and whether the numbers are eager's. `tools/coverage_docs` makes this page from the rows
that `tools/opdb`, `tools/modules`, `tools/zoo`, `tools/generated` and `tools/mutate` keep: do not edit it.

*Equal* means: the error's norm is at most 4 times eager's own error against its f64 run, plus 16 units in the
last place (`tools/coverage/judge.py`). *Portable* means that a program has no `torch.call` or `python.call`, so the
NumPy interpreter runs it where torch is absent. *Refused* means a `CaptureError` before anything runs, with the reason.
"""

OPERATORS = """Every entry with f32 samples on a CPU, or i64 ones where it has no f32; up to three distinct samples of
each, the largest among them. A row's cell is the worst of its samples. Random ops are compared in distribution."""

MODELS = """Small configurations with random weights, in f32: outputs, loss, all gradients and buffers, in train mode
(with dropout at 0, differentiating the loss) and in eval mode (differentiating all outputs)."""


def block(lines: Sequence[str]) -> str:
    return "\n".join(["```", *lines, "```"])


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cells(row: Sequence[Any]) -> str:
        return f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |"

    return "\n".join([cells(head), cells(["---"] * len(head)), *map(cells, rows)])


def reasons(row: Row, columns: Sequence[str]) -> str:
    found = [row.get("reason", ""), *(row.get(f"{column}_reason", "") for column in columns)]
    return "; ".join(dict.fromkeys(reason for reason in found if reason))[:240]


def op_db(rows: Sequence[Row]) -> str:
    """The summary, the entries that fall short, and those that go through the door."""
    good = (*opdb.OK, "yes", None)
    short = [
        row
        for row in rows
        if row["status"] != "measured" or any(row.get(c) not in good for c in opdb.COLUMNS if c != "portable")
    ]
    doors = Counter(
        door for row in rows if row.get("portable") == "no" for door in row.get("portable_reason", "").split()
    )
    cells = [[row["name"], *(row.get(c, "") for c in opdb.COLUMNS), reasons(row, opdb.COLUMNS)] for row in short]
    portable = [row["name"] for row in rows if row.get("portable") == "yes" and row.get("forward") == "equal"]
    return "\n\n".join(
        [
            "## Operators: torch's op_db",
            OPERATORS,
            block(opdb.summary(rows)),
            f"Left out, without such samples (each counts as a failure): {', '.join(opdb.LEFT_OUT)}.",
            f"### What falls short ({len(short)})",
            table(["entry", *opdb.COLUMNS, "reason"], cells),
            "Through the door `torch.call`: " + (", ".join(f"`{door}`" for door in sorted(doors)) or "none") + ".",
            f"### Equal and wholly portable ({len(portable)})",
            ", ".join(portable) + ".",
        ]
    )


def torch_nn(rows: Sequence[Row]) -> str:
    columns = modules.COLUMNS
    cells = [[row["name"], *(row.get(c, "") for c in columns), reasons(row, columns)] for row in rows]
    return "\n\n".join(
        [
            "## torch.nn: torch's module_db",
            "Outputs, gradients of parameters and of inputs, and buffers, for the samples of every module.",
            block(modules.summary(rows)),
            table(["module", *columns, "reason"], cells),
        ]
    )


def families(rows: Sequence[Row]) -> str:
    def what(row: Row) -> str:
        return row.get("reason", "") or " ".join(f"`{door}`" for door in row.get("doors", ())) or "portable"

    columns = ("name", "family", "kind", "train", "eval", "nodes")
    cells = [[*(row.get(c, "") for c in columns), what(row)] for row in rows]
    return "\n\n".join(
        [
            "## Models: families of transformers",
            MODELS,
            block(model_zoo.summary(rows)),
            table(["class", *columns[1:], "doors, or the reason"], cells),
        ]
    )


def kept(tool: str, names: Sequence[str]) -> list[Row]:
    """The last rows of a tool, of whatever code, in the order of its table."""
    rows = Store(tool, "").read(stale=True)
    return [rows[name] for name in names if name in rows]


def texts() -> list[str]:
    """What other tools say of themselves: ``FOLDER/NAME.md``."""
    return [path.read_text().rstrip() for name in ("generated", "mutate") if (path := FOLDER / f"{name}.md").exists()]


@click.command()
def main() -> None:
    """Write docs/coverage.md, and the same rows as JSON to .cache/coverage/coverage.json."""
    found = {
        "opdb": kept("opdb", list(opdb.ENTRIES)),
        "modules": kept("modules", list(modules.ENTRIES)),
        "zoo": kept("zoo", list(model_zoo.BY_NAME)),
    }
    parts = [HEAD.rstrip(), f"Measured with torch {torch.__version__.split('+')[0]} on a CPU."]
    parts += [op_db(found["opdb"]), torch_nn(found["modules"]), families(found["zoo"]), *texts()]
    (ROOT / "docs" / "coverage.md").write_text("\n\n".join(parts) + "\n")
    (FOLDER / "coverage.json").write_text(json.dumps(found, indent=1))
    click.echo("docs/coverage.md")


if __name__ == "__main__":
    main()
