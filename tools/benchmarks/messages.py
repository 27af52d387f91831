"""What direct messages between two worker processes take: latency, bandwidth, CPU time at each end."""

from __future__ import annotations

import json
import statistics
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from distributed import Client
from rich.console import Console
from rich.table import Table

from daggc.runtime.channel import channel, install
from daggc.runtime.local_workers import local_workers

SIZES = {"empty": 0, "32 KB": 1 << 15, "256 KB": 1 << 18, "4 MB": 4 << 20, "22 MB": 22 << 20}
WAYS = {"shared memory": True, "network": False}
_WINDOW = 4  # messages under way when they go one way only
_WARM = 10  # messages before the clock is read
_TOTAL = 1 << 30  # bytes that are sent in all, or
_MOST = 400  # messages


@dataclass(frozen=True)
class Figures:
    """Of messages of one size by one way.

    Attributes:
        latency: milliseconds one way, median of a ball thrown back and forth; the receiver does not read the data.
        apart: milliseconds between messages that all go one way.
        sender, receiver: milliseconds of CPU time of each process for a message that goes one way.
    """

    way: str
    size: str
    nbytes: int
    latency: float
    apart: float
    sender: float
    receiver: float

    @property
    def bandwidth(self) -> float:
        """GB/s."""
        return self.nbytes / self.apart / 1e6

    def each(self, spent: float) -> float:
        """Nanoseconds for a byte, of milliseconds for a message."""
        return spent / self.nbytes * 1e6 if self.nbytes else 0.0


def throw(run: str, peer: str, nbytes: int, count: int, first: bool) -> float:
    """Throw a ball back and forth; runs on both workers. Returns the median milliseconds of one way."""
    own, ball, took = channel(), _ball(nbytes), []
    for number in range(count):
        start = time.perf_counter()
        if first:
            own.send(run, peer, f"to {number}", ball)
            own.receive(run, f"back {number}", peer)
        else:
            own.receive(run, f"to {number}", peer)
            own.send(run, peer, f"back {number}", ball)
        took.append((time.perf_counter() - start) / 2)
    own.end(run)
    return statistics.median(took[_WARM:]) * 1e3


def stream(run: str, peer: str, nbytes: int, count: int, first: bool) -> tuple[float, float]:
    """Send messages one way, a few under way at once; runs on both workers. Milliseconds a message, of time and CPU."""
    own, ball, start, spent = channel(), _ball(nbytes), 0.0, 0.0
    for number in range(count + _WARM):
        if number == _WARM:
            start, spent = time.perf_counter(), time.process_time()
        if first:
            own.send(run, peer, f"ball {number}", ball)
            if number >= _WINDOW:
                own.receive(run, f"got {number - _WINDOW}", peer)
        else:
            own.receive(run, f"ball {number}", peer)
            own.send(run, peer, f"got {number}", ())
    found = (time.perf_counter() - start) / count, (time.process_time() - spent) / count
    if first:
        for number in range(count + _WARM - _WINDOW, count + _WARM):
            own.receive(run, f"got {number}", peer)
    own.end(run)
    return found[0] * 1e3, found[1] * 1e3


def _ball(nbytes: int) -> list[torch.Tensor]:
    torch.set_num_threads(1)
    return [torch.zeros(nbytes, dtype=torch.uint8)] if nbytes else []


def set_sharing(on: bool) -> None:
    """Let the worker that this runs on share memory, or not."""
    channel().sharing = on


def measure(client: Client, way: str, size: str) -> Figures:
    """Figures of messages between the client's first two workers."""
    nbytes = SIZES[size]
    count = max(20, min(_MOST, _TOTAL // max(nbytes, 1)))
    first, second = sorted(client.scheduler_info()["workers"])[:2]
    client.run(set_sharing, WAYS[way])
    seen = []
    for function in (throw, stream):
        run = uuid.uuid4().hex
        ends = [(first, second, True), (second, first, False)]
        seen.append(
            client.gather(
                [
                    client.submit(function, run, peer, nbytes, count, begins, workers=[own], pure=False)
                    for own, peer, begins in ends
                ]
            )
        )
    (latency, _), ((apart, sender), (_, receiver)) = seen
    return Figures(way, size, nbytes, latency, apart, sender, receiver)


@click.command()
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
def main(out: Path | None) -> None:
    """Direct messages between two worker processes of this machine."""
    with local_workers(2) as client:
        client.run(install)
        found = [measure(client, way, size) for way in WAYS for size in SIZES if SIZES[size] or way == "network"]
    table = Table("by", "tensors", "one way, ms", "GB/s", "CPU ms at the sender", "receiver", "CPU ns/byte", "receiver")
    for one in found:
        table.add_row(
            one.way, one.size, f"{one.latency:.2f}", f"{one.bandwidth:.1f}" if one.nbytes else "",
            f"{one.sender:.2f}", f"{one.receiver:.2f}",
            *(f"{one.each(spent):.3f}" if one.nbytes else "" for spent in (one.sender, one.receiver)),
        )  # fmt: skip
    Console(width=110).print(table)
    if out is not None:
        out.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
