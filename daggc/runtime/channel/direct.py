"""One worker's end of the channel: it sends from a task's thread, and its event loop receives."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from distributed.core import Status
from distributed.protocol.serialize import Serialize
from tornado.ioloop import PeriodicCallback

from daggc.backend.serializers import count_sent
from daggc.errors import RunError, WorkerLostError
from daggc.runtime.channel.inbox import Inbox
from daggc.runtime.channel.layout import Layout, packed, places, total
from daggc.runtime.channel.letters import Fields, Letter, beside, described, inside, opened, shared, unshared
from daggc.runtime.channel.peers import refuses
from daggc.runtime.channel.shared import Block, Mappings, Pool
from daggc.runtime.devices import own_device

_LOOK = 1.0  # seconds between looks whether a message is still wanted
_ASK = 5.0  # seconds between questions to the worker that is to send it
_ANSWER = 2.0  # seconds within which a worker that is not busy answers
_SILENT = 12  # questions without an answer after which a worker counts as gone; it may be compiling
_IDLE = 60.0  # seconds after which shared memory that nobody uses is given back
_LOOK_IDLE = 10.0  # seconds between looks for it
INSIDE = 32_768  # bytes of tensors up to which they are part of the message
KEPT, DROPPED, APART = "kept", "dropped", "apart"  # what a receiver says to a message
_AT_ONCE = 4  # messages with tensors in them under way to a worker: each has a connection
_CLOSING = (Status.stopping, Status.stopped, Status.closing, Status.closed, Status.failed)
_LOG = logging.getLogger(__name__)


class Channel:
    """Direct messages from this worker to others, and from them; they belong to runs, and have tags.

    Its methods may be called on any thread but the event loop's.

    Attributes:
        sharing: whether large messages are put into shared memory where the receiver has it.
    """

    def __init__(self, worker: Any) -> None:
        """On the worker's event loop."""
        self.worker = worker
        self.address = str(worker.address)
        self.loop: asyncio.AbstractEventLoop = worker.loop.asyncio_loop
        self.inbox: Inbox[Letter] = Inbox()
        self.handlers = {"daggc_message": self._message, "daggc_abort": self._abort, "daggc_ask": self._answer}
        self._since = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sending: Counter[tuple[str, str]] = Counter()  # messages under way, by run and receiver
        self._counting = threading.Lock()
        self._turns: dict[str, asyncio.Semaphore] = defaultdict(functools.partial(asyncio.Semaphore, _AT_ONCE))
        self._silent: Counter[str] = Counter()  # questions in a row that a worker did not answer
        self.sharing = True
        self.pool = Pool()
        self.mappings = Mappings()
        self._apart: set[str] = set()  # workers that share no memory with this one
        self._trimming = PeriodicCallback(self.trim, _LOOK_IDLE * 1e3)
        self._trimming.start()
        self._closed = False

    def send(self, run: str, to: str, tag: str, tensors: Sequence[torch.Tensor]) -> None:
        """Send tensors to the worker at an address.

        Returns as soon as the caller may drop the tensors; until the run is over it must not write to them. A message
        that cannot be sent makes the run fail here.

        Raises:
            RunError: the run is over, or a tensor has no plain bytes.
        """
        self._require(run)
        layouts, elements = zip(*map(packed, tensors), strict=True) if tensors else ((), ())
        count_sent(total(layouts), to)
        block = None
        if total(layouts) <= INSIDE:
            fields = inside(elements) if tensors else {}
        else:
            shares = self.sharing and to not in self._apart
            block = self.pool.take(places(layouts)[1], to) if shares else None
            fields = beside(elements) if block is None else shared(block, layouts, elements)
        self._count(run, to, 1)  # before the run can end: until then this worker does not say that it is over
        self._start(self._send(run, to, tag, layouts, fields, block))

    def receive(
        self, run: str, tag: str, source: str, check: Callable[[], None] = lambda: None
    ) -> tuple[torch.Tensor, ...]:
        """Wait for a message of the worker at an address; each is received once.

        Args:
            check: called about once a second; what it raises ends the wait.

        Returns:
            The tensors with their dtypes, shapes, strides and bits, 64-byte aligned, on the device of this worker's
            tasks. They may lie in memory that the sender uses again when the last of them is dropped.

        Raises:
            RunError: the run failed, here or at the source, or is over.
            WorkerLostError: the source is gone.
        """
        began = asked = time.monotonic()
        while (letter := self.inbox.take(run, tag, _LOOK)) is None:
            self._require(run)
            check()
            now = time.monotonic()
            if now - asked > _ASK:
                asked = now
                self._start(self._ask(run, tag, source, now - began))
        return letter.tensors(own_device())

    def abort(self, run: str, reason: str, peers: Sequence[str]) -> None:
        """A run failed: whoever waits for its messages, here and on the peers, raises RunError with the reason."""
        self.inbox.finish(run, RunError(reason))
        for peer in peers:
            self._start(self._tell(run, reason, peer))

    def end(self, run: str) -> None:
        """A run is over here: what came for it and was not read is dropped, and what comes late will be.

        What it has sent still arrives.
        """
        self.inbox.finish(run)

    def close(self) -> None:
        """Nothing is sent or received any more."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        self._trimming.stop()
        self.pool.close()
        self.mappings.trim(0)

    # On the event loop from here on.

    async def _send(
        self, run: str, to: str, tag: str, layouts: Sequence[Layout], fields: Fields, block: Block | None
    ) -> None:
        message = {"run": run, "tag": tag, "layouts": described(layouts)}
        try:
            said = await self._post(to, {**message, **fields})
            if block is not None and said != KEPT:  # nobody reads it
                if said == APART:
                    self._apart.add(to)
                    said = await self._post(to, {**message, **unshared(block, layouts)})
                block.free()
            if said is None:
                self._fail(run, RunError(f"worker {to} takes no direct messages: the channel was not installed there"))
        except Exception as wrong:  # whatever Dask may raise: a receiver must not wait for a message that never comes
            what = f"{tag!r} of run {run} could not be sent to it ({type(wrong).__name__}: {wrong})"
            if isinstance(wrong, OSError):
                self._fail(run, WorkerLostError(f"worker {to} is gone: {what}"), to)
            else:
                self._fail(run, RunError(f"worker {to} takes no message: {what}"))
            if block is not None:
                self.pool.drop(block)
        finally:
            self._count(run, to, -1)

    async def _post(self, to: str, message: Fields) -> str | None:
        turn = self._turns[to] if isinstance(message.get("data"), Serialize) else nullcontext()
        async with turn:
            return await self.worker.rpc(to).daggc_message(**message)

    def _message(self, run: str, tag: str, layouts: Sequence[Any], data: Any = None, block: Any = None) -> str:
        if self.inbox.is_over(run):
            return DROPPED
        letter = opened([Layout(*one) for one in layouts], data, block, self.mappings)
        if letter is None:
            return APART
        self.inbox.put(run, tag, letter)
        return KEPT

    async def _tell(self, run: str, reason: str, peer: str) -> None:
        try:
            async with asyncio.timeout(_ANSWER):
                await self.worker.rpc(peer).daggc_abort(run=run, reason=reason)
        except Exception as wrong:  # it is gone, or will ask
            _LOG.info("worker %s was not told that run %s failed: %s: %s", peer, run, type(wrong).__name__, wrong)

    def _abort(self, run: str, reason: str) -> str:
        self._fail(run, RunError(reason))
        return "OK"

    async def _ask(self, run: str, tag: str, source: str, waited: float) -> None:
        """Ask a worker about a message that has not come for so many seconds; where it never will, the run failed."""
        lost = f"worker {source} is gone: {tag!r} of run {run} did not come from it"
        try:
            async with asyncio.timeout(_ANSWER):
                said = await self.worker.rpc(source).daggc_ask(run=run, who=self.address)
        except (OSError, TimeoutError) as wrong:
            self._silent[source] += 1
            if await refuses(source) or self._silent[source] >= _SILENT:
                del self._silent[source]
                self._fail(run, WorkerLostError(f"{lost} ({type(wrong).__name__}: {wrong})"), source)
            return
        self._silent.pop(source, None)
        if said is None:
            self._fail(run, RunError(f"worker {source} sends no messages: the channel was not installed there"))
        elif said["reason"] is not None:
            self._fail(run, RunError(f"run {run} failed on worker {source}: {said['reason']}"))
        elif said["age"] < waited:
            self._fail(run, WorkerLostError(f"{lost} (it was started again)"), source)
        elif said["over"] and not self.inbox.has(run, tag):
            self._fail(run, RunError(f"run {run} is over on worker {source}, which never sent {tag!r}"))

    def _answer(self, run: str, who: str) -> dict[str, Any]:
        wrong = self.inbox.failure(run)
        return {
            "age": time.monotonic() - self._since,
            "reason": None if wrong is None else str(wrong),
            "over": self.inbox.is_over(run) and not self._sending.get((run, who)),
        }

    def _fail(self, run: str, error: RunError, lost: str = "") -> None:
        if self.inbox.finish(run, error):
            _LOG.info("%s", error)
        if lost:
            self.pool.forget(lost)

    def trim(self, seconds: float = _IDLE) -> None:
        """Give back shared memory that was not used for so long."""
        self.pool.trim(seconds)
        self.mappings.trim(seconds)

    # On any thread.

    def _require(self, run: str) -> None:
        if self._closed or self.worker.status in _CLOSING:
            raise RunError(f"run {run}: worker {self.address} is closing")
        self.inbox.require_open(run)

    def _count(self, run: str, to: str, more: int) -> None:
        with self._counting:
            self._sending[run, to] += more
            if not self._sending[run, to]:
                del self._sending[run, to]

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        try:
            self.loop.call_soon_threadsafe(self._run, coroutine)
        except RuntimeError:  # the loop is closed, and with it this worker
            coroutine.close()

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
