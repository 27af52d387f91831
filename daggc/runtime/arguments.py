"""What ``daggc.compile`` and ``train_step`` are given, checked before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from distributed import Client

from daggc.errors import RunError
from daggc.plan.automatic import AUTO


def check_compile(client: Any, devices: Sequence[str] | None, stages: Any, pins: Any, codegen: str) -> None:
    """Raises RunError for arguments of ``daggc.compile`` that mean nothing."""
    if client is not None and not isinstance(client, Client):
        raise RunError(f"client is a distributed.Client, got {client!r}; open one: Client({client!r})")
    if client is not None and client.asynchronous:
        raise RunError("the Dask client is asynchronous; open one without asynchronous=True")
    if isinstance(devices, str):
        raise RunError(f"devices is a list of names, got {devices!r}; one device: [{devices!r}]")
    check_stages(stages)
    if pins is not None and not isinstance(pins, Mapping):
        raise RunError(f"pins is a dict, pattern of module paths -> device, got {pins!r}")
    if codegen not in ("torch", "inductor"):
        raise RunError(f"codegen is 'torch' or 'inductor', got {codegen!r}")


def check_stages(stages: Any) -> None:
    """Raises RunError for what is no number of stages."""
    if stages is not None and (not isinstance(stages, int) or stages < 1):
        raise RunError(f"stages is a whole number, at least 1, got {stages!r}")


def check_step(
    loss_fn: Any, optimizer: Any, counts: Mapping[str, Any], max_grad_norm: Any, stages: Any, replan_after: Any
) -> None:
    """Raises RunError for arguments of ``train_step`` that mean nothing; ``counts``: those that may be ``auto``."""
    if not callable(loss_fn) and loss_fn is not None:
        raise RunError(f"loss_fn is a function of the model's result and the target, or None, got {loss_fn!r}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise RunError(f"optimizer is an object of torch.optim, made of the model's parameters, got {optimizer!r}")
    for name, count in counts.items():
        if count != AUTO and (not isinstance(count, int) or count < 1):
            raise RunError(f"{name} is a whole number, at least 1, or {AUTO!r}, got {count!r}")
    if max_grad_norm is not None and (not isinstance(max_grad_norm, int | float) or not max_grad_norm > 0):
        raise RunError(f"max_grad_norm is a positive number, got {max_grad_norm!r}")
    check_stages(stages)
    if replan_after is not None and (not isinstance(replan_after, int) or replan_after < 1):
        raise RunError(f"replan_after is a number of steps, at least 1, got {replan_after!r}")
