"""Ways to train in processes of their own, which wait at a pipe and are stopped while another is timed."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from daggc.runtime.local_workers import worker_environment

TOOLS = Path(__file__).parents[1]
_SETTLE = 0.2  # seconds that processes get after they were stopped, before they are timed


class WayError(RuntimeError):
    """A way failed or did not answer in time; says which, and the end of what it wrote."""


@dataclass(frozen=True)
class Command:
    """What a way runs.

    Attributes:
        module: in :mod:`benchmarks.peers`; ``arguments`` follow the name of the case.
        ranks: processes of it, which get their rank, how many they are and a file where they meet.
        allocator: give them the settings of glibc's allocator that daggc gives its workers.
    """

    module: str
    arguments: tuple[str, ...] = ()
    ranks: int = 0
    allocator: bool = True


@dataclass(frozen=True)
class Answer:
    """What a way said: seconds from the order until the last of its processes was done, losses, its note."""

    seconds: float
    losses: tuple[float, ...]
    note: str


@dataclass
class _Process:
    """One of a way's, with what it said but was not read yet."""

    popen: subprocess.Popen[bytes]
    said: bytes = field(default=b"")

    @property
    def output(self) -> int:
        """The file descriptor of what it says."""
        assert self.popen.stdout is not None
        return self.popen.stdout.fileno()


class Contender:
    """A way at work in processes of its own; a context manager, at whose end they are gone.

    Each leads a process group, with all that it starts. When this process dies, the system ends those that are
    stopped, and the others see their pipe closed.
    """

    def __init__(self, name: str, command: Command, case: str) -> None:
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix="daggc-bench-")
        folder = Path(self._folder.name)
        self._log = folder / "log"
        extra = [(str(rank), str(command.ranks), str(folder / "meeting")) for rank in range(command.ranks)]
        arguments = [sys.executable, "-m", f"benchmarks.peers.{command.module}", case, *command.arguments]
        with self._log.open("wb") as log:
            self._processes = [
                _Process(
                    subprocess.Popen(
                        [*arguments, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                        env=environment(command.allocator), process_group=0, bufsize=0,
                    )
                )
                for more in extra or [()]
            ]  # fmt: skip

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGCONT)
        for process in self._processes:
            assert process.popen.stdin is not None
            process.popen.stdin.close()
        for process in self._processes:
            try:
                process.popen.wait(10)
            except subprocess.TimeoutExpired:
                self.signal(signal.SIGKILL)
                process.popen.wait()
        self.signal(signal.SIGKILL)  # what they may have left
        self._folder.cleanup()

    def signal(self, number: signal.Signals) -> None:
        """To all processes of all groups."""
        for process in self._processes:
            try:
                os.killpg(process.popen.pid, number)
            except ProcessLookupError:
                continue

    def make(self, settings: Mapping[str, Any], timeout: float = 240) -> Answer:
        """Build the training with these settings, and take two steps."""
        return self._ask({"make": settings}, timeout)

    def run(self, steps: int, timeout: float = 120) -> Answer:
        """Take so many steps. A way that is stopped goes on for it."""
        return self._ask({"run": steps}, timeout)

    def rest(self) -> None:
        """Stop until it is asked again."""
        self.signal(signal.SIGSTOP)

    def _ask(self, order: Mapping[str, Any], timeout: float) -> Answer:
        self.signal(signal.SIGCONT)
        time.sleep(_SETTLE)
        start = time.perf_counter()
        for process in self._processes:
            assert process.popen.stdin is not None
            try:
                process.popen.stdin.write(json.dumps(order).encode() + b"\n")
            except BrokenPipeError:
                raise self._wrong("has ended") from None
        answers = self._answers(start + timeout)
        seconds = time.perf_counter() - start
        losses = [answer["losses"] for answer in answers if answer["losses"]]
        mean = tuple(fmean(step) for step in zip(*losses, strict=True))
        return Answer(seconds, mean, answers[0]["note"])

    def _answers(self, deadline: float) -> list[dict[str, Any]]:
        """A line of each process; none is waited for when another is gone."""
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < len(self._processes):
            left = {process.output: i for i, process in enumerate(self._processes) if i not in answers}
            ready, _, _ = select.select(list(left), [], [], max(0, deadline - time.perf_counter()))
            if not ready:
                raise self._wrong("did not answer in time")
            for output in ready:
                process = self._processes[left[output]]
                more = os.read(output, 1 << 16)
                if not more:
                    raise self._wrong("has ended")
                process.said += more
                if b"\n" in process.said:
                    line, _, process.said = process.said.partition(b"\n")
                    answers[left[output]] = json.loads(line)
        return [answers[i] for i in range(len(self._processes))]

    def _wrong(self, what: str) -> WayError:
        written = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return WayError(f"{self.name} {what}; it wrote last:\n" + "\n".join(written[-15:]))


def environment(allocator: bool) -> dict[str, str]:
    """Of a way's processes: they set their threads themselves."""
    own = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    path = os.pathsep.join(filter(None, (str(TOOLS), own.get("PYTHONPATH", ""))))
    tuned = {name: value for name, value in worker_environment().items() if not name.endswith("_NUM_THREADS")}
    return own | (tuned if allocator else {}) | {"PYTHONPATH": path}


def in_turn(contenders: Sequence[Contender], steps: int, at: int) -> dict[str, float]:
    """Seconds a step of each, one after the other while the others are stopped; the order turns with ``at``."""
    seconds: dict[str, float] = {}
    for number in range(len(contenders)):
        own = contenders[(number + at) % len(contenders)]
        seconds[own.name] = own.run(steps).seconds / steps
        own.rest()
    return seconds
