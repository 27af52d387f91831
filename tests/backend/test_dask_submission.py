"""What the scheduler is sent: the same tasks, small data inside them, placed key by key."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from dask._task_spec import DataNode, Task, TaskRef

from daggc.backend import serializers  # noqa: F401  # tensors become bytes by these
from daggc.backend.dask_submission import packed, submission


def add(*values: Any) -> Any:
    return sum(values)


def run(tasks: dict[str, Any], key: str) -> Any:
    return tasks[key]({name: run(tasks, name) for name in tasks[key].dependencies})


def test_small_data_is_part_of_every_task_that_reads_it() -> None:
    one = torch.ones(3, dtype=torch.bfloat16)
    tasks = {
        "x": DataNode("x", one),
        "a": Task("a", add, TaskRef("x"), 1),
        "b": Task("b", add, TaskRef("a"), TaskRef("x")),
    }
    result = packed(tasks, ["b"])
    assert set(result) == {"a", "b"} and result["b"].dependencies == {"a"}
    assert run(result, "b").tolist() == [3, 3, 3]
    assert run(result, "b").dtype == torch.bfloat16


def test_large_data_is_sent_once() -> None:
    large = torch.arange(10_000.0)
    tasks = {"x": DataNode("x", large), "a": Task("a", add, TaskRef("x")), "b": Task("b", add, TaskRef("x"))}
    result = packed(tasks, ["a", "b"])
    assert set(result) == {"x", "a", "b"}
    assert torch.equal(run(result, "a"), large)
    only = packed({"x": DataNode("x", large), "a": Task("a", add, TaskRef("x"))}, ["a"])
    assert set(only) == {"a"}
    assert torch.equal(run(only, "a"), large)


def test_what_is_wanted_stays_a_task_of_its_own() -> None:
    tasks = {"x": DataNode("x", torch.ones(2)), "a": Task("a", add, TaskRef("x"))}
    assert set(packed(tasks, ["x", "a"])) == {"x", "a"}


def test_tasks_are_the_same_however_often_they_run() -> None:
    """A task may run twice: what it does to its data must not be seen the second time."""
    tasks = packed({"x": DataNode("x", torch.ones(2)), "a": Task("a", torch.Tensor.add_, TaskRef("x"), 1)}, ["a"])
    assert run(tasks, "a").tolist() == run(tasks, "a").tolist() == [2, 2]


def test_a_submission_keeps_its_annotations_on_the_way_and_has_a_name_of_its_own() -> None:
    tasks = {"a": Task("a", add, 1)}
    first, second = (submission(tasks, {"priority": {"a": 3}}) for _ in range(2))
    arrived = pickle.loads(pickle.dumps(first))
    assert arrived.__dask_annotations__() == {"priority": {"a": 3}}
    assert dict(arrived.__dask_graph__()) == tasks
    assert arrived._name == first._name != second._name
