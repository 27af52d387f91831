"""A step of which one device has all: a single task, which makes the next version of the device's state.

Between tasks that wait for each other there is a hop through the scheduler, of 2 to 6 ms, even on one worker. Nothing
is gained by it where no other device needs what is between them. Nor does one step wait for the one before: both are on
the worker, which runs them in the order in which they were submitted; the version of its state tells if it did not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dask._task_spec import Task

from daggc.backend.dask_graph import COMMITTED, Argument, Dependencies, Emission, Found, Source
from daggc.ir.graph import Graph


@dataclass(frozen=True, slots=True)
class WholeStep:
    """What the task is told: which placed graph of which program to run, on what.

    Attributes:
        program: the hash under which workers know the program.
        graph: its name.
        arguments: one for each input of the graph.
    """

    program: str
    graph: str
    arguments: tuple[Argument, ...]


def only_device(graph: Graph) -> str | None:
    """The device that has all of a placed graph; None if there are several."""
    devices = {str(node.attrs["device"]) for node in graph.nodes}
    devices |= {str(port.value.type.device) for port in graph.inputs}
    return devices.pop() if len(devices) == 1 else None


def emit_whole(
    graph: Graph,
    program: str,
    token: str,
    inputs: Mapping[str, Source],
    run: Callable[..., Any],
    *,
    context: Mapping[str, Any],
) -> Emission:
    """Emit a placed graph of one device as one task, whose result has the outputs that are not committed, by ref.

    Args:
        run: the entry point of the task: ``run(step, context, *dependencies)``.

    See :func:`daggc.backend.dask_graph.emit` for the rest.
    """
    device = only_device(graph)
    assert device is not None, "several devices have a part of the graph"
    dependencies = Dependencies()
    step = WholeStep(program, graph.name, tuple(dependencies.argument(inputs[port.ref]) for port in graph.inputs))
    key = f"daggc.{graph.name}-{token}"
    return Emission(
        tasks={key: Task(key, run, step, context.get(device), *dependencies.refs())},
        device={key: device},
        priority={key: 0},
        outputs={port.ref: Found(key, port.ref) for port in graph.outputs if port.kind not in COMMITTED},
        calls=[key],
        updates={device: Found(key)},
    )
