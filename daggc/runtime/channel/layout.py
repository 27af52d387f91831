"""The bytes of a tensor on its way, and the tensor of the same dtype, shape and strides that they become.

What travels are the elements and nothing else: neither gaps between them nor those of a dimension that was expanded are
sent more or less often than the shape says. Where the elements lie in memory without gaps, in whatever order of the
dimensions, the tensor at the other end is a view of the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from daggc.errors import RunError

_ALIGNED = 64
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # copied as bits, whatever they mean


@dataclass(frozen=True, slots=True)
class Layout:
    """What a tensor is, apart from its elements."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


def packed(tensor: torch.Tensor) -> tuple[Layout, torch.Tensor]:
    """A tensor's layout, and its elements: a tensor whose elements are to be sent row by row.

    Raises:
        RunError: it has no plain bytes (sparse, quantized, meta).
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        kind = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
        raise RunError(f"only tensors with plain bytes can be sent to other workers, got one that is {kind}")
    plain = tensor.detach()
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    layout = Layout(str(plain.dtype).removeprefix("torch."), tuple(plain.shape), plain.stride())
    if not plain.is_contiguous():
        order = _order(layout)
        plain = plain if order is None else plain.permute(order)
    word = _WORDS.get(plain.element_size())
    return layout, plain if word is None else plain.view(word)


def frame(elements: torch.Tensor) -> memoryview:
    """Elements as bytes, without a copy where they lie without gaps; not for a tensor without elements."""
    return elements.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def fill(target: torch.Tensor, elements: torch.Tensor) -> None:
    """Copy elements, from wherever they are, to bytes of their number."""
    target.view(elements.dtype).view(elements.shape).copy_(elements)


def unpacked(layout: Layout, data: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor of a layout whose bytes are ``data`` (u8[nbytes] on the CPU): a view of them where that can be."""
    dtype: torch.dtype = getattr(torch, layout.dtype)
    if device.type != "cpu":
        data = data.to(device)
    if math.prod(layout.shape) == 0 or _order(layout) is not None:
        return data.view(dtype).as_strided(layout.shape, layout.strides)
    return _spread(layout, data.cpu()).to(device).view(dtype).as_strided(layout.shape, layout.strides)


def aligned_copy(data: memoryview) -> torch.Tensor:
    """Bytes in memory of torch's allocator."""
    copy = torch.empty(len(data), dtype=torch.uint8)
    copy.numpy()[...] = np.frombuffer(data, np.uint8)
    return copy


def _order(layout: Layout) -> tuple[int, ...] | None:
    """The dimensions from the outermost to the innermost in memory; None if elements overlap or leave gaps."""
    order = sorted(range(len(layout.shape)), key=lambda dim: (-layout.strides[dim], dim))
    step = 1
    for dim in reversed(order):
        if layout.shape[dim] > 1:
            if layout.strides[dim] != step:
                return None
            step *= layout.shape[dim]
    return tuple(order)


def _spread(layout: Layout, data: torch.Tensor) -> torch.Tensor:
    """Elements put where the strides have them; those that share a place are equal."""
    size = getattr(torch, layout.dtype).itemsize
    last = sum((n - 1) * stride for n, stride in zip(layout.shape, layout.strides, strict=True))
    spread = torch.zeros((last + 1) * size, dtype=torch.uint8)
    element = np.dtype(f"V{size}")
    places = np.lib.stride_tricks.as_strided(
        spread.numpy().view(element), layout.shape, tuple(stride * size for stride in layout.strides)
    )
    places[...] = data.numpy().view(element).reshape(layout.shape)
    return spread


def total(layouts: Sequence[Layout]) -> int:
    """Bytes of all elements."""
    return sum(layout.nbytes for layout in layouts)


def places(layouts: Sequence[Layout]) -> tuple[list[slice], int]:
    """Where in one piece of memory the elements of each tensor lie, from 64-byte boundaries, and its bytes."""
    found, end = [], 0
    for layout in layouts:
        start = -(-end // _ALIGNED) * _ALIGNED
        end = start + layout.nbytes
        found.append(slice(start, end))
    return found, end
