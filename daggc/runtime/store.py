"""State that stays on a worker: parameters, buffers and optimizer state of its stages, versioned.

A step reads version k and its update makes version k + 1. Optimizer state is updated in place, so an update is
guarded: it runs only on the version it expects, once; run again, it finds its work done. Where the tasks of a step read
the state one by one, parameters are double-buffered: version k stays readable until k + 2 is made, so a task of step k
may run again. A step that is a single task here reads and writes all of it under the guard, parameters in place too. An
update that fails halfway poisons the state, and everything after fails clearly until it is restored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from daggc.errors import RunError

Tensors = Mapping[str, torch.Tensor]
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")


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
        self._told: list[Callable[[], object]] = []
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
        if version == state.version - 1 and not ref.startswith("state:") and ref in state.previous:
            return state.previous[ref]
        raise RunError(f"{ref!r} was asked at version {version}, the worker has version {state.version}")

    def update(self, version: int, compute: Callable[[], Tensors]) -> None:
        """Make version + 1 by ``compute()``, unless that was done already; version stays readable.

        Raises RunError if the state is at neither of the two versions.
        """
        with self.lock:
            if self._is_at(version):
                previous = self._state.tensors
                changed = self._guarded(compute)
                self._set(_Versions(version + 1, {**previous, **changed}, previous))

    def step(
        self,
        version: int,
        prepare: Callable[[Tensors], Prepared],
        compute: Callable[[Prepared], tuple[Tensors, Tensors]],
    ) -> Tensors:
        """Make version + 1, unless that was done already; returns what else came of it, then as now.

        Args:
            prepare: is given the tensors, and changes nothing; where it fails, nothing has happened.
            compute: gives, from what ``prepare`` gave, the new tensors and the other results. It may write to the
                tensors of parameters and optimizer state.

        Raises:
            RunError: the state is at neither of the two versions.
        """
        with self.lock:
            if self._is_at(version):
                prepared = prepare(self._state.tensors)
                changed, results = self._guarded(lambda: compute(prepared))
                self._set(_Versions(version + 1, {**self._state.tensors, **changed}, {}, results))
            return self._state.results

    def _is_at(self, version: int) -> bool:
        """Whether the state is at a version; False at the one after it. Raises RunError at any other."""
        self._require_sound()
        if self.version not in (version, version + 1):
            raise RunError(f"an update of version {version} met version {self.version}")
        return self.version == version

    def _guarded(self, compute: Callable[[], Result]) -> Result:
        try:
            return compute()
        except BaseException:
            self.poisoned = True  # some of the tensors may be new already
            self._tell()
            raise

    def _set(self, state: _Versions) -> None:
        self._state = state
        self._tell()

    def tell(self, changed: Callable[[], object]) -> None:
        """Call this once, on any thread, when the version has changed or the state is poisoned."""
        self._told.append(changed)

    def _tell(self) -> None:
        told, self._told = self._told, []
        for changed in told:
            changed()

    def _require_sound(self) -> None:
        if self.poisoned:
            raise RunError("an update failed halfway; restore the state from a checkpoint")


_STORES: dict[str, Store] = {}


def put(
    name: str,
    version: int,
    tensors: Tensors,
    device: torch.device | str = "cpu",
    copy: bool = True,
    more: bool = False,
) -> int:
    """Create or replace a store in this process; the tensors are copied to ``device``. Returns the version.

    Args:
        copy: False where nobody else has the tensors: those on the device already are taken as they are.
        more: add them to the store, which is at this version and was not used yet.
    """
    copies = {ref: tensor.detach().to(device, copy=copy) for ref, tensor in tensors.items()}
    if more:
        held = get(name)
        copies = {**{ref: held.read(ref, version) for ref in held.refs}, **copies}
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


def snapshot(name: str, version: int, refs: Sequence[str]) -> dict[str, torch.Tensor]:
    """Copies of tensors of a store, on the CPU. Raises RunError if it is not at that version."""
    store = get(name)
    with store.lock:  # optimizer state is changed in place
        return {ref: store.read(ref, version).detach().to("cpu", copy=True) for ref in refs}


def drop(name: str) -> None:
    """Forget a store."""
    _STORES.pop(name, None)
