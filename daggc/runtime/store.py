"""State that stays on a worker: parameters, buffers and optimizer state of its stages, versioned.

A step reads version k and its update makes version k + 1. Parameters are double-buffered: version k stays
readable until k + 2 is made, so a task of step k may run again. Optimizer state is updated in place, so an
update is guarded: it runs only on the version it expects, once; run again, it finds its work done. An update
that fails halfway poisons the state, and everything after fails clearly until it is restored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from daggc.errors import RunError

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Versions:
    """The newest version and the one before it, replaced as one: a reader sees either all or nothing of an update."""

    version: int
    tensors: Mapping[str, torch.Tensor]
    previous: Mapping[str, torch.Tensor]
    results: Tensors = field(default_factory=dict)


class Store:
    """One model's state on one worker."""

    def __init__(self, version: int, tensors: Tensors) -> None:
        self._state = _Versions(version, dict(tensors), dict(tensors))
        self.poisoned = False
        self.lock = threading.Lock()

    @property
    def version(self) -> int:
        return self._state.version

    @property
    def refs(self) -> tuple[str, ...]:
        return tuple(self._state.tensors)

    def read(self, ref: str, version: int) -> torch.Tensor:
        """A tensor as of a version. Raises RunError if that version is gone, or the state is poisoned."""
        self._require_sound()
        state = self._state
        if version == state.version:
            return state.tensors[ref]
        # Optimizer state is changed in place: only the update itself may read it, at the newest version.
        if version == state.version - 1 and not ref.startswith("state:"):
            return state.previous[ref]
        raise RunError(f"{ref!r} was asked at version {version}, the worker has version {state.version}")

    def update(self, version: int, compute: Callable[[], Tensors]) -> None:
        """Make version + 1 by ``compute()``, unless that was done already.

        Raises RunError if the state is at neither of the two versions.
        """
        self.step(version, dict, lambda _: (compute(), {}))

    def step(
        self,
        version: int,
        prepare: Callable[[], dict[str, torch.Tensor]],
        compute: Callable[[dict[str, torch.Tensor]], tuple[Tensors, Tensors]],
    ) -> Tensors:
        """Make version + 1, unless that was done already; returns what else came of it, then as now.

        Args:
            prepare: changes nothing; where it fails, nothing has happened.
            compute: gives, from what ``prepare`` gave, the new tensors and the other results.

        Raises:
            RunError: the state is at neither of the two versions.
        """
        with self.lock:
            self._require_sound()
            state = self._state
            if state.version == version + 1:
                return state.results
            if state.version != version:
                raise RunError(f"an update of version {version} met version {state.version}")
            prepared = prepare()
            try:
                changed, results = compute(prepared)
            except BaseException:
                self.poisoned = True  # some of the optimizer's tensors may be new already
                raise
            self._state = _Versions(version + 1, {**state.tensors, **changed}, state.tensors, results)
            return results

    def _require_sound(self) -> None:
        if self.poisoned:
            raise RunError("an update failed halfway; restore the state from a checkpoint")


_STORES: dict[str, Store] = {}


def put(name: str, version: int, tensors: Tensors, device: torch.device | str = "cpu", copy: bool = True) -> int:
    """Create or replace a store in this process; the tensors are copied to ``device``. Returns the version.

    Args:
        copy: False where nobody else has the tensors: those on the device already are taken as they are.
    """
    copies = {ref: tensor.detach().to(device, copy=copy) for ref, tensor in tensors.items()}
    _STORES[name] = Store(version, copies)
    return version


def get(name: str) -> Store:
    """A store of this process. Raises RunError if there is none (its worker restarted)."""
    try:
        return _STORES[name]
    except KeyError:
        raise RunError("the state of this model is not on this worker; restore it from a checkpoint") from None


def status(name: str) -> int | None:
    """The version of a store of this process; None if an update of it failed halfway."""
    store = get(name)
    with store.lock:
        return None if store.poisoned else store.version


def snapshot(name: str, version: int) -> dict[str, torch.Tensor]:
    """Copies of all tensors of a store, on the CPU. Raises RunError if it is not at that version."""
    store = get(name)
    with store.lock:  # optimizer state is changed in place
        return {ref: store.read(ref, version).detach().to("cpu", copy=True) for ref in store.refs}


def drop(name: str) -> None:
    """Forget a store."""
    _STORES.pop(name, None)
