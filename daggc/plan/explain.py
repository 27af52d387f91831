"""The plan as text: what runs where, what it is predicted to take, and why it was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from daggc.plan.plan import Plan, Stage


def explain(plan: Plan) -> str:
    """Stages, devices, predictions and reasons, as lines of at most about 120 characters."""
    devices = list(dict.fromkeys(stage.device for stage in plan.stages))
    what = "training step" if plan.training else "request"
    work = f"{_plural(len(plan.tasks), 'task')} for a {what} on one batch"
    lines = [
        f"{_plural(len(plan.stages), 'stage')} on {_plural(len(devices), 'device')}, {work}",
        "",
        *table(
            ("stage", "device", "modules", "FLOPs", "share", "params", "memory", "sends", "gets back", "time"),
            [_stage_row(stage) for stage in plan.stages],
        ),
        "",
        *table(("device", "share", "memory", "of", "busy"), _device_rows(plan, devices)),
        "",
        "Predicted",
        f"  one batch, from input to the last result: {seconds(plan.seconds)} ({' > '.join(plan.critical)})",
        f"  busiest device: {seconds(plan.slowest)}",
        f"  at least, without transfers: {seconds(plan.seconds_bound)} a batch, busiest device {seconds(plan.bound)}",
        "",
        "Why",
    ]
    for alternative in plan.alternatives:
        cost = "not possible" if alternative.seconds is None else f"busiest device {seconds(alternative.seconds)}"
        lines.append(f"  {alternative.description}: {cost}; {alternative.reason}")
    lines += [f"  note: {note}" for note in plan.notes]
    return "\n".join(lines) + "\n"


def _stage_row(stage: Stage) -> tuple[str, ...]:
    return (
        str(stage.index),
        stage.device,
        span(stage.paths),
        quantity(stage.flops),
        f"{stage.share:.1%}",
        nbytes(stage.param_bytes),
        nbytes(stage.memory),
        nbytes(stage.sent),
        nbytes(stage.returned),
        seconds(stage.seconds),
    )


def _device_rows(plan: Plan, devices: Sequence[str]) -> list[tuple[str, ...]]:
    shares = plan.shares()
    rows: list[tuple[str, ...]] = []
    for name in devices:
        own = [stage for stage in plan.stages if stage.device == name]
        memory, busy = plan.memory[name], sum(stage.seconds for stage in own)
        room = plan.cluster.device(name).memory
        rows.append((name, f"{shares[name]:.1%}", nbytes(memory), nbytes(room), seconds(busy)))
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they need; words to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    words = {column for column, name in enumerate(head) if name in ("device", "modules", "task")}
    return [
        "  ".join(
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def span(paths: Sequence[str], width: int = 44) -> str:
    """First and last module of a list, shortened from the left where they are long."""
    if not paths:
        return "-"
    text = paths[0] if len(paths) == 1 else f"{paths[0]} .. {paths[-1]}"
    return text if len(text) <= width else f"...{text[3 - width :]}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def quantity(number: float) -> str:
    """``12.3G`` for 12.3e9."""
    for factor, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.3g}"


def nbytes(number: float) -> str:
    """``1.5 GB``."""
    return f"{quantity(number)[:-1]} {quantity(number)[-1]}B" if number >= 1e3 else f"{number:.0f} B"


def seconds(number: float) -> str:
    """``12.3 ms``."""
    if number >= 1:
        return f"{number:.3g} s"
    return f"{number * 1e3:.3g} ms" if number >= 1e-3 else f"{number * 1e6:.3g} us"
