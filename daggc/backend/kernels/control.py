"""Branches and loops: which of the functions generated from graphs inside a node run, and how often."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Tensors = Sequence[torch.Tensor]
Body = Callable[..., tuple[torch.Tensor, ...]]  # (device, *inputs)


def cond(device: torch.device, otherwise: Body, then: Body, predicate: torch.Tensor, operands: Tensors) -> Tensors:
    """One of two branches."""
    return (then if bool(predicate) else otherwise)(device, *operands)


def while_loop(device: torch.device, body: Body, goes_on: Body, carries: Tensors, extra: Tensors) -> Tensors:
    """Run ``body`` on the carries as long as ``goes_on``."""
    while bool(goes_on(device, *carries, *extra)[0]):
        carries = body(device, *carries, *extra)
    return tuple(carries)


def scan(
    device: torch.device, body: Body, carries: Tensors, xs: Tensors, extra: Tensors, length: int, reverse: bool
) -> Tensors:
    """Run ``body`` on each slice along the first axis; the results that are not carries are stacked."""
    count = len(carries)
    steps: list[Tensors] = []
    for index in reversed(range(length)) if reverse else range(length):
        results = body(device, *carries, *(x[index] for x in xs), *extra)
        carries = results[:count]
        steps.append(results[count:])
    if reverse:
        steps.reverse()
    return (*carries, *(torch.stack(results) for results in zip(*steps, strict=True)))
