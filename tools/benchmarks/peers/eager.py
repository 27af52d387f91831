"""PyTorch in one process: eager, or through ``torch.compile``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from benchmarks.models import CASES
from benchmarks.peers.serve import Training, floats, serve


def make(case: str, threads: int, compiled: bool = False) -> Training:
    """The plain loop of anyone who trains a model."""
    torch.set_num_threads(threads)
    own = CASES[case]
    model, (*inputs, target) = own.make()
    assert own.loss is not None and own.optimizer is not None
    loss_fn, optimizer = own.loss, own.optimizer(model.parameters())

    def loss_of(inputs: Sequence[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        return loss_fn(model(*inputs), target)

    forward = torch.compile(loss_of) if compiled else loss_of

    def run(steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = forward(inputs, target)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return floats(losses)

    return Training(run)


if __name__ == "__main__":
    serve(lambda **settings: make(sys.argv[1], **settings))
