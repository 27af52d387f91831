"""Messages on their way: their tensors' elements in the message, beside it in frames, or in shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from distributed.protocol import dask_deserialize, dask_serialize, to_serialize

from daggc.runtime.channel.layout import Layout, aligned_copy, fill, frame, places, unpacked
from daggc.runtime.channel.shared import Block, Mappings

Fields = dict[str, Any]  # of a message


class Frames:
    """Bytes that Dask is to hand over as they came: tensors are made of them by the thread that wants them."""

    __slots__ = ("frames",)

    def __init__(self, frames: list[memoryview]) -> None:
        self.frames = frames


@dask_serialize.register(Frames)
def _serialize(given: Frames) -> tuple[Fields, list[memoryview]]:
    return {}, given.frames


@dask_deserialize.register(Frames)
def _deserialize(header: Fields, frames: list[Any]) -> Frames:
    return Frames([memoryview(one).cast("B") for one in frames])


class Letter:
    """A message that has come; ``parts``: the bytes of each tensor that has elements."""

    def __init__(self, layouts: Sequence[Layout], parts: Sequence[memoryview | torch.Tensor]) -> None:
        self.layouts, self.parts = layouts, parts

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The tensors, views of the bytes where those are in shared memory."""
        parts = iter(self.parts)
        return tuple(unpacked(layout, _bytes(next(parts) if layout.nbytes else b""), device) for layout in self.layouts)


def _bytes(part: memoryview | bytes | torch.Tensor) -> torch.Tensor:
    return part if isinstance(part, torch.Tensor) else aligned_copy(memoryview(part))


def described(layouts: Sequence[Layout]) -> list[Any]:
    """Layouts as plain data."""
    return [(layout.dtype, layout.shape, layout.strides) for layout in layouts]


def inside(elements: Sequence[torch.Tensor]) -> Fields:
    """Elements as part of the message: for few bytes."""
    return {"data": b"".join(frame(one) for one in elements if one.numel())}


def beside(elements: Sequence[torch.Tensor]) -> Fields:
    """Elements sent from where they are, beside the message."""
    return {"data": to_serialize(Frames([frame(one) for one in elements if one.numel()]))}


def shared(block: Block, layouts: Sequence[Layout], elements: Sequence[torch.Tensor]) -> Fields:
    """Elements copied to shared memory."""
    for place, one in zip(places(layouts)[0], elements, strict=True):
        if one.numel():
            fill(block.data[place], one)
    return {"block": block.where}


def unshared(block: Block, layouts: Sequence[Layout]) -> Fields:
    """Elements that are in shared memory which the receiver does not share, beside the message."""
    return beside([block.data[place] for place in places(layouts)[0]])


def opened(layouts: Sequence[Layout], data: bytes | Frames | None, block: Any, mappings: Mappings) -> Letter | None:
    """A message that has come; None if it is in memory that is not shared with this process."""
    if isinstance(data, Frames):
        return Letter(layouts, data.frames)
    found, nbytes = places(layouts)
    if block is not None:
        memory = mappings.read(block, nbytes)
        return None if memory is None else Letter(layouts, [memory[p] for p in found if p.stop > p.start])
    given, parts, start = memoryview(data or b""), [], 0
    for layout in layouts:
        if layout.nbytes:
            parts.append(given[start : start + layout.nbytes])
            start += layout.nbytes
    return Letter(layouts, parts)
