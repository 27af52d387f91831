"""Messages between worker processes: early ones, runs that are over, and workers that die."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from channel_ends import PATIENCE, Ends, facts, kill, one, until
from distributed import Client, LocalCluster, get_worker

import daggc.runtime.channel
from daggc.backend.serializers import take_sent_to
from daggc.errors import RunError, WorkerLostError
from daggc.runtime.channel import channel, install, remove

pytestmark = pytest.mark.timeout(120)


def test_a_message_without_tensors(ends: Ends) -> None:
    ends.send("signal", "go", list)
    assert ends.receive("signal", "go") == []


@pytest.mark.parametrize("make", [lambda: torch.ones(3).to_sparse(), lambda: torch.ones(3, device="meta")])
def test_what_has_no_plain_bytes_is_refused_at_once(ends: Ends, make: Any) -> None:
    with pytest.raises(RunError, match="plain bytes"):
        ends.send("sparse", "no", lambda: [make()])


def test_messages_come_before_they_are_waited_for_and_after(ends: Ends) -> None:
    waiting = ends.receiving("early", "late")
    time.sleep(0.3)
    for tag in ("late", "first", "second"):
        ends.send("early", tag, one)
    assert waiting.result(PATIENCE) == [(facts(one()[0]), 0)]
    assert ends.receive("early", "second") == ends.receive("early", "first") == [(facts(one()[0]), 0)]
    assert ends.kept(ends.b) == 0  # each is received once


def test_bytes_sent_are_counted_by_receiver(ends: Ends) -> None:
    ends.client.run(take_sent_to)
    ends.send("count", "x", lambda: [torch.ones(3).expand(2, 3), torch.ones(1000, 1000)[:, ::2]])
    ends.receive("count", "x")
    assert ends.client.run(take_sent_to)[ends.a] == {ends.b: 24 + 2_000_000}


def test_an_ended_run_drops_what_was_not_read_and_what_comes_late(ends: Ends) -> None:
    ends.send("ended", "unread", one)
    until(lambda: ends.kept(ends.b) == 1)
    ends.on(ends.b, lambda: channel().end("ended")).result(PATIENCE)
    assert ends.kept(ends.b) == 0
    ends.send("ended", "late", one)
    time.sleep(0.3)
    assert ends.kept(ends.b) == 0
    with pytest.raises(RunError, match="run ended is over"):
        ends.receive("ended", "late")


def test_an_aborted_run_wakes_who_waits_for_it_on_the_peers(ends: Ends) -> None:
    waiting = ends.receiving("aborted", "x")
    time.sleep(0.3)
    start = time.monotonic()
    ends.on(ends.a, lambda b: channel().abort("aborted", "cpu:0 failed: no", [b]), ends.b).result(PATIENCE)
    with pytest.raises(RunError, match="cpu:0 failed: no"):
        waiting.result(PATIENCE)
    assert time.monotonic() - start < 1
    for use in (lambda: channel().receive("aborted", "y", ""), lambda: channel().send("aborted", "", "z", [])):
        with pytest.raises(RunError, match="cpu:0 failed: no"):
            ends.on(ends.a, use).result(PATIENCE)


def test_a_run_that_failed_at_its_source_is_asked_for(ends: Ends) -> None:
    ends.on(ends.a, lambda: channel().abort("untold", "the reason", [])).result(PATIENCE)
    with pytest.raises(RunError, match=f"untold failed on worker {ends.a}: the reason"):
        ends.receive("untold", "x")


def test_a_message_that_was_never_sent_is_asked_for(ends: Ends) -> None:
    ends.on(ends.a, lambda: channel().end("unsent")).result(PATIENCE)
    with pytest.raises(RunError, match=rf"unsent is over on worker {ends.a}, which never sent 'x'"):
        ends.receive("unsent", "x")


def test_who_waits_looks_whether_it_is_still_wanted(ends: Ends) -> None:
    def task() -> None:
        def check() -> None:
            raise RunError("the step was given up")

        channel().receive("unwanted", "x", get_worker().address, check)

    with pytest.raises(RunError, match="given up"):
        ends.on(ends.b, task).result(PATIENCE)


def test_a_worker_without_a_channel_is_named(ends: Ends) -> None:
    ends.client.run(remove, workers=[ends.b])
    try:
        ends.send("nowhere", "x", one)
        with pytest.raises(RunError, match=f"worker {ends.b} takes no direct messages"):
            ends.on(ends.a, lambda: channel().receive("nowhere", "y", "")).result(PATIENCE)
        with pytest.raises(RunError, match="no channel"):
            ends.on(ends.b, channel).result(PATIENCE)
    finally:
        ends.client.run(install)


def test_it_is_installed_once(ends: Ends) -> None:
    before = ends.client.run(lambda: id(channel()))
    ends.client.run(install)
    assert ends.client.run(lambda: id(channel())) == before


def test_who_waits_for_a_killed_worker_is_told_which(mortal: Ends) -> None:
    mortal.send("first", "x", one)
    mortal.receive("first", "x")
    waiting = mortal.receiving("killed", "x")
    time.sleep(0.3)
    kill(mortal, mortal.a)
    start = time.monotonic()
    with pytest.raises(WorkerLostError, match=f"{mortal.a} is gone: 'x' of run killed"):
        waiting.result(PATIENCE)
    assert time.monotonic() - start < 12


def test_a_message_to_a_killed_worker_makes_the_run_fail(mortal: Ends) -> None:
    kill(mortal, mortal.b)

    def task(to: str, own: str) -> None:
        channel().send("failing", to, "x", one())
        channel().receive("failing", "y", own)

    with pytest.raises(WorkerLostError, match=f"{mortal.b} is gone: 'x' of run failing"):
        mortal.on(mortal.a, task, mortal.b, mortal.a).result(PATIENCE)


def test_a_channel_that_is_closed_wakes_its_receivers(ends: Ends) -> None:
    waiting = ends.receiving("closing", "x")
    time.sleep(0.3)
    ends.client.run(remove, workers=[ends.b])
    try:
        with pytest.raises(RunError, match=f"{ends.b} is closing"):
            waiting.result(PATIENCE)
    finally:
        ends.client.run(install)


def test_workers_that_are_threads_of_one_process_have_a_channel_each() -> None:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        ends = Ends(client)
        for size in (3, 100_000):
            for there in (ends, ends.turned()):
                there.send(
                    "threads", f"to {there.b}, {size}", lambda size=size: [torch.arange(size).to(torch.bfloat16)]
                )
            for there in (ends, ends.turned()):
                wanted = torch.arange(size).to(torch.bfloat16)
                assert there.receive("threads", f"to {there.b}, {size}") == [(facts(wanted), 0)]
        assert len(daggc.runtime.channel._CHANNELS) == 2
    assert not daggc.runtime.channel._CHANNELS  # closed with their workers
