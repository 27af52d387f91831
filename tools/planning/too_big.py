"""A model whose training does not fit the memory of one worker, and fits two.

Workers get a limit that Dask enforces: what holds more is killed. It leaves room for half of what a step needs, and is
less than parameters and optimizer state. On one such worker daggc refuses, with the bytes that are short; on two it
trains, and the losses are those of PyTorch without a limit. By default this needs some 12 GB of memory in all.
"""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from unequal import USABLE, batch, begin, mlp, unequal_workers

from daggc.errors import PlanError
from daggc.runtime.memory import resident_now

MB = 1e6
_SPARE = 1.06  # of what is predicted, what each worker may use


@dataclass(frozen=True)
class TooBig:
    """What came of it, in bytes.

    Attributes:
        parameters: and AdamW's state of them.
        limit: of each worker's process; ``room``: what tasks may use of it.
        refused: what daggc says on one worker.
        predicted, held: at most by tasks, by device; ``process``: by the whole process, since it began.
        losses: of the steps on two workers; ``eager``: of PyTorch.
    """

    parameters: int
    state: int
    limit: int
    room: float
    refused: str
    predicted: dict[str, float]
    held: dict[str, float]
    process: dict[str, float]
    losses: list[float]
    eager: list[float]

    @property
    def error(self) -> float:
        """The largest difference of a loss to eager's, as a part of it."""
        return max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(self.losses, self.eager, strict=True))

    def __str__(self) -> str:
        lines = [
            f"parameters {self.parameters / MB:.0f} MB, AdamW's state {self.state / MB:.0f} MB",
            f"a worker may hold {self.limit / MB:.0f} MB, tasks {self.room / MB:.0f} MB of it",
            f"one worker: {self.refused}",
        ]
        for name, predicted in self.predicted.items():
            lines.append(
                f"two workers, {name}: predicted {predicted / MB:.0f} MB, held {self.held[name] / MB:.0f} MB; "
                f"the process at most {self.process[name] / MB:.0f} MB of {self.limit / MB:.0f}"
            )
        shown = " ".join(f"{loss:.5f}" for loss in self.losses)
        return "\n".join([*lines, f"{len(self.losses)} steps, losses {shown}", f"eager's but for {self.error:.1e}"])


def too_big(width: int, layers: int, samples: int, steps: int) -> TooBig:
    """Train a perceptron with AdamW on two workers that have room for half of it each."""
    data = batch(width, samples)
    with unequal_workers([0, 0]) as client:
        base = max(client.run(resident_now).values())
        free = begin(mlp(width, layers), client, stages=2, execution="lanes").plan_for(*data).predicted.peaks
    limit = round((base + _SPARE * max(free.values())) / USABLE)
    with unequal_workers([limit]) as client:
        try:
            begin(mlp(width, layers), client).plan_for(*data)
            refused = "it fits"
        except PlanError as wrong:
            refused = str(wrong)
    with unequal_workers([limit, limit]) as client:
        step = begin(mlp(width, layers), client)
        losses = [float(step(*data)) for _ in range(steps)]
        program = step.step_program
        assert program is not None and step.pool is not None
        names = {address: device for device, address in step.pool.addresses.items()}
        process = {names[address]: most for address, most in client.run(most_resident).items()}
        room = min(device.memory for device in program.cluster.devices)
        predicted, held = program.predicted.peaks, dict(step.compare().measured_memory)
    model = mlp(width, layers)
    nbytes = sum(own.numel() * own.element_size() for own in model.parameters())
    eager = eager_losses(model, data, steps)
    return TooBig(nbytes, 2 * nbytes, limit, room, refused, predicted, held, process, losses, eager)


def eager_losses(model: torch.nn.Module, data: tuple[torch.Tensor, ...], steps: int) -> list[float]:
    """Of the same steps in PyTorch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[0]), data[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def most_resident() -> float:
    """The most bytes that a worker's process has held since the last count began; runs there."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(fields["VmHWM"].split()[0]) * 1024


@click.command(help=__doc__)
@click.option("--width", default=8192, show_default=True)
@click.option("--layers", default=6, show_default=True)
@click.option("--samples", default=64, show_default=True)
@click.option("--steps", default=6, show_default=True)
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
def main(out: Path | None, **sizes: Any) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    found = too_big(**sizes)
    click.echo(str(found))
    if out is not None:
        out.write_text(json.dumps({**asdict(found), "error": found.error}, indent=1) + "\n")


if __name__ == "__main__":
    main()
