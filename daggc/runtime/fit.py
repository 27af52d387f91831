"""A plain training loop over a train step: what ``daggc train`` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from distributed import Client
from torch import nn

from daggc.errors import RunError
from daggc.runtime.batch import arguments_of
from daggc.runtime.compile import compile
from daggc.runtime.train import LazyLoss, TrainStep

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}

Batches = Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class FitOptions:
    """How to train.

    Attributes:
        steps: how many in all, those before a checkpoint included.
        optimizer: a name of :data:`OPTIMIZERS`.
        accumulate: so many batches are one step.
        save: path of the checkpoint written every ``every`` steps (0: only at the end) and at the end.
        resume: path of a checkpoint to go on from; batches that it has seen are passed over.
    """

    steps: int
    optimizer: str = "adamw"
    rate: float = 1e-3
    accumulate: int = 1
    microbatches: int | str = 1
    replicas: int | str = 1
    schedule: str = "1f1b"
    max_grad_norm: float | None = None
    save: Path | None = None
    every: int = 0
    resume: Path | None = None
    seed: int = 0


def fit(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    batches: Batches,
    options: FitOptions,
    client: Client | None = None,
    report: Callable[[int, float, TrainStep], None] | None = None,
) -> TrainStep:
    """Train a model; weights and optimizer state are in the model and the optimizer afterwards.

    Args:
        loss_fn: as for :meth:`daggc.runtime.module.CompiledModule.train_step`.
        batches: called for each pass over the data; gives tuples of arguments, or dicts of keywords.
        client: where to train; this process without one.
        report: told the number of each step that has ended (1 is the first), its loss, and the train step.

    Raises:
        RunError: there are no batches, or the checkpoint is of another model.
    """
    if options.accumulate < 1:
        raise RunError(f"a step is of at least one batch, got accumulate={options.accumulate}")
    if options.optimizer not in OPTIMIZERS:
        raise RunError(f"an optimizer is one of {', '.join(OPTIMIZERS)}, got {options.optimizer!r}")
    torch.manual_seed(options.seed)
    optimizer = OPTIMIZERS[options.optimizer](model.parameters(), lr=options.rate)
    step = compile(model, client=client).train_step(
        loss_fn,
        optimizer,
        microbatches=options.microbatches,
        replicas=options.replicas,
        schedule=options.schedule,
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
    )
    if options.resume is not None:
        step.load(options.resume)
    waiting: tuple[int, LazyLoss] | None = None

    def settle() -> None:
        if waiting is not None and report is not None:
            report(waiting[0], float(waiting[1]), step)

    source = _endless(batches)
    for number in range(1, options.steps + 1):
        group = list(islice(source, options.accumulate))
        if number <= step.steps:
            continue
        loss = step.accumulate(group)
        settle()  # the step before: the workers have the next one already
        waiting = (number, loss)
        if options.save is not None and options.every and number % options.every == 0:
            step.save(options.save)
    settle()
    step.sync()
    if options.save is not None:
        step.save(options.save)
    return step


def _endless(batches: Batches) -> Iterator[Any]:
    """Pass over the batches again and again. Raises RunError if a pass has none."""
    while True:
        empty = True
        for batch in batches():
            empty = False
            yield batch if isinstance(batch, Mapping) else arguments_of(batch)[0]
        if empty:
            raise RunError("there are no batches to train on")
