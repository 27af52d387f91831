"""What has come for the runs of this worker and is not read yet, and which runs are over."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

from daggc.errors import RunError

Letter = TypeVar("Letter")
_REMEMBERED = 1_000  # runs that are over, so that what comes late for them is dropped


class Inbox(Generic[Letter]):
    """Messages by run and tag. Delivered by the event loop, waited for by threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._kept: dict[str, dict[str, Letter]] = {}
        self._over: OrderedDict[str, RunError | None] = OrderedDict()

    def put(self, run: str, tag: str, letter: Letter) -> None:
        """Keep a message until it is taken; it is dropped if the run is over."""
        with self._changed:
            if run not in self._over:
                self._kept.setdefault(run, {})[tag] = letter
                self._changed.notify_all()

    def take(self, run: str, tag: str, timeout: float) -> Letter | None:
        """The message, once; None if it is not there within so many seconds.

        Raises:
            RunError: the run is over.
        """
        with self._changed:
            self._changed.wait_for(lambda: run in self._over or tag in self._kept.get(run, ()), timeout)
            self.require_open(run)
            return self._kept.get(run, {}).pop(tag, None)

    def has(self, run: str, tag: str) -> bool:
        """Whether a message is there."""
        with self._changed:
            return tag in self._kept.get(run, ())

    def finish(self, run: str, error: RunError | None = None) -> bool:
        """A run is over, failed if there is an error; False if it was so before."""
        with self._changed:
            if run in self._over:
                return False
            self._over[run] = error
            if len(self._over) > _REMEMBERED:
                self._over.popitem(last=False)
            self._kept.pop(run, None)
            self._changed.notify_all()
            return True

    def is_over(self, run: str) -> bool:
        with self._changed:
            return run in self._over

    def failure(self, run: str) -> RunError | None:
        """Why a run failed, if it did."""
        with self._changed:
            return self._over.get(run)

    def require_open(self, run: str) -> None:
        """Raise RunError if a run is over, with the reason if it failed."""
        with self._changed:
            if run in self._over:
                wrong = self._over[run]
                raise RunError(f"run {run} is over on this worker") if wrong is None else type(wrong)(*wrong.args)
