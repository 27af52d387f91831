"""An emission as the scheduler is sent it: packed so that a task costs little to send, to schedule and to start.

In a profile of a step of 21 tasks, Dask named the graph by a hash of all of it, 11 ms, and the scheduler pickled each
of 14 small tensors as torch does it, 0.9 ms each; every tensor was a task of its own. Here the graph has a name,
tensors are bytes from the client to their worker, and small ones are part of the task that reads them.

Like ``dask_graph.py`` this knows Dask's private task classes. The scheduler imports it.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from dask._expr import LLGExpr
from dask._task_spec import DataNode, GraphNode, Task
from distributed.protocol.serialize import deserialize_bytes, serialize_bytes

REPEATED = 4096  # bytes up to which a tensor is part of every task that reads it, not a task that they wait for


class Submission(LLGExpr):
    """Tasks, and for each annotation its value by key."""

    _parameters: ClassVar[list[str]] = ["dsk", "annotations"]

    def __dask_annotations__(self) -> dict[str, dict[Any, object]]:
        return self.operand("annotations")


def submission(tasks: Mapping[str, GraphNode], annotations: Mapping[str, Mapping[str, object]]) -> Submission:
    """What ``Client.get`` takes instead of a dict of tasks."""
    return Submission(dict(tasks), dict(annotations), _determ_token=uuid.uuid4().hex)


def packed(tasks: Mapping[str, GraphNode], wanted: Collection[str]) -> dict[str, GraphNode]:
    """The same tasks with their data as bytes, and small data inside the tasks that read it.

    Args:
        wanted: keys that stay tasks of their own, whatever they are.
    """
    values = {key: node.value for key, node in tasks.items() if isinstance(node, DataNode)}
    data = {key: serialize_bytes(value, compression=False) for key, value in values.items()}
    # Of a tensor its own bytes count, without the header: what a step sends is told from its graph.
    small = {key for key, value in values.items() if getattr(value, "nbytes", len(data[key])) <= REPEATED}
    readers = dict.fromkeys(data, 0)
    for node in tasks.values():
        for key in node.dependencies & readers.keys():
            readers[key] += 1
    inside: dict[Any, Any] = {
        key: Task(None, deserialize_bytes, value)
        for key, value in data.items()
        if key not in wanted and readers[key] and (key in small or readers[key] == 1)
    }
    result: dict[str, GraphNode] = {}
    for key, node in tasks.items():
        if key in data:
            if key not in inside:
                result[key] = Task(key, deserialize_bytes, data[key])
        else:
            result[key] = node.substitute(inside) if node.dependencies & inside.keys() else node
    return result
