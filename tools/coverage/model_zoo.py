"""Models of transformers through daggc, beside eager: outputs, loss, gradients of parameters and inputs, buffers.

Each model runs in f32, in train mode with dropout at 0 and in eval mode; eager's f64 run is the reference.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click
import judge
import torch
from families import BY_NAME, FAMILIES, family_of
from results import Row, Store, fingerprint, guarded, in_processes, make_rows, part_of, text_of
from torch import nn

import daggc
from daggc.errors import CaptureError
from daggc.frontend.pytree import flatten

SECONDS = 240  # for one model
MODES = ("train", "eval")


@dataclass
class Run:
    """One call and one backward of a model, by name of what it gave."""

    outputs: list[torch.Tensor]
    loss: torch.Tensor | None
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]


def run(name: str, mode: str, dtype: torch.dtype, compiled: bool) -> tuple[Run, Any]:
    """Build the model anew, call it, and differentiate its loss, or its outputs along a random direction.

    Returns:
        What it gave, and the model that ran.
    """
    model, inputs = BY_NAME[name].make()
    model = model.to(dtype).train(mode == "train")
    inputs = {key: _cast(value, dtype) for key, value in inputs.items()}
    called: nn.Module = daggc.compile(model) if compiled else model
    result = called(**inputs)
    outputs = flatten(result)[0]
    loss = result.get("loss") if hasattr(result, "get") else None
    objective = loss if loss is not None and loss.requires_grad and mode == "train" else _along(outputs)
    objective.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    gradients |= {key: x.grad for key, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    buffers = {key: buffer.detach().clone() for key, buffer in model.named_buffers()}
    return Run([x.detach() for x in outputs], loss, gradients, buffers), called


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_(value.requires_grad)


def _along(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """All outputs, along a random direction that is the same in every dtype."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for x in outputs:
        if x.requires_grad:
            total = total + (x.double() * torch.randn(x.shape, dtype=torch.float64, generator=generator)).sum()
    return total


def compare(got: Run, eager: Run, exactly: Run | None) -> None:
    """Raises Wrong naming the first tensor that differs by more than is allowed.

    Args:
        exactly: eager's run in f64, None where a kernel of the model has no f64.
    """
    exactly = exactly or Run([], None, {}, {})
    if len(got.outputs) != len(eager.outputs):
        raise judge.Wrong(f"{len(got.outputs)} outputs for {len(eager.outputs)}")
    for index, (mine, theirs) in enumerate(zip(got.outputs, eager.outputs, strict=True)):
        exact = exactly.outputs[index] if index < len(exactly.outputs) else None
        judge.compare(f"output {index}", mine, theirs, exact)
    least = 1e-6 * judge.norm_of(list(eager.gradients.values()))
    for name, theirs in eager.gradients.items():
        mine = got.gradients[name]
        if (mine is None) != (theirs is None):
            raise judge.Wrong(f"gradient of {name}: {'none' if mine is None else 'one'}, unlike eager")
        judge.compare(f"gradient of {name}", mine, theirs, exactly.gradients.get(name), least)
    for name, theirs in eager.buffers.items():
        judge.compare(f"buffer {name}", got.buffers[name], theirs, exactly.buffers.get(name))


def measure(name: str) -> Row:
    """The row of one model."""
    family = BY_NAME[name]
    row: Row = {"name": name, "family": family_of(name), "kind": family.kind, "status": "measured"}
    row["parameters"] = sum(x.numel() for x in family.make()[0].parameters())
    doors: set[str] = set()
    for mode in family.modes:
        eager = run(name, mode, torch.float32, compiled=False)[0]
        try:
            exactly = run(name, mode, torch.float64, compiled=False)[0]
        except RuntimeError:
            exactly = None
        start = time.perf_counter()
        try:
            got, compiled = run(name, mode, torch.float32, compiled=True)
            compare(got, eager, exactly)
            row[mode] = "equal"
            program = next(reversed(compiled._entries.values())).program
            doors |= {str(node.attrs["target"]) for node in program.forward.nodes if node.op.endswith(".call")}
            row["nodes"] = len(program.forward.nodes)
        except judge.Wrong as wrong:
            row[mode], row["reason"] = "wrong", str(wrong)
        except CaptureError as wrong:
            row[mode], row["reason"] = "refused", text_of(wrong)
        except TimeoutError:
            raise
        except Exception as wrong:
            row[mode], row["reason"] = "failed", text_of(wrong)
        row[f"{mode}_seconds"] = round(time.perf_counter() - start, 2)
    row["doors"] = sorted(doors)
    return row


def line(row: Row) -> str:
    doors = " ".join(row.get("doors", ())) or "portable"
    numbers = f"{row.get('parameters', 0):9,} {row.get('nodes', 0):6} {row.get('train_seconds', 0):6.1f}"
    cells = f"{row.get('train', '-'):8} {row.get('eval', '-'):8}"
    return f"{row['name']:44} {row.get('kind', ''):18} {cells} {numbers} {row.get('reason', '') or doors}"


def summary(rows: Sequence[Row]) -> list[str]:
    def verdict(row: Row) -> str:
        found = [row.get(mode, "failed") for mode in BY_NAME[row["name"]].modes]
        return next((bad for bad in ("wrong", "failed", "refused") if bad in found), "equal")

    verdicts = [verdict(row) for row in rows]
    portable = sum(verdict(row) == "equal" and not row["doors"] for row in rows)
    families = {row.get("family") for row in rows if verdict(row) == "equal"}
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("equal", "refused", "wrong", "failed"))
    return [f"{len(rows)} classes: {counts}; {len(families)} families equal; {portable} classes wholly portable"]


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(BY_NAME)), help="Only these (not stored).")
@click.option("--errors", is_flag=True, help="Print the traceback of what fails.")
@click.option("--fresh", is_flag=True, help="Measure again what is known.")
@click.option("--jobs", default=1, help="Processes.")
@click.option("--shard", help="Only part i of n, as i/n.")
def main(models: tuple[str, ...], errors: bool, fresh: bool, jobs: int, shard: str | None) -> None:
    """Small models of the families of transformers, beside eager PyTorch.

    Rows are kept in .cache/coverage/zoo.jsonl and made anew where the code has changed.
    """
    torch.set_num_threads(1)

    def make(name: str) -> Row:
        return guarded(measure, name, SECONDS)

    store = Store("zoo", fingerprint("model_zoo.py", "families.py", "judge.py"))
    if models:
        rows = [make(name) for name in models]
        click.echo("\n".join([*map(line, rows), *summary(rows)]))
        return
    if jobs > 1:
        in_processes(jobs, ["--fresh"] if fresh else [])
    else:
        make_rows(store, part_of(list(BY_NAME), shard), make, fresh, lambda row: click.echo(line(row)))
    known = store.read()
    rows = [known[family.name] for family in FAMILIES if family.name in known]
    if jobs > 1:
        click.echo("\n".join(map(line, rows)))
    click.echo("\n".join(summary(rows)))


if __name__ == "__main__":
    main()
