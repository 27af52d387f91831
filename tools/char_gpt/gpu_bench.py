"""Time a GPT on a CUDA device: eager PyTorch, daggc's generated code, and a train step on a GPU worker."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

import daggc
from char_gpt.model import GPT, Size, next_character_loss
from daggc.runtime.local_workers import local_workers


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median time of a call, the device's work included; three calls before are not counted."""
    times: list[float] = []
    for number in range(repeats + 3):
        synchronize()
        begun = time.perf_counter()
        work()
        synchronize()
        if number >= 3:
            times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make(size: Size, device: str) -> GPT:
    torch.manual_seed(0)
    return GPT(size).to(device)


def measure(size: Size, batch: int, microbatches: int, repeats: int, device: str) -> dict[str, float]:
    """Seconds of a training step (forward, backward, AdamW), by how it is run."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randint(size.vocabulary, (batch, size.block), generator=generator) for _ in range(2))
    result: dict[str, float] = {}

    eager = make(size, device)
    result["eager"] = seconds(trainer(eager, eager, x.to(device), y.to(device)), repeats)
    local = make(size, device)
    result["daggc.compile in this process"] = seconds(
        trainer(local, daggc.compile(local), x.to(device), y.to(device)), repeats
    )
    for workers in (1, 2):
        with local_workers(workers) as client:
            model = make(size, "cpu")
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            step = daggc.compile(model, client=client).train_step(
                next_character_loss, optimizer, microbatches=1 if workers == 1 else microbatches
            )
            name = f"train_step on {workers} worker{'s' if workers > 1 else ''} of this device"
            result[name] = seconds(lambda step=step: float(step(x, y)), repeats)
            step.close()
    return result


def trainer(model: GPT, called: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        optimizer.zero_grad()
        loss = next_character_loss(called(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu-out"))
    given = parser.parse_args(arguments)
    size = Size(1024, given.block, given.width, given.layers, 8)
    times = measure(size, given.batch, given.microbatches, given.repeats, given.device)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    facts = {"device": name, "torch": torch.__version__, "python": platform.python_version(), **vars(given)}
    given.out.mkdir(parents=True, exist_ok=True)
    figures = {"facts": {key: str(value) for key, value in facts.items()}, "seconds": times}
    (given.out / "benchmark.json").write_text(json.dumps(figures, indent=1) + "\n")
    table = Table("step", "ms", "tokens/s", "of eager", box=MARKDOWN)
    for how, spent in times.items():
        tokens = given.batch * given.block / spent
        table.add_row(how, f"{spent * 1e3:.1f}", f"{tokens:,.0f}", f"{times['eager'] / spent:.2f}x")
    with (given.out / "benchmark.md").open("w") as file:
        for console in (Console(width=100), Console(file=file, width=100)):
            console.print(f"GPT {size}, batch {given.batch}, f32, on {name}, torch {torch.__version__}", markup=False)
            console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
