"""Seconds of a training step of a GPT, several ways in turn, and their ratios to eager PyTorch on two threads."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median

import click
import torch
from rich.console import Console
from rich.table import Table

import daggc
from char_gpt.model import GPT, Size, next_character_loss
from daggc.runtime.local_workers import local_workers

Run = Callable[[], float]


def eager(model: GPT, batch: tuple[torch.Tensor, torch.Tensor], threads: int) -> Run:
    """One step of eager PyTorch with AdamW; gives the loss."""
    own = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-3)

    def run() -> float:
        torch.set_num_threads(threads)
        optimizer.zero_grad()
        loss = next_character_loss(own(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def stepped(model: GPT, batch: tuple[torch.Tensor, torch.Tensor], microbatches: int, threads: int) -> Run:
    """One train step of daggc; gives the loss."""
    own = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-3)
    step = daggc.compile(own).train_step(next_character_loss, optimizer, microbatches=microbatches)

    def run() -> float:
        torch.set_num_threads(threads)
        return float(step(*batch))

    return run


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Each way is timed once a round; medians are shown.")
@click.option("--width", default=512, show_default=True)
@click.option("--layers", default=8, show_default=True)
@click.option("--vocabulary", default=5000, show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--block", default=128, show_default=True)
@click.option("--microbatches", default=8, show_default=True)
def main(rounds: int, width: int, layers: int, vocabulary: int, batch: int, block: int, microbatches: int) -> None:
    """Time a training step of a GPT. Steps are waited for one by one, so nothing is submitted ahead."""
    torch.manual_seed(0)
    model = GPT(Size(vocabulary, block, width, layers, max(1, width // 64)))
    data = (torch.randint(vocabulary, (batch, block)), torch.randint(vocabulary, (batch, block)))
    here = {  # before there is a client, which daggc.compile would find
        "eager, 2 threads": eager(model, data, 2),
        "eager, 1 thread": eager(model, data, 1),
        "daggc in this process, 2 threads": stepped(model, data, 1, 2),
    }
    with local_workers(2):
        pipeline = f"daggc, 2 workers of 1 thread, {microbatches} microbatches"
        ways = {**here, pipeline: stepped(model, data, microbatches, 1)}
        losses = {name: run() for name, run in ways.items()}  # compiled here, and warm
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, run in ways.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    report(seconds, losses)


def report(seconds: dict[str, list[float]], losses: dict[str, float]) -> None:
    """Print medians, and medians of the ratios to eager on two threads in the same round."""
    reference = seconds["eager, 2 threads"]
    table = Table("how", "seconds", "of eager, 2 threads", "first loss")
    for name, times in seconds.items():
        ratio = median(own / base for own, base in zip(times, reference, strict=True))
        table.add_row(name, f"{median(times):.3f}", f"{ratio:.2f}", f"{losses[name]:.6f}")
    Console().print(table)


if __name__ == "__main__":
    main()
