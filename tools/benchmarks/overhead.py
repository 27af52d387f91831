"""What Dask costs a task: hops, independent tasks, tasks of daggc, steps of a model too small to take time.

Each is measured with the streams as Dask makes them and as daggc sets them, in turn on the same two workers; medians.
The cost of a step's task is the step's time less its time in this process, over its tasks.
"""

from __future__ import annotations

import json
import statistics
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from dask._task_spec import Task, TaskRef
from distributed import Client, wait
from rich.console import Console
from rich.table import Table
from torch import nn

import daggc
from daggc.backend.dask_graph import Emission, add_data, emit
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.call import declare
from daggc.plan.place import place
from daggc.runtime.dask_executor import merged
from daggc.runtime.local_workers import local_workers
from daggc.runtime.pool import Pool, pool_of
from daggc.runtime.streams import AT_ONCE, DASK, set_streams
from daggc.runtime.worker import run_task

STREAMS = {"as Dask has them": DASK, "as daggc sets them": AT_ONCE}


def one(*_: object) -> int:
    """A task that takes no time."""
    return 1


def chain(pool: Pool, count: int, devices: Sequence[str]) -> float:
    """Milliseconds a task of a chain of plain functions, on these devices in turn."""
    tasks = Emission()
    token = uuid.uuid4().hex
    keys = [f"daggc.hop-{token}-{i}" for i in range(count)]
    for i, key in enumerate(keys):
        tasks.tasks[key] = Task(key, one, *(TaskRef(before) for before in keys[max(0, i - 1) : i]))
        tasks.device[key] = devices[i % len(devices)]
    tasks.calls.extend(keys)
    return _timed(pool, tasks, keys[-1:]) / count


def independent(pool: Pool, count: int, devices: Sequence[str]) -> float:
    """Milliseconds a task of plain functions that wait for nothing."""
    tasks = Emission()
    token = uuid.uuid4().hex
    for i in range(count):
        key = f"daggc.single-{token}-{i}"
        tasks.tasks[key] = Task(key, one)
        tasks.device[key] = devices[i % len(devices)]
        tasks.calls.append(key)
    return _timed(pool, tasks, tasks.calls) / count


def _timed(pool: Pool, tasks: Emission, keys: Sequence[str]) -> float:
    start = time.perf_counter()
    wait(pool.submit(tasks, keys))
    return (time.perf_counter() - start) * 1e3


class Links:
    """A chain of daggc's calls, each of which adds one to four numbers."""

    def __init__(self, pool: Pool, count: int, devices: Sequence[str]) -> None:
        vector = TensorType("f32", (4,))
        body = REGISTRY.builder("link")
        x = body.input(vector, "input", "x")
        body.output(body.emit("add", x, x), "output", "0")
        main = REGISTRY.builder("main")
        value = main.input(vector, "input", "x")
        for i in range(count):
            value = main.emit("call", value, callee="link", stage=i, **declare([vector]))
        main.output(value, "output", "0")
        self.pool, self.count = pool, count
        self.graph = place(main.build(), lambda node: devices[int(node.attrs["stage"]) % len(devices)])
        self.key = f"overhead-{uuid.uuid4().hex}"
        program = daggc.Program({"main": self.graph, "link": body.build()})
        pool.ship(self.key, program, {})

    def run(self) -> float:
        """Milliseconds a call."""
        token = uuid.uuid4().hex
        data = Emission()
        port = self.graph.inputs[0]
        start = time.perf_counter()
        source = add_data(data, f"daggc.in-{token}-0", torch.ones(4), str(port.value.type.device))
        emission = merged(emit(self.graph, self.key, token, {port.ref: source}, run_task), data)
        wait(self.pool.submit(emission, emission.calls[-1:]))
        return (time.perf_counter() - start) * 1e3 / self.count


class Steps:
    """Training steps of a model that takes no time."""

    def __init__(self, client: Client | None, steps: int, **options: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        compiled = daggc.compile(model, client=client)
        self.batch = (torch.ones(16, 4), torch.ones(16, 4))
        self.steps = steps
        self.step = compiled.train_step(nn.functional.mse_loss, optimizer, **options)
        self.step(*self.batch).item()

    @property
    def tasks(self) -> int:
        assert self.step.step_program is not None
        return sum(node.op == "call" for node in self.step.step_program.step.graph.nodes)

    def cost(self, alone: float) -> float:
        """Milliseconds a task, beyond those that a step takes without Dask."""
        return (self.run() - alone) / self.tasks

    def run(self) -> float:
        """Milliseconds a step, submitted ahead."""
        start = time.perf_counter()
        losses = [self.step(*self.batch) for _ in range(self.steps)]
        losses[-1].item()
        return (time.perf_counter() - start) * 1e3 / self.steps


@dataclass(frozen=True)
class Measure:
    """Something measured, and what it counts for."""

    name: str
    run: Callable[[], float]


def measures(client: Client, pool: Pool, count: int, alone: float) -> list[Measure]:
    """What is measured, in milliseconds a task; ``alone``: milliseconds of a step in this process."""
    first, both = ["cpu:0"], ["cpu:0", "cpu:1"]
    links = {"one worker": Links(pool, count, first), "across workers": Links(pool, count, both)}
    there = {
        "one worker": Steps(client, 20, microbatches=4, stages=1),
        "two workers": Steps(client, 20, microbatches=4, stages=2),
    }
    found = [
        Measure("hop, one worker", lambda: chain(pool, count, first)),
        Measure("hop, across workers", lambda: chain(pool, count, both)),
        Measure("independent task", lambda: independent(pool, 2 * count, first)),
        Measure("independent task, two workers", lambda: independent(pool, 2 * count, both)),
    ]
    found += [Measure(f"daggc task in a chain, {where}", own.run) for where, own in links.items()]
    for where, steps in there.items():
        found.append(Measure(f"daggc task of a step, {where} ({steps.tasks} a step)", partial(steps.cost, alone)))
    return found


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--count", default=100, show_default=True, help="Tasks of a chain.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
def main(rounds: int, count: int, out: Path | None) -> None:
    """Milliseconds a task on two workers, with Dask's streams as they are and as daggc sets them."""
    here = Steps(None, 20, microbatches=4)  # before there is a client, which it would use
    alone = statistics.median(here.run() for _ in range(5))
    with local_workers(2) as client:
        pool = pool_of(client)
        asked = measures(client, pool, count, alone)
        seen: dict[str, dict[str, list[float]]] = {one.name: {kind: [] for kind in STREAMS} for one in asked}
        for _ in range(rounds):
            for kind, intervals in STREAMS.items():
                set_streams(client, intervals)
                for one in asked:
                    seen[one.name][kind].append(one.run())
    medians = {name: {kind: statistics.median(times) for kind, times in own.items()} for name, own in seen.items()}
    show(medians)
    if out is not None:
        out.write_text(json.dumps(medians, indent=1) + "\n")


def show(medians: Mapping[str, Mapping[str, float]]) -> None:
    """Print the medians as a table."""
    table = Table("ms", *STREAMS, "ratio")
    for name, own in medians.items():
        before, after = own.values()
        table.add_row(name, f"{before:.2f}", f"{after:.2f}", f"{after / before:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
