"""A batch as the user gives it, and its microbatches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from daggc.backend.serializers import copied
from daggc.errors import RunError
from daggc.frontend.pytree import Spec, flatten, input_names

LossFn = Callable[..., Any]


@dataclass(frozen=True)
class Batch:
    """The tensors of a batch.

    Attributes:
        leaves: in the order of the ``input`` ports.
        spec: of ``(args, kwargs)`` as :func:`call_with_loss` takes them.
        names: targets of the ``input`` ports.
        size: samples: the size of axis 0 of the batched leaves.
        batched: for each leaf, whether axis 0 is the batch.
    """

    leaves: tuple[torch.Tensor, ...]
    spec: Spec
    names: tuple[str, ...]
    size: int
    batched: tuple[bool, ...]

    @property
    def batched_names(self) -> tuple[str, ...]:
        return tuple(name for name, batched in zip(self.names, self.batched, strict=True) if batched)

    def part(self, start: int, size: int) -> list[torch.Tensor]:
        """The leaves of one microbatch, as they are now: the user may fill the same memory with the next batch."""
        return [
            copied(leaf[start : start + size] if batched else leaf)  # of a view, Dask would send all of its memory
            for leaf, batched in zip(self.leaves, self.batched, strict=True)
        ]

    def examples(self, size: int) -> list[torch.Tensor]:
        """The leaves with ``size`` samples, to capture with: cut off, or the samples repeated."""
        leaves: list[torch.Tensor] = []
        for leaf, batched in zip(self.leaves, self.batched, strict=True):
            repeats = -(-size // leaf.shape[0]) if batched else 1
            leaves.append((torch.cat([leaf] * repeats) if repeats > 1 else leaf)[:size] if batched else leaf)
        return leaves

    def signature(self) -> tuple[Any, ...]:
        """What a captured program of a microbatch depends on, but for the number of samples."""
        shapes = tuple(
            (leaf.dtype, leaf.shape[1:] if batched else leaf.shape, strides_of(leaf), batched)
            for leaf, batched in zip(self.leaves, self.batched, strict=True)
        )
        return str(self.spec.tree), shapes


def strides_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """How a tensor lies in memory, which a model's Python and views see; () if it is contiguous."""
    if tensor.layout != torch.strided or tensor.is_contiguous():
        return ()
    return tensor.stride()


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a loader's batch is for a model: a dict its keywords, a tuple or list its arguments, else the only one."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}


def read_batch(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Batch:
    """Take a batch apart: every tensor whose axis 0 is as long as the first tensor's is cut along it.

    Raises RunError if there is no tensor with an axis to cut, or no sample.
    """
    leaves, spec = flatten((tuple(args), dict(kwargs)))
    sizes = [leaf.shape[0] for leaf in leaves if leaf.dim()]
    if not sizes:
        raise RunError("a batch has at least one tensor with a batch axis (axis 0)")
    if not sizes[0]:
        raise RunError("a batch without samples cannot be trained on: axis 0 of its first tensor has size 0")
    batched = tuple(leaf.dim() > 0 and leaf.shape[0] == sizes[0] for leaf in leaves)
    detached = tuple(leaf.detach() for leaf in leaves)
    return Batch(detached, spec, tuple(input_names(spec.tree)), sizes[0], batched)


def call_with_loss(loss_fn: LossFn | None) -> Callable[..., torch.Tensor]:
    """``call(model, *args, **kwargs) -> loss``, which a training step captures.

    With a loss function the last positional argument is its target: ``loss_fn(model(*args[:-1], **kwargs),
    target)``; if that is a lone dict, the model takes it as keywords and the loss function as it is. Without
    one, the model gives its own loss, and a lone dict is its keywords.
    """

    def call(model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        whole = len(args) == 1 and not kwargs and isinstance(args[0], Mapping)
        if loss_fn is None:
            return _own_loss(model(**args[0]) if whole else model(*args, **kwargs))
        if whole:
            return _scalar(loss_fn(model(**args[0]), args[0]))
        if len(args) < 2:
            got = next((type(own).__name__ for own in args), "nothing")
            more = f", got one {got}: step(*batch)" if got in ("list", "tuple") else ""
            raise RunError(f"step(*inputs, target) needs the model's inputs and the target of the loss{more}")
        return _scalar(loss_fn(model(*args[:-1], **kwargs), args[-1]))

    return call


def _own_loss(result: Any) -> torch.Tensor:
    """The loss a model returned: ``.loss``, ``["loss"]``, a lone scalar, or the first of a tuple."""
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if loss is None and isinstance(result, tuple | list) and result:
        loss = result[0]
    if loss is None:
        loss = result
    return _scalar(loss)


def _scalar(loss: Any) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        got = f"a {loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise RunError(f"a training step needs a loss that is one floating-point number, got {got}; give loss_fn=")
    return loss
