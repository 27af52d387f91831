"""How tensors get from the client to the workers that read them first.

What is little goes inside the graph of tasks: a message less. What is much goes straight to its worker, before the
graph: the scheduler would take in, hold and send on the bytes of a graph, and do nothing else meanwhile (20 MB on one
machine: 100 ms, and 20 ms straight; the two cross at half a megabyte). The model's own tensors are sent once, and
again when they change.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from distributed import Future
from torch.utils.weak import WeakTensorKeyDictionary

from daggc.backend.dask_graph import Emission, Found, Source, add_data
from daggc.backend.serializers import copied
from daggc.runtime.pool import Pool

_IN_GRAPH = 1 << 18  # bytes for one worker that go inside the graph: up to here a message more costs as much
_SMALL = 1 << 12  # bytes of a tensor that always goes inside the graph


def add_inputs(data: Emission, pool: Pool | None, inputs: Iterable[tuple[str, torch.Tensor, str]]) -> list[Future]:
    """Send the inputs of a run, as they are now: what their owner does to them afterwards is not seen.

    Args:
        data: gets tasks for those that go inside the graph.
        pool: where the run will be; None: in this process, and all are in the graph.
        inputs: for each its key, under which tasks find it, the tensor, and the device that reads it first.

    Returns:
        Futures of the others: to be kept until the graph that reads them is submitted, or for as long as it may be
        submitted again.

    Raises:
        WorkerLostError, RunError: as :meth:`Pool.put`.
    """
    by_device: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor, device in inputs:
        by_device.setdefault(device, {})[key] = tensor.detach()
    straight: dict[str, dict[str, torch.Tensor]] = {}
    for device, tensors in by_device.items():
        large = {key: tensor for key, tensor in tensors.items() if _bytes(tensor) > _SMALL}
        if pool is not None and sum(map(_bytes, large.values())) > _IN_GRAPH:
            straight[device] = large
        for key, tensor in tensors.items():
            if key not in straight.get(device, ()):
                add_data(data, key, copied(tensor), device)  # of a view, Dask would send all of its memory
    return list(pool.put(straight).values()) if pool is not None and straight else []


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class _Stamp:
    """What a tensor was at some time.

    The version counter does not see writes through ``.data``; where it and the address are unchanged, a checksum
    tells.
    """

    address: int
    version: int
    checksum: int

    @staticmethod
    def of(tensor: torch.Tensor) -> _Stamp:
        return _Stamp(tensor.data_ptr(), tensor._version, checksum(tensor))

    def fits(self, tensor: torch.Tensor) -> bool:
        same = tensor.data_ptr() == self.address and tensor._version == self.version
        return same and checksum(tensor) == self.checksum


class _Known:
    """Something for each version of a tensor, for as long as the tensor lives: known by itself, not by its name."""

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()

    def get(self, tensor: torch.Tensor) -> Any:
        """What is known of the tensor as it is now; None if nothing is."""
        stamp, value = self._known.get(tensor, (None, None))
        return value if stamp is not None and stamp.fits(tensor) else None

    def set(self, tensor: torch.Tensor, value: Any) -> None:
        self._known[tensor] = _Stamp.of(tensor), value


class Copies:
    """Copies of a model's tensors for runs that come later: one of each version."""

    def __init__(self) -> None:
        self._known = _Known()

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = self._known.get(tensor)
        if copy is None:
            copy = copied(tensor)
            self._known.set(tensor, copy)
        return copy


class Shipments:
    """What of a model's tensors is on which worker: one copy there for all programs that read it."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def place(
        self, pool: Pool, device: str, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, Source], list[Future]]:
        """Send what the worker does not have as it is now.

        Returns:
            Where each tensor is, by ref, and futures to be kept for as long as graphs that read them are submitted.
        """
        known = self._known.setdefault(device, _Known())
        placed: dict[str, tuple[Found, Future] | None] = {ref: known.get(tensor) for ref, tensor in tensors.items()}
        changed = [ref for ref, place in placed.items() if place is None]
        if changed:
            future = pool.scatter({ref: tensors[ref].detach() for ref in changed}, device)
            for ref in changed:
                placed[ref] = Found(str(future.key), ref), future
                known.set(tensors[ref], placed[ref])
        there = {ref: place for ref, place in placed.items() if place is not None}
        futures = {found.key: future for found, future in there.values()}
        return {ref: found for ref, (found, _) in there.items()}, list(futures.values())


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's elements (about 6 GB/s)."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(plain.view(torch.uint8).numpy().data) if plain.numel() else 0
