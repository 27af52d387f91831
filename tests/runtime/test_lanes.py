"""Lanes of a step, run side by side in this process, with queues between them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import Trained, adamw, assert_equal_numbers, assert_same_bits, eagerly, mlp, points, stepwise

from daggc.backend.dask_graph import Emission
from daggc.backend.lanes import LaneCall
from daggc.errors import RunError
from daggc.plan.device import cluster_of, cpu_device
from daggc.runtime import store
from daggc.runtime.lanes import LaneRun
from daggc.runtime.train import train_step
from daggc.runtime.worker import Context, know, unknow

PATIENCE = 60  # seconds


class Letters:
    """A channel within a process; messages take their time, each another."""

    def __init__(self, seed: int) -> None:
        self.kept: dict[tuple[str, str], tuple[torch.Tensor, ...]] = {}
        self.aborted: dict[str, str] = {}
        self.changed = threading.Condition()
        self.random = random.Random(seed)

    def send(self, run: str, to: str, tag: str, tensors: Sequence[torch.Tensor]) -> None:
        time.sleep(self.random.random() * 2e-3)
        with self.changed:
            assert (run, tag) not in self.kept, "sent twice"
            self.kept[run, tag] = tuple(tensor.clone() for tensor in tensors)
            self.changed.notify_all()

    def receive(self, run: str, tag: str, source: str, check: Callable[[], None]) -> tuple[torch.Tensor, ...]:
        with self.changed:
            there = self.changed.wait_for(lambda: (run, tag) in self.kept or run in self.aborted, PATIENCE)
            assert there, f"{tag} never came"
            if run in self.aborted:
                raise RunError(self.aborted[run])
            return self.kept.pop((run, tag))

    def abort(self, run: str, reason: str, peers: Sequence[str]) -> None:
        with self.changed:
            self.aborted.setdefault(run, reason)
            self.changed.notify_all()

    def end(self, run: str) -> None:
        pass


class Side:
    """Workers that are threads of this process, which run the lanes of a step at the same time."""

    def __init__(self, devices: int, seed: int = 0) -> None:
        self.cluster = cluster_of([cpu_device(index) for index in range(devices)])
        self.addresses = {name: f"tcp://{name}" for name in self.cluster.names}
        self.client = SimpleNamespace(status="running", loop=SimpleNamespace(add_callback=lambda *_: None))
        self.letters = Letters(seed)
        self.stores: dict[str, dict[str, store.Store]] = {name: {} for name in self.cluster.names}
        self.lanes = 0

    def submit(self, emission: Emission, keys: Sequence[str]) -> list[Any]:
        lanes = {found.key for found in emission.updates.values()}
        data = {key: task() for key, task in emission.tasks.items() if key not in lanes}
        with ThreadPoolExecutor(len(emission.updates)) as threads:
            running = {
                found.key: threads.submit(self.run, emission.tasks[found.key], device, data)
                for device, found in emission.updates.items()
            }
        self.lanes += len(running)
        found: list[Any] = []
        for key in keys:
            try:
                found.append(running[key].result(PATIENCE))
            except Exception as wrong:  # as a pool gives what tasks raise
                found.append(RunError(f"a task failed: {wrong}"))
        return found

    def run(self, task: Any, device: str, data: dict[str, Any]) -> dict[str, torch.Tensor]:
        call, context, dependencies = task({name: data[name] for name in task.dependencies})
        assert isinstance(call, LaneCall) and isinstance(context, Context)
        lane = LaneRun(call, context, dependencies, self.letters, lambda: None)
        first = dict(lane(self.stores[device][context.store]))
        again = LaneRun(call, context, dependencies, self.letters, lambda: None)  # finds its work done
        assert all(torch.equal(first[ref], x) for ref, x in again(self.stores[device][context.store]).items())
        return first

    def gather(self, futures: Sequence[Any], timeout: float | None = None) -> list[Any]:
        for future in futures:
            if isinstance(future, RunError):
                raise future
        return list(futures)

    def run_on(self, device: str, function: Any, *args: Any) -> Any:
        here, store._STORES = store._STORES, self.stores[device]
        try:
            return function(*args)
        finally:
            store._STORES = here

    def scatter(self, tensors: dict[str, Any], device: str) -> dict[str, Any]:
        return {ref: tensor.clone() for ref, tensor in tensors.items()}

    def ship(self, key: str, program: Any, functions: Any) -> None:
        know(key, program)

    def forget(self, key: str) -> None:
        unknow(key)

    def cancel(self, futures: Sequence[Any]) -> None:
        pass


@pytest.fixture(autouse=True)
def lanes_are_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of lanes give what they were told, for :class:`Side` to run."""
    monkeypatch.setattr("daggc.runtime.resident.run_lane", lambda call, context, *given: (call, context, given))


def classify(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def beside(pool: Side, batches: Any, model: nn.Module | None = None, **options: Any) -> tuple[Trained, Any]:
    """A model trained in lanes."""
    run = eagerly(model or mlp(), classify, adamw, [])
    step = train_step(run.model, F.cross_entropy, run.optimizer, pool, execution="lanes", **options)  # pyright: ignore
    run.losses = [float(step(*batch)) for batch in batches]
    step.sync()
    return run, step


OPTIONS = [
    {"microbatches": 3},
    {"microbatches": 3, "max_grad_norm": 1.0},
    {"microbatches": 4, "schedule": "gpipe", "split_backward": True, "stages": 3},
    {"microbatches": 4, "schedule": "zb-h1"},
    {"microbatches": 4, "schedule": "zb-v", "stages": 4},
    {"microbatches": 4, "replicas": 2},
    {"microbatches": 4, "replicas": 2, "stages": 2, "max_grad_norm": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("devices", [2, 4])
def test_lanes_give_eager_numbers_whatever_the_messages_take(options: dict[str, Any], devices: int) -> None:
    batches = points([8, 8, 6])
    eager = eagerly(mlp(), classify, adamw, batches, clip=options.get("max_grad_norm"))
    eager.norms = []
    wanted: Trained | None = None
    for seed in range(2):
        pool = Side(devices, seed)
        got, step = beside(pool, batches, **options)
        assert_equal_numbers(got, eager)
        assert pool.lanes == len(batches) * len({str(n.attrs["device"]) for n in step.step_program.step.graph.nodes})
        assert not pool.letters.kept, "sent and not read"
        if wanted is not None:
            assert_same_bits(got.model, wanted.model)
        wanted = got


def test_lanes_give_the_bits_of_the_graph_of_tasks_here() -> None:
    batches = points([8, 8, 6])
    here, _ = stepwise(mlp(), F.cross_entropy, adamw, batches, microbatches=4)
    got, _ = beside(Side(2), batches, microbatches=4)
    assert_same_bits(got.model, here.model)


class Tied(nn.Module):
    """One weight at both ends, so that its gradient comes from two devices; and a gradient that is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Linear(8, 4, bias=False)
        self.middle = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
        self.shift = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.middle(self.into(x))
        return hidden @ self.into.weight.T + (self.shift * self.shift.detach()).sum() + self.shift


def test_parameters_that_are_updated_in_place_are_read_by_nothing_else() -> None:
    batches = points([8, 8, 8, 8])
    eager = eagerly(Tied().double(), classify, adamw, batches)
    got, _ = beside(Side(2), batches, Tied().double(), microbatches=2)
    assert_equal_numbers(got, eager)


@pytest.mark.parametrize("device", ["cpu:0", "cpu:1"])
def test_a_lane_that_fails_before_the_updates_leaves_all_as_it_was(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = points([8, 8, 8])
    wanted, _ = beside(Side(2), batches, microbatches=2)
    run = eagerly(mlp(), classify, adamw, [])
    step = train_step(run.model, F.cross_entropy, run.optimizer, Side(2), execution="lanes", microbatches=2)  # pyright: ignore
    run.losses = [float(step(*batches[0]))]
    compute = LaneRun.compute

    def failing(self: LaneRun, node: Any, arguments: Any, donated: Any) -> Any:
        if self.call.device == device and str(node.attrs["phase"]).startswith(("backward", "forward_backward")):
            raise ValueError("no")
        return compute(self, node, arguments, donated)

    monkeypatch.setattr(LaneRun, "compute", failing)
    with pytest.raises(RunError, match="no"):
        float(step(*batches[1]))
    monkeypatch.setattr(LaneRun, "compute", compute)
    assert step.steps == 1
    run.losses += [float(step(*batch)) for batch in batches[1:]]
    step.sync()
    assert_equal_numbers(run, wanted, tolerance=0)


def test_an_update_that_fails_is_told_and_a_checkpoint_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = points([8, 8])
    run = eagerly(mlp(), classify, adamw, [])
    step = train_step(run.model, F.cross_entropy, run.optimizer, Side(2), execution="lanes", microbatches=2)  # pyright: ignore
    float(step(*batches[0]))
    compute = LaneRun.compute

    def failing(self: LaneRun, node: Any, arguments: Any, donated: Any) -> Any:
        if self.call.device == "cpu:1" and node.attrs["phase"] == "update":
            raise ValueError("no")
        return compute(self, node, arguments, donated)

    monkeypatch.setattr(LaneRun, "compute", failing)
    with pytest.raises(RunError, match="no"):
        float(step(*batches[1]))
    with pytest.raises(RunError, match="between two steps; load a checkpoint"):
        step(*batches[1])
