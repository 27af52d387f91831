"""Functions of torch that export cannot follow as they are, and what stands in their place during capture.

Their Python or the sizes of their tables look at data, of which capture has none; or torch declares another shape
than it gives; or they go through an op of their own where there is a composition with the same numbers.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.adaptive import _ASMoutput
from torch.overrides import TorchFunctionMode

from daggc.errors import CaptureError
from daggc.frontend import linalg_data
from daggc.frontend.opaque import capturing

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


def _linear_cross_entropy(*args: Any, **kwargs: Any) -> Tensor:
    """Whole: the options say only in what pieces it is computed."""
    given = inspect.signature(functional.linear_cross_entropy).bind(*args, **kwargs)
    given.arguments["options"] = None
    return functional.linear_cross_entropy(*given.args, **given.kwargs)


def _pack_padded_sequence(*args: Any, **kwargs: Any) -> NoReturn:
    raise CaptureError(
        "pack_padded_sequence makes tensors whose sizes depend on the lengths, which cannot be captured; run the "
        "recurrent net on the padded sequences and mask its results, or mark the function with @daggc.opaque"
    )


def _combinations(input: Tensor, r: int = 2, with_replacement: bool = False) -> Tensor:
    """``torch.combinations``: torch's own selects by a mask, though how many there are does not hang on data."""
    choose = itertools.combinations_with_replacement if with_replacement else itertools.combinations
    places = list(choose(range(len(input)), r))
    return input[torch.tensor(places, dtype=torch.int64, device=input.device).reshape(-1, r)] if r else input[:0]


_IN_PLACE_OF = {
    torch.combinations: _combinations,
    torch._VF._pack_padded_sequence: _pack_padded_sequence,  # pyright: ignore  # made at run time
    functional.gaussian_nll_loss: _gaussian_nll_loss,
    functional.ctc_loss: _ctc_loss,
    functional.multilabel_margin_loss: _multilabel_margin_loss,
    torch.ctc_loss: _ctc_loss,
    **linalg_data.IN_PLACE_OF,
}
if hasattr(functional, "linear_cross_entropy"):  # new in torch 2.13
    _IN_PLACE_OF[functional.linear_cross_entropy] = _linear_cross_entropy


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _IN_PLACE_OF.get(func, func)(*args, **(kwargs or {}))


def _adaptive_log_softmax(module: nn.AdaptiveLogSoftmaxWithLoss, x: Tensor, target: Tensor) -> Any:
    """Every cluster of classes sees every row; a target that is no class, an error in eager, gives NaN."""
    if target.dim() > 1 or x.dim() != target.dim() + 1 or x.shape[:-1] != target.shape:
        raise ValueError(f"inputs [N, F] and targets [N], or [F] and [], are required, got {x.shape}, {target.shape}")
    rows, labels = torch.atleast_2d(x), torch.atleast_1d(target)
    head = functional.log_softmax(module.head(rows), 1)
    output = torch.full_like(head[:, 0], math.nan)
    bounds = [0, *module.cutoffs]
    for cluster, (low, high) in enumerate(pairwise(bounds)):
        place = (labels.clamp(low, high - 1) - low).unsqueeze(1)
        if cluster == 0:
            chosen = head.gather(1, place)
        else:
            tail = functional.log_softmax(module.tail[cluster - 1](rows), 1)
            chosen = tail.gather(1, place) + head[:, module.shortlist_size + cluster - 1].unsqueeze(1)
        output = torch.where((labels >= low) & (labels < high), chosen.squeeze(1), output)
    return _ASMoutput(output.reshape(target.shape), -output.mean())


@contextmanager
def stand_ins() -> Iterator[None]:
    """While capturing in this thread: what stands in place of functions and forwards is called."""
    original = nn.AdaptiveLogSoftmaxWithLoss.forward

    def forward(self: nn.AdaptiveLogSoftmaxWithLoss, input_: Tensor, target_: Tensor) -> Any:
        return _adaptive_log_softmax(self, input_, target_) if capturing() else original(self, input_, target_)

    nn.AdaptiveLogSoftmaxWithLoss.forward = forward
    try:
        with _Functions():
            yield
    finally:
        nn.AdaptiveLogSoftmaxWithLoss.forward = original
