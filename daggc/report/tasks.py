"""The Dask tasks of a plan as rows to print, before any cluster exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from daggc.ir.graph import Port, Program
from daggc.plan.outline import RESIDENT
from daggc.report.picture import Arrow, Box, Cluster, Picture
from daggc.report.text import placed_graphs


@dataclass(frozen=True, slots=True)
class Task:
    """A task as Dask is handed it.

    Attributes:
        callee: the graph of the program that it runs; empty for a task that picks one value out of a result.
        dependencies: keys of tasks (and of inputs that a run supplies, such as ``<input:0>``), sorted.
    """

    key: str
    device: str
    callee: str
    dependencies: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def dask_tasks(program: Program, token: str = "run") -> list[Task]:
    """The tasks of every placed graph of a plan's program, in the order in which they are submitted.

    Parameters and buffers are in the workers' stores and appear in no task; residuals of ``@forward`` are
    dependencies of ``@backward``.
    """
    from daggc.backend.dask_graph import Call, Found, Resident, Source, emit  # dask, where tasks are asked for

    known: dict[str, Source] = {}
    rows: list[Task] = []

    def source(port: Port) -> Source:
        if port.ref in known:
            return known[port.ref]
        return Resident(port.ref) if port.kind in RESIDENT else Found(f"<{port.ref}>")

    for graph in placed_graphs(program):
        inputs = {port.ref: source(port) for port in graph.inputs}
        emission = emit(graph, "program", f"{token}-{graph.name}", inputs, _never_run)
        known.update(emission.outputs)
        for key, task in emission.tasks.items():
            calls = [argument for argument in getattr(task, "args", ()) if isinstance(argument, Call)]
            callee = calls[0].callee if calls else ""
            dependencies = tuple(sorted(map(str, task.dependencies)))
            rows.append(Task(key, emission.device[key], callee, dependencies))
    return rows


def _never_run(*arguments: object) -> None:
    """Stands for the entry point of tasks, which these never reach."""


def table(tasks: Sequence[Task]) -> Table:
    """Rows of key, device, callee and dependencies."""
    shown = Table(box=box.SIMPLE_HEAD)
    for column in ("key", "device", "callee", "dependencies"):
        shown.add_column(column, overflow="fold")
    for task in tasks:
        shown.add_row(task.key, task.device, task.callee, "\n".join(task.dependencies))
    return shown


def task_picture(tasks: Sequence[Task]) -> Picture:
    """Tasks grouped by device, with an arrow for each dependency."""
    clusters: dict[str, Cluster] = {}
    names = {task.key: f"t{index}" for index, task in enumerate(tasks)}
    outside = dict.fromkeys(key for task in tasks for key in task.dependencies if key not in names)
    for index, key in enumerate(outside):
        names[key] = f"i{index}"
    given = Cluster("given", "given by the run", [Box(names[key], (key.strip("<>"),), "input") for key in outside])
    for task in tasks:
        cluster = clusters.setdefault(task.device, Cluster(f"d{len(clusters)}", task.device))
        cluster.boxes.append(Box(names[task.key], (task.callee or "send", task.key), _role(task)))
    arrows = [Arrow(names[key], names[task.key]) for task in tasks for key in task.dependencies]
    return Picture([*([given] if outside else []), *clusters.values()], arrows)


def _role(task: Task) -> str:
    return task.callee.rpartition(".")[2] if task.callee else "transfer"
