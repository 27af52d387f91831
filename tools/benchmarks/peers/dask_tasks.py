"""What runs on the workers when Dask is used by hand: two stages of a GPT, each in a process of its own.

What autograd keeps between forward and backward stays in the worker's process; activations and their gradients are
results of tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.models import CASES
from benchmarks.peers.stages import Stage, stages_of


@dataclass
class State:
    """Of a worker: its stage, what microbatches keep for backward, and the losses of the step so far."""

    stage: Stage
    optimizer: torch.optim.Optimizer
    loss_fn: Callable[..., torch.Tensor]
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    losses: list[torch.Tensor] = field(default_factory=list)


HERE: dict[str, State] = {}
"""This process's, under ``stage``."""


def start(case: str, number: int, cut: int) -> None:
    """Take a stage of a new model."""
    own = CASES[case]
    stage = stages_of(own.make()[0], [cut])[number]
    assert own.optimizer is not None and own.loss is not None
    HERE["stage"] = State(stage, own.optimizer(stage.parameters()), own.loss)


def forward(part: int, tokens: torch.Tensor, *after: Any) -> torch.Tensor:
    """The first stage; gives the activation of a microbatch."""
    own = HERE["stage"]
    own.kept[part] = own.stage(tokens)
    return own.kept[part].detach()


def forward_backward(activation: torch.Tensor, target: torch.Tensor, parts: int, *after: Any) -> torch.Tensor | None:
    """The last stage; gives the gradient of the activation."""
    own = HERE["stage"]
    entering = activation.detach().requires_grad_()
    loss = own.loss_fn(own.stage(entering), target) / parts
    loss.backward()
    own.losses.append(loss.detach())
    return entering.grad


def backward(part: int, gradient: torch.Tensor) -> None:
    """The first stage's."""
    HERE["stage"].kept.pop(part).backward(gradient)


def update(*after: Any) -> float:
    """Update a stage's parameters; gives the loss of the step where it is known."""
    own = HERE["stage"]
    own.optimizer.step()
    own.optimizer.zero_grad()
    loss = sum(loss.item() for loss in own.losses)
    own.losses.clear()
    return loss
