"""Train a character-level GPT across worker processes, look at everything that was made on the way, and check it."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import daggc
from char_gpt.data import Text, batch, read_text
from char_gpt.model import GPT, Size, next_character_loss, sample
from daggc.frontend.export import capture
from daggc.ir.graph import Program
from daggc.ir.printer import print_program
from daggc.report.mermaid import to_mermaid
from daggc.report.picture import picture
from daggc.report.stages import at_stage
from daggc.report.step_timeline import step_timeline
from daggc.runtime.batch import call_with_loss
from daggc.runtime.local_workers import local_workers
from daggc.runtime.train import TrainStep

TOLERANCE = 1e-3  # nats a character: f32 sums in another order drift apart step by step; typically 1e-5 after 20
CLIP = 1.0

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    steps: int
    limit: float
    workers: int
    batch: int
    microbatches: int
    schedule: str
    size: Size
    rate: float
    compare: int
    out: Path
    seed: int

    @property
    def tokens(self) -> int:
        """Characters of one step."""
        return self.batch * self.size.block


@dataclass(frozen=True)
class Run:
    """Losses of the first steps, and characters a second once it was running."""

    losses: list[float]
    speed: float


@dataclass(frozen=True)
class Comparison:
    """Largest difference of a loss from eager's over so many steps; eager's characters a second by threads."""

    difference: float
    steps: int
    speeds: dict[int, float]


def read_options(arguments: Sequence[str] | None, vocabulary: int) -> Options:
    parser = argparse.ArgumentParser(
        prog="tools/demo", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=240, help="training steps")
    parser.add_argument("--limit", type=float, default=120, help="seconds of training after which it stops early")
    parser.add_argument("--workers", type=int, default=2, help="Dask worker processes, one thread each")
    parser.add_argument("--batch", type=int, default=64, help="pieces of text in a batch")
    parser.add_argument("--microbatches", type=int, default=4, help="parts of a batch, pipelined over the workers")
    parser.add_argument("--schedule", choices=("1f1b", "gpipe"), default="1f1b", help="order of the parts")
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks")
    parser.add_argument("--width", type=int, default=128, help="of the residual stream; divisible by --heads")
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument("--block", type=int, default=64, help="characters the model sees at once")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--compare", type=int, default=20, help="first steps that eager PyTorch repeats")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for what is written")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and samples")
    given = parser.parse_args(arguments)
    for name in ("steps", "workers", "batch", "microbatches", "layers", "width", "heads", "block"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} is at least 1")
    if given.width % given.heads:
        parser.error("--width must be divisible by --heads")
    size = Size(vocabulary, given.block, given.width, given.layers, given.heads)
    return Options(
        given.steps,
        given.limit,
        given.workers,
        given.batch,
        given.microbatches,
        given.schedule,
        size,
        given.rate,
        min(given.compare, given.steps),
        given.out,
        given.seed,
    )


def make(options: Options) -> tuple[GPT, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Model, optimizer and schedule, the same at every call."""
    torch.manual_seed(options.seed)
    model = GPT(options.size)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.95))
    warm = min(20, options.steps)

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(step / options.steps, 1.0)))
        return min((step + 1) / warm, 1.0) * (0.03 + 0.97 * cosine)

    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def main(arguments: Sequence[str] | None = None) -> int:
    """The demonstration; returns the exit status: 1 if losses differ from eager's."""
    torch.set_num_threads(1)
    text = read_text()
    options = read_options(arguments, len(text.alphabet))
    options.out.mkdir(parents=True, exist_ok=True)
    model, optimizer, scheduler = make(options)
    count = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"[bold]A GPT of {count:,} parameters[/] on {len(text.train):,} characters of English "
        f"(pydoc_data.topics), alphabet of {len(text.alphabet)}"
    )
    with local_workers(options.workers) as client:
        console.print(f"{options.workers} Dask worker processes, one torch thread each\n")
        compiled = daggc.compile(model, client=client)
        step = compiled.train_step(
            next_character_loss,
            optimizer,
            microbatches=options.microbatches,
            schedule=options.schedule,
            max_grad_norm=CLIP,
            threads=1,
        )
        begun = time.perf_counter()
        first = float(step(*batch(text.train, options.size.block, options.batch, 0, options.seed)))
        scheduler.step()
        console.print(f"captured, differentiated, planned and run once in {time.perf_counter() - begun:.1f} s\n")
        console.print(step.explain(), markup=False)
        write_stages(options, model, step, text)
        trained = train(options, step, scheduler, text, first)
        step.sync()
        step.save(options.out / "checkpoint.safetensors")
        step.close()
    held_back = evaluate(options, model, text)
    write_sample(options, model, text)
    return conclude(options, trained, held_back, compare(options, text, trained))


def train(
    options: Options, step: TrainStep, scheduler: torch.optim.lr_scheduler.LRScheduler, text: Text, first: float
) -> Run:
    """All steps after the first, with a progress bar; the timeline of one is written on the way."""
    losses = [first]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    pictured = min(options.steps - 1, 12)
    begun = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=options.steps, completed=1, loss=first, speed=0.0)
        waiting = None  # the loss of the step before: reading it does not hold the workers up
        for number in range(1, options.steps):
            if number == pictured:  # this step runs alone
                losses += [] if waiting is None else [float(waiting)]
                waiting = None
                step.records()
            loss = step(*batch(text.train, options.size.block, options.batch, number, options.seed))
            scheduler.step()
            if number == pictured:
                float(loss)
                write_timeline(options, step)
            losses += [] if waiting is None else [float(waiting)]
            waiting = loss
            speed = (len(losses) - 1) * options.tokens / (time.perf_counter() - begun)
            progress.update(bar, completed=len(losses), loss=mean(losses[-20:]), speed=speed)
            if time.perf_counter() - begun > options.limit:
                progress.console.print(f"stopped after {options.limit:g} seconds (--limit), at step {number + 1}")
                break
        losses += [] if waiting is None else [float(waiting)]
        speed = (len(losses) - 1) * options.tokens / (time.perf_counter() - begun)
        progress.update(bar, completed=len(losses), loss=mean(losses[-20:]), speed=speed)
    return Run(losses, speed)


def write_timeline(options: Options, step: TrainStep) -> None:
    """What the tasks of the step that ran last did when, beside the prediction."""
    assert step.step_program is not None and step.pool is not None, "a step has been run on workers"
    page = step_timeline(step.step_program.step, step.pool.cluster, step.records(), "daggc demo: one training step")
    (options.out / "timeline.html").write_text(page)


def write_stages(options: Options, model: GPT, step: TrainStep, text: Text) -> None:
    """The program at each stage of compilation, as text and as a Mermaid flowchart."""
    assert step.step_program is not None, "a step has been run"
    micro = batch(text.train, options.size.block, step.step_program.sizes[0], 0, options.seed)
    captured = capture(model, micro, {}, call_with_loss(next_character_loss)).program
    stages: dict[str, Program] = {
        "1-captured": captured,
        "2-simplified": at_stage(captured, "simplified"),
        "3-vjp": at_stage(captured, "vjp"),
        "4-plan": step.step_program.plan.program,
        "5-step": step.step_program.step.program,
    }
    folder = options.out / "ir"
    folder.mkdir(exist_ok=True)
    for name, program in stages.items():
        (folder / f"{name}.dag").write_text(print_program(program))
        (folder / f"{name}.mmd").write_text(to_mermaid(picture(program)))


@torch.no_grad()
def evaluate(options: Options, model: GPT, text: Text, batches: int = 8) -> float:
    """Mean loss on the text that was held back."""
    losses = [
        next_character_loss(model(x), y).item()
        for x, y in (batch(text.held_back, options.size.block, 32, number, options.seed) for number in range(batches))
    ]
    return mean(losses)


def write_sample(options: Options, model: GPT, text: Text) -> None:
    """What the trained model writes."""
    start = "The "
    written = start + text.decode(sample(model, text.encode(start), 500, options.seed))
    (options.out / "sample.txt").write_text(written + "\n")
    console.rule("a sample from the trained model")
    console.print(written, markup=False)
    console.rule()


def compare(options: Options, text: Text, trained: Run) -> Comparison:
    """Repeat the first steps in eager PyTorch: same seed, same batches, whole batches, this process."""
    model, optimizer, scheduler = make(options)
    losses: list[float] = []
    speeds: dict[int, float] = {}
    for threads, count in ((1, options.compare), (options.workers, min(options.compare, 5))):
        torch.set_num_threads(threads)
        begun = time.perf_counter()
        for _ in range(count):
            x, y = batch(text.train, options.size.block, options.batch, len(losses), options.seed)
            loss = next_character_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        speeds[threads] = count * options.tokens / (time.perf_counter() - begun)
    differences = [abs(a - b) for a, b in zip(trained.losses, losses[: options.compare], strict=False)]
    return Comparison(max(differences, default=0.0), len(differences), speeds)


def conclude(options: Options, trained: Run, held_back: float, comparison: Comparison) -> int:
    """The summary; returns the exit status."""
    equal = comparison.difference <= TOLERANCE
    final = mean(trained.losses[-20:])
    console.print(
        f"\n[bold]Loss[/] {trained.losses[0]:.3f} -> {final:.3f} nats a character over {len(trained.losses)} steps; "
        f"{held_back:.3f} on text held back"
    )
    verdict = "[green]the same[/]" if equal else "[red]DIFFERENT[/]"
    console.print(
        f"[bold]Against eager PyTorch[/], same seed and batches: losses of the first {comparison.steps} steps differ "
        f"by at most {comparison.difference:.1e} ({verdict}; {TOLERANCE:g} allowed)"
    )
    console.print(f"[bold]Speed[/] daggc on {options.workers} worker processes: {trained.speed:,.0f} tokens/s")
    for threads, speed in comparison.speeds.items():
        what = "1 thread" if threads == 1 else f"{threads} threads"
        console.print(f"      eager in one process, {what}: {speed:,.0f} tokens/s")
    console.print(f"[bold]In {options.out}/[/]")
    for name, what in (
        ("checkpoint.safetensors", "weights, optimizer state, step count: what step.load() continues from"),
        ("timeline.html", "one training step, predicted above measured; open it in a browser"),
        ("ir/*.dag", "the program captured, simplified, with its VJP, planned, and as a whole step"),
        ("ir/*.mmd", "the same as Mermaid flowcharts"),
        ("sample.txt", "the text above"),
    ):
        console.print(f"  {name:<24}{what}")
    if not equal:
        print("tools/demo: losses differ from eager PyTorch's by more than they may", file=sys.stderr)
    return 0 if equal else 1


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


if __name__ == "__main__":
    sys.exit(main())
