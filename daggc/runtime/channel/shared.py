"""Memory that two workers of one host share: the sender writes a message once, and the receiver reads it in place.

A block is a file without a name in any directory (``memfd_create``), so nothing is left of it when the last process
that has it mapped ends, however it ends, and no limit on ``/dev/shm`` counts. The sender's message says which process
has it open, and under which number; a receiver that finds a file there whose name is the block's, 16 random bytes, is
on the same host and may open it. Any other answers that it cannot, and gets the tensors over the network.

The first word of a block says whether a message is in it. The sender sets it; the receiver clears it when it has
dropped the last tensor of the message, and then the sender uses the block again: its memory is warm, and stays mapped
at both ends. A block that nobody has used for a while is given back.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
import weakref
from collections import defaultdict
from typing import Any

import numpy as np
import torch

START = 64  # bytes before the message; what follows is aligned for every kernel
_PAGE = 4096
_LOG = logging.getLogger(__name__)

Where = tuple[int, int, str, int]  # process, file descriptor, name and bytes of a block


class Block:
    """A block in the process that fills it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.name = f"daggc-{uuid.uuid4().hex}"
        self.file = os.memfd_create(self.name)
        try:
            os.posix_fallocate(self.file, 0, size)  # an error now, where writing would end the process
            self.memory = _mapped(f"/proc/self/fd/{self.file}", size)
        except BaseException:
            os.close(self.file)
            raise
        self.word = _word(self.memory)
        self.data = torch.from_numpy(self.memory[START:])
        self.receiver = ""
        self.used = 0.0

    @property
    def where(self) -> Where:
        return os.getpid(), self.file, self.name, self.size

    @property
    def is_free(self) -> bool:
        return not self.word[0]

    def take(self, receiver: str) -> None:
        self.word[0] = 1
        self.receiver, self.used = receiver, time.monotonic()

    def free(self) -> None:
        """Take back what no receiver has seen."""
        self.word[0] = 0


class Pool:
    """The blocks that this process fills."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[int, list[Block]] = defaultdict(list)  # by size

    def take(self, nbytes: int, receiver: str) -> Block | None:
        """A block for so many bytes to a receiver; None where memory cannot be shared."""
        if not hasattr(os, "memfd_create"):  # not Linux
            return None
        size = size_class(START + nbytes)
        with self._lock:
            own = self._blocks[size]
            block = next((block for block in own if block.is_free), None)
            if block is None:
                try:
                    block = Block(size)
                except (OSError, RuntimeError) as wrong:  # no memory, or no more files
                    _LOG.info("no block of %d bytes: %s: %s", size, type(wrong).__name__, wrong)
                    return None
                own.append(block)
            block.take(receiver)
            return block

    def drop(self, block: Block) -> None:
        """Never use a block again: it is not known whether its receiver has it."""
        self._drop(lambda other: other is block)

    def forget(self, receiver: str) -> None:
        """Drop what a receiver has that is gone."""
        self._drop(lambda block: not block.is_free and block.receiver == receiver)

    def trim(self, seconds: float) -> None:
        """Give back blocks that are free and were not used for so long; all that are free for zero."""
        limit = time.monotonic() - seconds
        self._drop(lambda block: block.is_free and block.used <= limit)

    def close(self) -> None:
        """Give back all."""
        self._drop(lambda block: True)

    def _drop(self, chosen: Any) -> None:
        with self._lock:
            for own in self._blocks.values():
                for block in [block for block in own if chosen(block)]:
                    own.remove(block)
                    os.close(block.file)  # the memory is gone when the receiver has dropped it, too

    @property
    def blocks(self) -> list[Block]:
        with self._lock:
            return [block for own in self._blocks.values() for block in own]


class Mappings:
    """The blocks of others that this process has mapped. Read on the event loop; any thread may trim."""

    def __init__(self) -> None:
        self._memory: dict[str, np.ndarray] = {}  # by name
        self._used: dict[str, float] = {}

    def read(self, where: Where, nbytes: int) -> torch.Tensor | None:
        """The message in a block, u8[nbytes]; when its memory is dropped, the block is free. None: it is not shared."""
        process, file, name, size = where
        memory = self._memory.get(name)
        if memory is None:
            path = f"/proc/{int(process)}/fd/{int(file)}"
            try:
                if os.readlink(path) != f"/memfd:{name} (deleted)":
                    return None
                self._memory[name] = memory = _mapped(path, size)
            except (OSError, RuntimeError):
                return None
        self._used[name] = time.monotonic()
        message = memory[START : START + nbytes]  # an object of its own, which the tensor holds
        weakref.finalize(message, _clear, _word(memory)).atexit = False
        return torch.from_numpy(message)

    def trim(self, seconds: float) -> None:
        """Forget blocks not used for so long; messages that are still read keep theirs."""
        limit = time.monotonic() - seconds
        for name in [name for name, used in list(self._used.items()) if used <= limit]:
            self._memory.pop(name, None)
            self._used.pop(name, None)

    def __len__(self) -> int:
        return len(self._memory)


def size_class(nbytes: int) -> int:
    """Bytes of the block that is taken for so many: at most an eighth more, or less than a page."""
    step = max(_PAGE, 1 << max(nbytes.bit_length() - 4, 0))
    return -(-nbytes // step) * step


def _mapped(path: str, size: int) -> np.ndarray:
    """A file as shared memory, u8[size]; keeps no file open."""
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8).numpy()


def _word(memory: np.ndarray) -> np.ndarray:
    return memory[:8].view(np.int64)


def _clear(word: np.ndarray) -> None:
    word[0] = 0
