"""Predict the trainings of Megatron-LM (Narayanan et al., SC'21, Table 1) with one constant.

The constant is the part of 312 TFLOP/s that an A100 reaches in a perfect matrix product. Each row in turn is left out,
the constant is fitted on the others, and the row is predicted. All else is counted: kernels and their shapes, bytes of
memory-bound kernels, sums over tensor ranks (300 GB/s within a host), sends (25 GB/s a GPU between hosts), the bubble,
sums of gradients over replicas, the update.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from planning.transformer import gpt

from daggc.plan.device import Device, Link
from daggc.plan.parallel import Chip, Choice, Machine, Model, simulate_choice

SEQUENCE, VOCABULARY = 2048, 51200


@dataclass(frozen=True)
class Row:
    """A training. ``chunk_layers``: layers of a chunk where ranks have several, else 0."""

    name: str
    layers: int
    hidden: int
    heads: int
    tensor: int
    pipeline: int
    chunk_layers: int
    microbatch: int
    gpus: int
    batch: int
    tflops: float

    @property
    def choice(self) -> Choice:
        data = self.gpus // (self.tensor * self.pipeline)
        chunks = self.layers // self.pipeline // self.chunk_layers if self.chunk_layers else 1
        count = self.batch // data // self.microbatch
        return Choice(self.pipeline, self.tensor, data, self.microbatch, count, chunks, recompute=True)

    @property
    def flops(self) -> float:
        """FLOPs of a step as the paper counts them: with the forward that is made again."""
        tokens = self.batch * SEQUENCE
        more = SEQUENCE / (6 * self.hidden) + VOCABULARY / (16 * self.layers * self.hidden)
        return 96.0 * tokens * self.layers * self.hidden**2 * (1 + more)


# Given with the task.
FITTED = (
    Row("39B", 48, 8192, 64, 8, 2, 0, 4, 512, 1536, 138),
    Row("145B", 80, 12288, 96, 8, 8, 5, 2, 1536, 2304, 148),
    Row("530B", 105, 20480, 128, 8, 35, 1, 1, 2520, 2520, 163),
)
# The paper's other rows: from memory, with the microbatches and chunks of Megatron-LM's examples/sc21/run_table_1.sh.
# Nothing was fitted on them.
HELD_OUT = (
    Row("1.7B", 24, 2304, 24, 1, 1, 0, 16, 32, 512, 137),
    Row("3.6B", 30, 3072, 32, 2, 1, 0, 16, 64, 512, 138),
    Row("7.5B", 36, 4096, 32, 4, 1, 0, 16, 128, 512, 142),
    Row("18B", 40, 6144, 48, 8, 1, 0, 8, 256, 1024, 135),
    Row("76B", 60, 10240, 80, 8, 4, 5, 2, 1024, 1792, 140),
    Row("310B", 96, 16384, 128, 8, 16, 3, 1, 1920, 2160, 155),
    Row("1T", 128, 25600, 160, 8, 64, 0, 1, 3072, 3072, 163),
)
A100 = Device(
    "gpu:0", "cuda", {"gemm": 3.12e14, "elementwise": 1.95e13}, 2.039e12, 80e9, overhead=0.0, launch=4e-6, threads=0
)


def model_of(row: Row, reached: float) -> Model:
    """A row's model on its machine."""
    machine = Machine(Chip(A100, reached), row.gpus, 8, Link(5e-6, 3e11), Link(1e-5, 2.5e10))
    return Model(gpt(row.layers, row.hidden, row.heads, SEQUENCE, VOCABULARY), machine, even=True)


def predict(row: Row, reached: float, simulated: bool = False) -> float:
    """TFLOP/s a GPU."""
    model = model_of(row, reached)
    if simulated:  # replicas do the same at the same time: one of them stands for all
        seconds = simulate_choice(model, replace(row.choice, data=1), row.choice).makespan
    else:
        estimate = model.estimate(row.choice)
        assert estimate is not None, f"{row.name}: {row.layers} layers are not {row.choice}"
        seconds = estimate.seconds
    return row.flops / seconds / row.gpus / 1e12


def fit(rows: Sequence[Row]) -> float:
    """The constant with the least sum of squared relative errors."""
    low, high = 0.3, 1.0
    for _ in range(20):  # golden section: to 5e-5
        a, b = high - 0.618034 * (high - low), low + 0.618034 * (high - low)
        low, high = (low, b) if _loss(rows, a) < _loss(rows, b) else (a, high)
    return (low + high) / 2


def _loss(rows: Sequence[Row], reached: float) -> float:
    return sum((predict(row, reached) / row.tflops - 1) ** 2 for row in rows)


def read_rows(path: str) -> tuple[Row, ...]:
    """Rows of a JSON file: a list of tables with the fields of :class:`Row`."""
    return tuple(Row(**row) for row in json.loads(Path(path).read_text()))


def left_out(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each row predicted with the constant fitted on the others."""
    found: list[dict[str, Any]] = []
    for row in rows:
        reached = fit([other for other in rows if other is not row])
        found.append(_judged(row, reached))
    return found


def _judged(row: Row, reached: float) -> dict[str, Any]:
    predicted = predict(row, reached, simulated=True)
    return {
        "model": row.name,
        "constant": round(reached, 4),
        "predicted": round(predicted, 1),
        "published": row.tflops,
        "error": round(predicted / row.tflops - 1, 4),
    }


@click.command()
@click.option("--rows", "path", help="A JSON file of other rows to leave out in turn.")
@click.option("--all", "everything", is_flag=True, help="Leave out each row of the whole paper in turn.")
@click.option("--parts", is_flag=True, help="Show where the time of each row goes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(path: str | None, everything: bool, parts: bool, as_json: bool) -> None:
    """Predicted TFLOP/s a GPU of Megatron-LM's trainings; exit status 1 if a prediction is off by over 10%."""
    rows = read_rows(path) if path else (*FITTED, *HELD_OUT) if everything else FITTED
    judged = left_out(rows)
    constant = fit(rows)
    held = [] if path or everything else [_judged(row, constant) for row in HELD_OUT]
    if as_json:
        click.echo(json.dumps({"left_out": judged, "held_out": held, "constant": constant}))
    else:
        click.echo("each row left out in turn:")
        _print(judged)
        if held:
            click.echo(f"held out, predicted with the constant {constant:.4f} of the rows above:")
            _print(held)
    if parts:
        for row in (*rows, *(HELD_OUT if held else ())):
            click.echo(f"{row.name}: {model_of(row, constant).estimate(row.choice)}")
    if any(abs(row["error"]) > 0.1 for row in (*judged, *held)):
        raise SystemExit(1)


def _print(rows: Sequence[dict[str, Any]]) -> None:
    click.echo(f"{'model':>6} {'constant':>9} {'predicted':>10} {'published':>10} {'error':>7}")
    for row in rows:
        name, constant, predicted, published, error = row.values()
        click.echo(f"{name:>6} {constant:9.4f} {predicted:10.1f} {published:10.0f} {error:+7.1%}")


if __name__ == "__main__":
    main()
