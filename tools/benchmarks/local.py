"""daggc in this process beside eager PyTorch: time of a step, and peak memory of a process that does only that."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import daggc
from benchmarks.models import CASES, Case
from benchmarks.timing import Run, paired


def eager(case: Case) -> Run:
    """A training step, or inference, as PyTorch does it."""
    model, batch = case.make()
    loss_fn, optimizer = case.loss, case.optimizer and case.optimizer(model.parameters())
    if loss_fn is None or optimizer is None:
        return _inference(model, batch)

    def run() -> float:
        optimizer.zero_grad()
        loss = loss_fn(model(*batch[:-1]), batch[-1])
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def compiled(case: Case) -> Run:
    """The same by daggc, without a client."""
    model, batch = case.make()
    own = daggc.compile(model)
    if case.loss is None or case.optimizer is None:
        return _inference(own, batch)
    step = own.train_step(case.loss, case.optimizer(model.parameters()))
    return lambda: float(step(*batch))


def _inference(model: Callable[..., torch.Tensor], batch: tuple[torch.Tensor, ...]) -> Run:
    def run() -> float:
        with torch.no_grad():
            return float(model(*batch).flatten()[0])

    return run


WAYS: Mapping[str, Callable[[Case], Run]] = {"eager": eager, "daggc": compiled}


@dataclass(frozen=True)
class Row:
    """What was found of one case: milliseconds and bytes, and daggc's ratios to eager."""

    case: str
    threads: int
    eager_ms: float
    daggc_ms: float
    ratio: float
    limit: float
    eager_bytes: int
    daggc_bytes: int
    same: bool

    @property
    def memory(self) -> float:
        return self.daggc_bytes / self.eager_bytes


def measure(case: Case, rounds: int, threads: int) -> Row:
    """Time a case in this process, and its memory in two others."""
    torch.set_num_threads(threads)
    times = paired({name: make(case) for name, make in WAYS.items()}, rounds)
    peaks = {name: peak_of(case.name, name, threads) for name in WAYS}
    return Row(
        case.name, threads, times.median("eager") * 1e3, times.median("daggc") * 1e3, times.ratio("daggc", "eager"),
        case.limit, peaks["eager"], peaks["daggc"], times.first["eager"] == times.first["daggc"],
    )  # fmt: skip


def peak_of(case: str, way: str, threads: int) -> int:
    """Bytes of a step at their most, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.local", case, way, str(threads)], check=True, capture_output=True, text=True
    )
    return int(json.loads(done.stdout.splitlines()[-1]))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _peak(case: Case, way: str, threads: int) -> int:
    """The most that the process held while running, beyond what it held before the model was made.

    A small model was compiled and trained by then: what torch.export imports is no part of a step.
    """
    torch.set_num_threads(threads)
    for warm in WAYS.values():
        warm(CASES["tiny"])()
    before = _status("VmRSS")
    run = WAYS[way](case)
    run()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    for _ in range(3):
        run()
    return _status("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps(_peak(CASES[sys.argv[1]], sys.argv[2], int(sys.argv[3]))))
