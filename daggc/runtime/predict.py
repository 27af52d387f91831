"""A training step as it would be planned and run on devices that need not be there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from daggc.errors import RunError
from daggc.plan.bodies import Group
from daggc.plan.device import Cluster
from daggc.runtime.batch import call_with_loss, read_batch
from daggc.runtime.step_program import Options, StepBuilder, StepProgram

KINDS: Mapping[str, tuple[str, Mapping[str, bool]]] = {
    "adamw": ("adamw", {}),
    "adam": ("adamw", {"decoupled": False}),
    "sgd": ("sgd", {}),
}


def predict_step(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    batch: tuple[Any, ...] | dict[str, Any],
    cluster: Cluster,
    optimizer: str = "adamw",
    options: Options | None = None,
) -> StepProgram:
    """Plan a training step; its ``predicted`` is the simulation of it. Nothing is run.

    Args:
        loss_fn: as for :meth:`daggc.runtime.module.CompiledModule.train_step`.
        batch: what a step is called with: a tuple of arguments, or keywords.
        optimizer: ``adamw``, ``adam`` or ``sgd``, over all parameters that are trained.

    Raises:
        CaptureError, PlanError: the step cannot be captured, or does not fit.
    """
    if optimizer not in KINDS:
        raise RunError(f"an optimizer is one of {', '.join(KINDS)}, got {optimizer!r}")
    kind, attrs = KINDS[optimizer]
    trained = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    builder = StepBuilder(model, call_with_loss(loss_fn), cluster, options or Options())
    read = read_batch((batch,) if isinstance(batch, dict) else batch, {})
    return builder.build([read], [Group("0", trained, kind, attrs)], False)
