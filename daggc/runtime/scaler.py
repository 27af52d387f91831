"""torch's GradScaler, read: how the loss is scaled, and the scale in and out.

The scale is state of the step, on the workers; the scaler stays the user's: its options are read when a step is
submitted, and ``sync`` writes the scale back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from daggc.errors import RunError
from daggc.plan.bodies import SCALING_STATE, Scaling
from daggc.runtime.optimizers import Group

Scaler = torch.amp.GradScaler
REFS = tuple(f"state:{key}" for key in SCALING_STATE)
_SCALE, _GROWTH, _SKIPPED = REFS


def scaling_of(scaler: Scaler | None) -> Scaling | None:
    """How the loss is scaled; None if it is not: without a scaler, and with one that is disabled."""
    if scaler is None or not scaler.is_enabled():
        return None
    return Scaling(scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval())


def check_scaled(scaler: Scaler | None, groups: tuple[Group, ...], model: nn.Module) -> None:
    """Raises RunError for what cannot be trained with a scaled loss."""
    if scaler is None:
        return
    if not isinstance(scaler, Scaler):
        raise RunError(f"scaler is a torch.amp.GradScaler, got a {type(scaler).__name__}")
    parameters = dict(model.named_parameters())
    for name in (name for group in groups for name in group.names):
        if scaler.is_enabled() and parameters[name].dtype == torch.float16:
            raise RunError(
                f"parameter {name!r} is of float16, whose gradients cannot be unscaled, nor in torch: keep parameters "
                "in float32 and call the step under torch.autocast"
            )


def read_scale(scaler: Scaler | None) -> dict[str, torch.Tensor]:
    """The state of loss scaling, by port ref; nothing if the loss is not scaled."""
    if scaling_of(scaler) is None:
        return {}
    assert scaler is not None
    state = scaler.state_dict()
    return {
        _SCALE: torch.tensor(state["scale"], dtype=torch.float32),
        _GROWTH: torch.tensor(state["_growth_tracker"], dtype=torch.int32),
        _SKIPPED: torch.tensor(0.0, dtype=torch.float64),
    }


def write_scale(scaler: Scaler | None, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the scale that came from workers, or a checkpoint, into the scaler; its options stay as they are."""
    if scaling_of(scaler) is not None and _SCALE in tensors:
        assert scaler is not None
        own = {"scale": tensors[_SCALE].item(), "_growth_tracker": int(tensors[_GROWTH])}
        scaler.load_state_dict({**scaler.state_dict(), **own})


def rescaled(scaler: Scaler | None, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the scaler has another scale by now than this state."""
    return any(not torch.equal(tensors[ref], own) for ref, own in read_scale(scaler).items() if ref != _SKIPPED)


def skipped(tensors: Mapping[str, torch.Tensor]) -> int:
    """How many of the steps since the state was put there were skipped."""
    return int(tensors[_SKIPPED]) if _SKIPPED in tensors else 0


def unskipped(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same state, none of its steps counted as skipped."""
    return {ref: torch.zeros_like(tensor) if ref == _SKIPPED else tensor for ref, tensor in tensors.items()}
