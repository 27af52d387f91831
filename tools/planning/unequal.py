"""Unequal devices: one worker that gets half of a core, and one with little memory.

The first part starts two worker processes, each on a core of its own, and on one of these cores a busy process of the
same priority: nobody is told. Workers are calibrated, a training step is planned and run, and its time is measured
beside that of an equal cut, the two in turns. The second part starts two workers with unequal limits on their memory,
which Dask enforces: the step must fit both, and run.
"""

from __future__ import annotations

import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click
import dask
import torch
import torch.nn.functional as F
from distributed import Client, Nanny, Scheduler, SpecCluster
from torch import nn

import daggc
from daggc.plan.cost import Costs
from daggc.plan.plan import Plan
from daggc.runtime.local_workers import dask_settings, local_workers
from daggc.runtime.train import TrainStep

MB = 1e6
USABLE = 0.95  # of the limit of a worker that does not pause, what daggc plans with
_BUSY = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
parent = os.getppid()
while os.getppid() == parent:  # it ends with the process that started it
    for _ in range(1_000_000):
        pass
"""


def mlp(width: int, layers: int) -> nn.Module:
    """Layers alike, so that shares are easy to read: ``0`` to ``2 * layers - 1``, each with an activation."""
    torch.manual_seed(0)
    parts = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*parts, nn.Linear(width, 10))


def batch(width: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(samples, width), torch.randint(10, (samples,))


def begin(model: nn.Module, client: Any, **options: Any) -> TrainStep:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return daggc.compile(model, client=client).train_step(F.cross_entropy, optimizer, seed=0, **options)


# --- a slow worker --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slow:
    """What came of it: by device, the part of the work (seconds on one and the same device); seconds of steps.

    Attributes:
        factor: how many times as long the slow worker takes, as calibration sees it.
        predicted: of a step of our plan.
        ours, equal: measured, and ``ratio``: the median of ours / equal within rounds.
    """

    shares: dict[str, float]
    factor: float
    predicted: float
    ours: float
    equal: float
    ratio: float

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        times = f"{self.ours * 1e3:.0f} ms (predicted {self.predicted * 1e3:.0f})"
        lines = [
            f"a worker that shares its core: calibration sees it {self.factor:.2f} times as slow",
            f"  planned shares of the work: {shares} (twice as slow: 67% and 33%)",
            f"  a step: {times}, of an equal cut {self.equal * 1e3:.0f} ms; ratio {self.ratio:.2f}",
        ]
        return "\n".join(lines)


def slow_worker(width: int = 768, layers: int = 12, samples: int = 256, rounds: int = 5) -> Slow:
    """Plan and run a step on two workers of which the second shares its core with a busy process."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise click.ClickException("this needs two cores")
    with local_workers(2) as client, busy(cores[1]):
        for address, core in zip(ordered_workers(client), cores, strict=True):
            client.run(pin, core, workers=[address])
        cluster = daggc.calibrate(client)
        data, half = batch(width, samples), 2 * (layers // 2)
        ours = begin(mlp(width, layers), client, microbatches=4)
        pins = {str(index): f"cpu:{int(index >= half)}" for index in range(2 * layers + 1)}
        equal = begin(mlp(width, layers), client, microbatches=4, pins=pins)
        program = ours.plan_for(*data)
        for step in (ours, equal):
            seconds_of_steps(step, data, 3)
        times = [(seconds_of_steps(ours, data, 4), seconds_of_steps(equal, data, 4)) for _ in range(rounds)]
        costs = Costs.of(program.plan.joint.nodes)
        seconds = [float(costs.seconds(device).sum()) for device in cluster.devices]
        return Slow(
            shares_of_work(program.plan),
            seconds[1] / seconds[0],
            program.predicted.makespan,
            statistics.median(own for own, _ in times),
            statistics.median(other for _, other in times),
            statistics.median(own / other for own, other in times),
        )


def shares_of_work(plan: Plan) -> dict[str, float]:
    """Of each device, the part of all tasks' seconds, were they all on the first device."""
    device = plan.cluster.devices[0]
    seconds = dict.fromkeys(plan.cluster.names, 0.0)
    for node in plan.tasks:
        own = Costs.of(plan.bodies[str(node.attrs["callee"])].nodes).seconds(device)
        seconds[str(node.attrs["device"])] += float(own.sum())
    return {name: own / sum(seconds.values()) for name, own in seconds.items()}


def ordered_workers(client: Any) -> list[str]:
    """Addresses in the order in which they are numbered as devices."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return sorted(workers, key=lambda address: int(workers[address]["name"]))


def pin(core: int) -> None:
    """Have all threads of this process, and those to come, on one core; runs on a worker."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})


@contextmanager
def busy(core: int) -> Iterator[int]:
    """A process that computes on a core until the end; gives its number."""
    process = subprocess.Popen([sys.executable, "-c", _BUSY, str(core)])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def seconds_of_steps(step: TrainStep, data: Sequence[torch.Tensor], count: int) -> float:
    """Of one of so many steps that are submitted at once."""
    start = time.perf_counter()
    losses = [step(*data) for _ in range(count)]
    float(losses[-1])
    return (time.perf_counter() - start) / count


# --- a worker with little memory ------------------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """What came of it, by device: bytes that tasks may use, that are predicted, and that were held at most.

    Attributes:
        equal: bytes that are predicted where both workers have plenty.
    """

    room: dict[str, float]
    predicted: dict[str, float]
    held: dict[str, float]
    equal: dict[str, float]
    losses: tuple[float, ...]

    def __str__(self) -> str:
        lines = ["a worker with little memory:"]
        for name, room in self.room.items():
            lines.append(
                f"  {name}: may use {room / MB:.0f} MB; predicted {self.predicted.get(name, 0) / MB:.0f} MB, "
                f"held {self.held.get(name, 0) / MB:.0f} MB (with plenty: {self.equal.get(name, 0) / MB:.0f} MB)"
            )
        return "\n".join(
            [*lines, f"  {len(self.losses)} steps ran, losses {self.losses[0]:.3f} to {self.losses[-1]:.3f}"]
        )


def small_worker(width: int = 1536, layers: int = 12, samples: int = 64, part: float = 0.6) -> Small:
    """Plan and run a step on two workers, of which the second has room for a part of what it would get."""
    data = batch(width, samples)
    with unequal_workers([0, 0]) as client:
        base = max(client.run(resident).values())
        free = begin(mlp(width, layers), client, microbatches=4).plan_for(*data).predicted.peaks
    limit = round((base + part * free["cpu:1"]) / USABLE)
    with unequal_workers([0, limit]) as client:
        step = begin(mlp(width, layers), client, microbatches=4)
        losses = tuple(float(step(*data)) for _ in range(6))
        program = step.step_program
        assert program is not None
        room = {device.name: device.memory for device in program.cluster.devices}
        return Small(room, program.predicted.peaks, dict(step.compare().measured_memory), free, losses)


def resident() -> float:
    """Bytes that a worker's process holds; runs there."""
    from daggc.runtime.memory import held_now

    return held_now()


@contextmanager
def unequal_workers(limits: Sequence[int]) -> Iterator[Any]:
    """A client of worker processes with these limits in bytes (0: none); one that holds more is killed.

    Nothing is spilled to disk, and workers do not pause: a plan that fits needs neither.
    """
    off = {f"distributed.worker.memory.{name}": False for name in ("target", "spill", "pause")}
    with dask.config.set({**dask_settings(), **off, "distributed.worker.memory.terminate": 1.0}):
        shared = {"nthreads": 2, "dashboard_address": None, "silence_logs": logging.ERROR}
        specs = {index: {"cls": Nanny, "options": {**shared, "memory_limit": own}} for index, own in enumerate(limits)}
        scheduler = {"cls": Scheduler, "options": {"dashboard_address": None, "host": "127.0.0.1"}}
        with SpecCluster(workers=specs, scheduler=scheduler) as cluster, Client(cluster, timeout=60) as client:
            client.wait_for_workers(len(limits), timeout=60)
            yield client


@click.command(help=__doc__)
@click.option("--only", type=click.Choice(("slow", "small")), help="Only this part.")
def main(only: str | None) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if only != "small":
        click.echo(str(slow_worker()))
    if only != "slow":
        click.echo(str(small_worker()))


if __name__ == "__main__":
    main()
