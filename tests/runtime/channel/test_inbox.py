"""What is kept of what came, and for how long it is known that a run is over."""

from __future__ import annotations

import threading
import time

import pytest

from daggc.errors import RunError, WorkerLostError
from daggc.runtime.channel.inbox import Inbox

pytestmark = pytest.mark.timeout(60)


def test_each_message_is_taken_once() -> None:
    inbox: Inbox[str] = Inbox()
    inbox.put("run", "a", "first")
    inbox.put("run", "b", "second")
    assert inbox.take("run", "b", 0) == "second"
    assert inbox.take("run", "b", 0) is None
    assert inbox.take("other", "a", 0) is None
    assert inbox.has("run", "a") and inbox.take("run", "a", 0) == "first"


def test_who_waits_is_woken() -> None:
    inbox: Inbox[str] = Inbox()
    threading.Timer(0.1, inbox.put, ["run", "a", "letter"]).start()
    start = time.monotonic()
    assert inbox.take("run", "a", 30) == "letter"
    assert time.monotonic() - start < 10


def test_a_run_that_failed_raises_its_error_for_everybody() -> None:
    inbox: Inbox[str] = Inbox()
    inbox.put("run", "a", "letter")
    assert inbox.finish("run", WorkerLostError("b is gone"))
    assert not inbox.finish("run", RunError("and more")) and not inbox.finish("run")
    raised = []
    for _ in range(2):
        with pytest.raises(WorkerLostError, match="b is gone") as wrong:
            inbox.take("run", "a", 30)
        raised.append(wrong.value)
    assert raised[0] is not raised[1]  # each thread has a traceback of its own


def test_a_thousand_runs_are_remembered() -> None:
    inbox: Inbox[str] = Inbox()
    for number in range(1_001):
        inbox.finish(str(number))
    assert not inbox.is_over("0") and inbox.is_over("1")
    inbox.put("1", "a", "late")
    with pytest.raises(RunError, match="run 1 is over"):
        inbox.take("1", "a", 0)
