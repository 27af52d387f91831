"""Functions of torch whose result has a shape that hangs on data, as functions of that shape.

``ask(x)`` gives a number of the data, which becomes a constant of the program (see branches.py). With it each of these
is an ordinary function: ``x[mask]`` reads as many elements as the mask had when the model was captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Ask = Callable[[Tensor], int]  # the number in a tensor of one integer or bool
Handler = Callable[..., Any]  # (ask, *args, **kwargs) -> the result, or NotImplemented where nothing hangs on data


def _nonzero(ask: Ask, input: Tensor, *, as_tuple: bool = False) -> Any:
    size = ask((input != 0).sum())
    if not input.dim():  # torch gives no coordinates; as a tuple, those of one dimension
        return (input.new_zeros(size, dtype=torch.int64),) if as_tuple else input.new_zeros(size, 0, dtype=torch.int64)
    places = torch.nonzero_static(input, size=size)
    return places.unbind(1) if as_tuple else places


def _where(ask: Ask, condition: Tensor, *rest: Any, **named: Any) -> Any:
    return NotImplemented if rest or named else _nonzero(ask, condition, as_tuple=True)


def _masked_select(ask: Ask, input: Tensor, mask: Tensor) -> Tensor:
    input, mask = torch.broadcast_tensors(input, mask)
    return input.reshape(-1)[_nonzero(ask, mask.reshape(-1))[:, 0]]


def _getitem(ask: Ask, input: Tensor, index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    masks = [part for part in parts if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)]
    if not masks or any(not mask.dim() for mask in masks):
        return NotImplemented
    places: list[Any] = []
    for part in parts:
        is_mask = any(part is mask for mask in masks)
        places += _nonzero(ask, part, as_tuple=True) if is_mask else [part]
    return input[tuple(places)]


def _one_hot(ask: Ask, tensor: Tensor, num_classes: int = -1) -> Any:
    return NotImplemented if num_classes != -1 else F.one_hot(tensor, ask(tensor.max()) + 1)


def _bincount(ask: Ask, input: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    size = max(ask(input.max()) + 1 if input.numel() else 0, minlength)
    if weights is None:
        weights = torch.ones_like(input, dtype=torch.int64)
    elif weights.dtype != torch.float32:
        weights = weights.double()
    return weights.new_zeros(size).index_add(0, input.long(), weights)


def _repeat_interleave(ask: Ask, input: Tensor, repeats: Any = None, *args: Any, **named: Any) -> Any:
    if named.get("output_size") is not None:
        return NotImplemented
    if repeats is None:  # repeat_interleave(repeats) gives places
        return torch.repeat_interleave(input, output_size=ask(input.sum()))
    dim = args[0] if args else named.get("dim")
    if not isinstance(repeats, Tensor):
        return NotImplemented
    times = ask(repeats.sum())
    if repeats.numel() == 1:
        times *= input.shape[dim] if dim is not None else input.numel()
    return torch.repeat_interleave(input, repeats, dim, output_size=times)


def _tensor_split(ask: Ask, input: Tensor, places: Any = None, dim: int = 0, **named: Any) -> Any:
    places = next(iter(named.values())) if places is None else places
    if not isinstance(places, Tensor):
        return NotImplemented
    found = [ask(place) for place in places.reshape(-1)]
    return torch.tensor_split(input, found if places.dim() else found[0], dim)


def _narrow(ask: Ask, input: Tensor, dim: int, start: Any, length: int) -> Any:
    return torch.narrow(input, dim, ask(start), length) if isinstance(start, Tensor) else NotImplemented


HANDLERS: Mapping[Any, Handler] = {
    torch.nonzero: _nonzero,
    torch.Tensor.nonzero: _nonzero,
    torch.argwhere: _nonzero,
    torch.Tensor.argwhere: _nonzero,
    torch.where: _where,
    torch.masked_select: _masked_select,
    torch.Tensor.masked_select: _masked_select,
    torch.Tensor.__getitem__: _getitem,
    F.one_hot: _one_hot,
    torch._C._nn.one_hot: _one_hot,  # pyright: ignore[reportAttributeAccessIssue]  # made when torch is built
    torch.bincount: _bincount,
    torch.Tensor.bincount: _bincount,
    torch.repeat_interleave: _repeat_interleave,
    torch.Tensor.repeat_interleave: _repeat_interleave,
    torch.tensor_split: _tensor_split,
    torch.Tensor.tensor_split: _tensor_split,
    torch.narrow: _narrow,
    torch.Tensor.narrow: _narrow,
}
