"""Functions of torch that export cannot follow as they are, and what stands in their place during capture.

Their Python or the sizes of their tables look at data, of which capture has none; or torch declares another shape
than it gives; or they go through an op of their own where there is a composition with the same numbers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_library = torch.library.Library("daggc", "FRAGMENT")
for _overload, _lengths in (("Tensor", "Tensor"), ("IntList", "int[]")):
    _library.define(
        f"ctc_loss.{_overload}(Tensor log_probs, Tensor targets, {_lengths} input_lengths, {_lengths} target_lengths, "
        "int blank, int reduction, bool zero_infinity) -> Tensor"
    )


def _fake_ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int,
    reduction: int,
    zero_infinity: bool,
) -> Tensor:
    """torch's own gives a table whose size is that of the longest target."""
    return log_probs.new_empty(log_probs.shape[1:2] if reduction == 0 and log_probs.dim() == 3 else ())


for _overload in ("Tensor", "IntList"):
    torch.library.register_fake(f"daggc::ctc_loss.{_overload}", _fake_ctc_loss, lib=_library)


_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str | int = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """``ctc_loss`` of ``torch.nn.functional`` and, with a number as its reduction, of ``torch``."""
    number = _REDUCTIONS[reduction] if isinstance(reduction, str) else reduction
    op = torch.ops.daggc.ctc_loss
    if isinstance(input_lengths, Tensor) and isinstance(target_lengths, Tensor):
        return op.Tensor(log_probs, targets, input_lengths, target_lengths, blank, number, zero_infinity)
    given, wanted = (x.tolist() if isinstance(x, Tensor) else list(x) for x in (input_lengths, target_lengths))
    return op.IntList(log_probs, targets, given, wanted, blank, number, zero_infinity)


def _gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """``gaussian_nll_loss``; where eager raises an error for a negative variance, the loss is NaN."""
    if not isinstance(var, Tensor):
        if var < 0:
            raise ValueError("var has negative entry/entries")
        var = torch.full_like(input, var)
    if var.shape != input.shape:
        if input.shape[:-1] == var.shape:
            var = var.unsqueeze(-1)
        elif input.dim() != var.dim() or sum(y for x, y in zip(input.shape, var.shape, strict=True) if x != y) != 1:
            raise ValueError("var is of incorrect size")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{reduction} is not valid")
    low = (eps - var).where(var < eps, 0.0)
    clamped = var + low.detach()  # the derivative does not see that it is at least eps
    loss = 0.5 * (torch.log(clamped) + (input - target) ** 2 / clamped)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    loss = torch.where(var < 0, math.nan, loss)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _multilabel_margin_loss(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Without a batch, torch gives a number where it declares a tensor of one."""
    result = functional.multilabel_margin_loss(torch.atleast_2d(input), torch.atleast_2d(target), *args, **kwargs)
    return result.reshape(()) if input.dim() < 2 else result


_LINEAR_CROSS_ENTROPY = inspect.signature(functional.linear_cross_entropy)


def _linear_cross_entropy(*args: Any, **kwargs: Any) -> Tensor:
    """Whole: the options say only in what pieces it is computed."""
    given = _LINEAR_CROSS_ENTROPY.bind(*args, **kwargs)
    given.arguments["options"] = None
    return functional.linear_cross_entropy(*given.args, **given.kwargs)


_IN_PLACE_OF = {
    functional.gaussian_nll_loss: _gaussian_nll_loss,
    functional.ctc_loss: _ctc_loss,
    functional.linear_cross_entropy: _linear_cross_entropy,
    functional.multilabel_margin_loss: _multilabel_margin_loss,
    torch.ctc_loss: _ctc_loss,
}


class StandIns(TorchFunctionMode):
    """Active during capture: calls what stands in place of a function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _IN_PLACE_OF.get(func, func)(*args, **(kwargs or {}))
