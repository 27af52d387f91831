"""The findings of ``daggc doctor`` as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from daggc.runtime.doctor import Diagnosis

_COLORS = {"ok": "green", "warn": "yellow", "bad": "red"}


def doctor_table(diagnosis: Diagnosis) -> Table:
    """A row for each check; why it matters and what to set where it is not as it should be."""
    table = Table("", "check", "found", "what to do")
    for check in diagnosis.checks:
        color = _COLORS[check.level]
        settings = [f"{key}: {value}" for key, value in check.settings.items() if not isinstance(value, dict)]
        to_do = "\n".join(filter(None, [check.why if check.level != "ok" else "", check.fix, *settings]))
        table.add_row(f"[{color}]{check.level}[/{color}]", check.name, check.found, to_do)
    return table
