"""A way's side of the comparison: it waits at a pipe, using no CPU, and trains when it is told to.

It reads orders as lines of JSON: ``{"make": settings}`` builds the training and takes its first two steps,
``{"run": n}`` takes n more. It answers each with a line: the losses of the steps, and what is to be known of it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Training:
    """What a way has built.

    Attributes:
        run: takes so many steps, one after the other, and gives their losses. Nothing has to wait for a loss
            before the last step is on its way. Of several processes those without a loss give none.
        note: what there is to say about it, once it has run.
        close: gives back what it holds.
    """

    run: Callable[[int], Sequence[float]]
    note: Callable[[], str] = str
    close: Callable[[], None] = lambda: None


def serve(make: Callable[..., Training]) -> None:
    """Follow orders until the pipe is closed. ``make`` gets the settings as keywords."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what is printed meanwhile is no answer
    training: Training | None = None
    for line in sys.stdin:
        order: Mapping[str, Any] = json.loads(line)
        if "make" in order:
            if training is not None:
                training.close()
            training = None
            gc.collect()
            training = make(**order["make"])
            losses = training.run(2)
        else:
            assert training is not None
            losses = training.run(order["run"])
        answers.write(json.dumps({"losses": list(losses), "note": training.note()}) + "\n")


def floats(losses: Sequence[torch.Tensor]) -> list[float]:
    """The numbers; waits for nothing on CPU."""
    return [loss.item() for loss in losses]
