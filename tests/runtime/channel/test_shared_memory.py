"""Large messages between workers of one host: read where they were written, in memory that is used again."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import channel_ends
import pytest
import torch
from channel_ends import PATIENCE, Ends, facts, kill, tensors, until

from daggc.runtime.channel import channel, direct
from daggc.runtime.channel.shared import START, Block, Mappings, Pool, size_class

pytestmark = pytest.mark.timeout(120)
NUMBERS = 300_000  # of a large message


def large() -> list[torch.Tensor]:
    return [torch.arange(NUMBERS, dtype=torch.float32)]


def blocks(ends: Ends) -> list[bool]:
    """Whether the sender's blocks are free."""
    return ends.on(ends.a, lambda: [block.is_free for block in channel().pool.blocks]).result(PATIENCE)


@pytest.fixture
def ends(ends: Ends) -> Iterator[Ends]:
    """Two workers that have not shared memory so far."""
    ends.client.run(forget_all)
    yield ends
    ends.client.run(forget_all)


def forget_all() -> None:
    channel_ends.HELD.clear()
    channel().pool.close()
    channel().mappings.trim(0)
    channel()._apart.clear()
    set_sharing(True)
    set_inside(32_768)


def set_inside(limit: int) -> None:
    direct.INSIDE = limit


def set_sharing(on: bool) -> None:
    channel().sharing = on


@pytest.mark.parametrize("way", ["inside the message", "beside it", "in shared memory", "in memory that is not shared"])
def test_every_dtype_and_layout_arrives_as_it_left(ends: Ends, way: str) -> None:
    ends.client.run(set_inside, 1 << 30 if way == "inside the message" else -1)
    if way == "beside it":
        ends.client.run(set_sharing, False)
    if way == "in memory that is not shared":
        ends.client.run(on_another_host, workers=[ends.b])
    try:
        for number, name in enumerate(tensors()):
            ends.send(way, str(number), lambda name=name: [tensors()[name]])
        ends.send(way, "all", lambda: list(tensors().values()))
        for number, (name, wanted) in enumerate(tensors().items()):
            assert ends.receive(way, str(number)) == [(facts(wanted), 0)], name
        assert ends.receive(way, "all") == [(facts(wanted), 0) for wanted in tensors().values()]
        used = ends.client.run(lambda: bool(channel().pool.blocks))[ends.a]
        assert used == (way in ("in shared memory", "in memory that is not shared"))
        until(lambda: all(blocks(ends)))
    finally:
        ends.client.run(on_this_host)


def on_another_host() -> None:
    channel().mappings.read = lambda *_: None


def on_this_host() -> None:
    vars(channel().mappings).pop("read", None)


def test_who_shares_no_memory_is_remembered(ends: Ends) -> None:
    ends.client.run(on_another_host, workers=[ends.b])
    try:
        for number in range(3):
            ends.send("far", str(number), large)
            assert ends.receive("far", str(number)) == [(facts(large()[0]), 0)]
        assert ends.client.run(lambda: channel()._apart)[ends.a] == {ends.b}
    finally:
        ends.client.run(on_this_host)


def test_blocks_are_used_again(ends: Ends) -> None:
    """Three messages are under way at most: so many blocks, and one of which the receiver lets go meanwhile."""

    def send(to: str) -> None:
        for number in range(200):
            channel().send("again", to, str(number), [torch.full((NUMBERS,), float(number))])
            if number >= 3:
                channel().receive("again", f"got {number - 3}", to)

    def receive(source: str) -> list[bool]:
        right = []
        for number in range(200):
            got = channel().receive("again", str(number), source)
            right.append(bool((got[0] == number).all()))
            del got
            channel().send("again", source, f"got {number}", [])
        return right

    sending = ends.on(ends.a, send, ends.b)
    assert ends.on(ends.b, receive, ends.a).result(PATIENCE) == [True] * 200
    sending.result(PATIENCE)
    assert 1 <= len(blocks(ends)) <= 5
    assert ends.client.run(lambda: len(channel().mappings))[ends.b] == len(blocks(ends))


def test_a_block_is_not_used_again_while_a_view_of_it_lives(ends: Ends) -> None:
    def keep(source: str) -> None:
        _, second = channel().receive("kept", "first", source)
        channel_ends.HELD["part"] = second[::7].view(torch.int32)[1:]

    def check() -> bool:
        return torch.equal(
            channel_ends.HELD["part"], torch.arange(0, NUMBERS, 7, dtype=torch.float32).view(torch.int32)[1:]
        )

    ends.send("kept", "first", lambda: [torch.zeros(NUMBERS), torch.arange(NUMBERS, dtype=torch.float32)])
    ends.on(ends.b, keep, ends.a).result(PATIENCE)
    for number in range(5):
        ends.send("kept", str(number), lambda: [torch.full((NUMBERS,), -1.0), torch.full((NUMBERS,), -1.0)])
        ends.receive("kept", str(number))
    assert ends.on(ends.b, check).result(PATIENCE)
    assert blocks(ends).count(False) == 1
    ends.on(ends.b, lambda: channel_ends.HELD.clear()).result(PATIENCE)
    assert all(blocks(ends))


def test_what_a_run_leaves_unread_is_free_again(ends: Ends) -> None:
    ends.send("left", "unread", large)
    until(lambda: ends.kept(ends.b) == 1)
    ends.on(ends.b, lambda: channel().end("left")).result(PATIENCE)
    assert all(blocks(ends))
    ends.send("left", "late", large)
    until(lambda: all(blocks(ends)))


def test_where_no_block_can_be_made_the_network_is_taken(ends: Ends) -> None:
    def limited(to: str) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (NUMBERS, before[1]))
        try:
            channel().send("full", to, "limited", large())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def full(to: str) -> None:
        def no_space(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "no space")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "posix_fallocate", no_space)
            channel().send("full", to, "no space", large())

    files = ends.client.run(open_files)[ends.a]
    ends.on(ends.a, limited, ends.b).result(PATIENCE)
    ends.on(ends.a, full, ends.b).result(PATIENCE)
    for tag in ("limited", "no space"):
        assert ends.receive("full", tag) == [(facts(large()[0]), 0)]
    assert blocks(ends) == []
    assert ends.client.run(open_files)[ends.a] == files == 0


def open_files() -> int:
    """Blocks that this process has open."""
    found = 0
    for file in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing is gone
            found += os.readlink(f"/proc/self/fd/{file}").startswith("/memfd:daggc-")
    return found


def mapped() -> int:
    """Blocks that this process has mapped."""
    return Path("/proc/self/maps").read_text().count("/memfd:daggc-")


def test_blocks_that_nobody_uses_are_given_back(ends: Ends) -> None:
    ends.send("idle", "x", large)
    ends.receive("idle", "x")
    assert ends.client.run(mapped) == {ends.a: 1, ends.b: 1}
    ends.client.run(lambda: channel().trim())
    assert ends.client.run(mapped) == {ends.a: 1, ends.b: 1}
    ends.client.run(lambda: channel().trim(0))
    assert ends.client.run(mapped) == {ends.a: 0, ends.b: 0}
    assert ends.client.run(open_files) == {ends.a: 0, ends.b: 0}


def test_a_sender_that_is_killed_leaves_what_is_read_and_nothing_else(mortal: Ends) -> None:
    before = set(os.listdir("/dev/shm"))

    def keep(source: str) -> None:
        channel_ends.HELD["got"] = channel().receive("dead", "read", source)[0]

    def check() -> bool:
        right = torch.equal(channel_ends.HELD["got"], large()[0])
        channel_ends.HELD.clear()
        channel().end("dead")
        channel().mappings.trim(0)
        return right

    mortal.send("dead", "read", large)
    mortal.send("dead", "unread", large)
    mortal.on(mortal.b, keep, mortal.a).result(PATIENCE)
    until(lambda: mortal.kept(mortal.b) == 1)
    kill(mortal, mortal.a)
    assert mortal.on(mortal.b, check).result(PATIENCE)
    assert mortal.client.run(mapped, workers=[mortal.b]) == {mortal.b: 0}
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "daggc" in name}


def test_what_a_killed_receiver_had_is_given_back(mortal: Ends) -> None:
    mortal.send("lost", "unread", large)
    until(lambda: mortal.kept(mortal.b) == 1)
    kill(mortal, mortal.b)
    mortal.send("lost", "more", large)
    until(lambda: blocks(mortal) == [], 40)
    assert mortal.client.run(mapped, workers=[mortal.a]) == {mortal.a: 0}


def test_a_block_in_this_process() -> None:
    pool, mappings = Pool(), Mappings()
    block = pool.take(100, "b")
    assert block is not None and not block.is_free
    block.data[:100] = torch.arange(100)
    message = mappings.read(block.where, 100)
    assert message is not None and message.data_ptr() % 64 == 0 and torch.equal(message, torch.arange(100))
    other = pool.take(100, "b")
    assert other is not None and other is not block
    part = message[50:]
    del message
    assert not block.is_free
    del part
    assert block.is_free and pool.take(90, "b") is block
    pool.close()


@pytest.mark.parametrize("wrong", ["process", "file", "name"])
def test_only_the_block_that_is_meant_is_mapped(wrong: str) -> None:
    pool, mappings = Pool(), Mappings()
    block = pool.take(100, "b")
    assert block is not None
    process, file, name, size = block.where
    with Path("/dev/null").open() as null:
        where = {
            "process": (1 << 22, file, name, size),
            "file": (process, null.fileno(), name, size),
            "name": (process, file, "daggc-other", size),
        }[wrong]
        assert mappings.read(where, 100) is None
    pool.close()


def test_sizes_of_blocks_are_few_and_little_too_large() -> None:
    sizes = {size_class(START + nbytes) for nbytes in range(1, 1 << 22, 997)}
    assert len(sizes) < 90
    for nbytes in range(1, 1 << 22, 997):
        assert nbytes <= size_class(nbytes) < nbytes * 1.125 + 4096
        assert size_class(nbytes) % 4096 == 0
    assert size_class(size_class(5_000_000)) == size_class(5_000_000)


def test_a_block_that_cannot_be_mapped_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_files()

    def cannot(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("daggc.runtime.channel.shared._mapped", cannot)
    with pytest.raises(RuntimeError, match="no"):
        Block(4096)
    assert Pool().take(100, "b") is None
    assert open_files() == before
