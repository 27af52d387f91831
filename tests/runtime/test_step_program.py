"""Steps whose tasks run twice, in any order that their dependencies allow, and fail anywhere.

The tasks are those that workers get; here they run in this process, where every order can be had.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from training import Trained, adamw, assert_equal_numbers, assert_same_bits, eagerly, mlp, points, stepwise

from daggc.backend.dask_graph import Emission
from daggc.errors import RunError
from daggc.plan.device import cluster_of, cpu_device
from daggc.runtime import store
from daggc.runtime.train import train_step
from daggc.runtime.worker import know, unknow


class PretendedPool:
    """Workers that are dicts of stores in this process.

    Attributes:
        twice: run every task a second time, right away or once the step is over.
        fail: key prefix of a task that raises, before or after it did its work.
    """

    def __init__(self, devices: int, seed: int = 0, twice: bool = False) -> None:
        self.cluster = cluster_of([cpu_device(index) for index in range(devices)])
        self.addresses = {name: name for name in self.cluster.names}
        idle = SimpleNamespace(add_callback=lambda *_: None)
        self.client = SimpleNamespace(status="running", loop=idle)
        self.random = random.Random(seed)
        self.twice = twice
        self.fail: tuple[int, str] | None = None
        self.ran: list[str] = []
        self._stores: dict[str, dict[str, store.Store]] = {name: {} for name in self.cluster.names}
        self._results: dict[str, Any] = {}

    @contextmanager
    def on(self, device: str):
        here, store._STORES = store._STORES, self._stores[device]
        try:
            yield
        finally:
            store._STORES = here

    def submit(self, emission: Emission, keys: Sequence[str]) -> list[Any]:
        self.ran = []
        wrong: set[str] = set()
        waiting = dict(emission.tasks)
        while waiting:
            ready = [key for key, task in waiting.items() if not task.dependencies & waiting.keys()]
            key = self.random.choice(ready)
            task = waiting.pop(key)
            if task.dependencies & wrong or not self._run(key, task, emission.device[key]):
                wrong.add(key)
        again = [key for key in emission.tasks if key not in wrong]
        self.random.shuffle(again)
        for key in again if self.twice else ():
            self._run(key, emission.tasks[key], emission.device[key])
        return [RunError("a task failed here") if key in wrong else self._results[key] for key in keys]

    def _run(self, key: str, task: Any, device: str) -> bool:
        with self.on(device):
            fails = self.fail is not None and self.fail[0] == len(self.ran)
            if fails and self.fail == (len(self.ran), "before"):
                self.ran.append(key)
                return False
            for _ in range(2 if self.twice and self.random.random() < 0.5 else 1):
                self._results[key] = task({name: self._results[name] for name in task.dependencies})
            self.ran.append(key)
            return not fails

    def gather(self, futures: Sequence[Any], timeout: float | None = None) -> list[Any]:
        for future in futures:
            if isinstance(future, RunError):
                raise future
        return list(futures)

    def run_on(self, device: str, function: Any, *args: Any) -> Any:
        with self.on(device):
            return function(*args)

    def scatter(self, tensors: dict[str, Any], device: str) -> dict[str, Any]:
        return dict(tensors)

    def ship(self, key: str, program: Any, functions: Any) -> None:
        know(key, program)

    def forget(self, key: str) -> None:
        unknow(key)

    def cancel(self, futures: Sequence[Any]) -> None:
        pass


def classify(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def pretended(pool: PretendedPool, **options: Any) -> tuple[Trained, Any]:
    run = eagerly(mlp(), classify, adamw, [])
    step = train_step(run.model, F.cross_entropy, run.optimizer, pool, microbatches=3, execution="graph", **options)  # pyright: ignore
    return run, step


@pytest.mark.parametrize("options", [{}, {"schedule": "gpipe", "split_backward": True, "stages": 3}], ids=str)
def test_orders_and_tasks_that_run_twice_give_the_same_bits(options):
    batches = points([7, 7, 5])
    wanted, step = pretended(PretendedPool(2), max_grad_norm=1.0, **options)
    wanted.losses = [float(step(*batch)) for batch in batches]
    step.sync()
    eager = eagerly(mlp(), classify, adamw, batches, clip=1.0)
    eager.norms = []
    assert_equal_numbers(wanted, eager)
    for seed in range(4):
        pool = PretendedPool(2, seed, twice=True)
        got, step = pretended(pool, max_grad_norm=1.0, **options)
        got.losses = [float(step(*batch)) for batch in batches]
        step.sync()
        assert len(pool.ran) > 30
        assert_same_bits(got.model, wanted.model)
        assert_equal_numbers(got, wanted, tolerance=0)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_that_fails_anywhere_before_its_updates_changes_nothing(tmp_path, clip):
    """Every task of the second step fails in turn, before or after its work; then the step is taken again."""
    batches = points([7, 7, 7])
    wanted, _ = stepwise(mlp(), F.cross_entropy, adamw, batches, microbatches=3, max_grad_norm=clip)
    pool = PretendedPool(2)
    got, step = pretended(pool, max_grad_norm=clip)
    step(*batches[0])
    step.save(path := tmp_path / "c")
    first = list(pool.ran)
    torn = 0
    for place in range(len(first)):
        for when in ("before", "after"):
            step.load(path)
            pool.fail = place, when
            loss = step(*batches[1])
            kind = pool.ran[place].split("-")[0]
            pool.fail = None
            if kind == "daggc.in":  # data do not fail
                continue
            with pytest.raises(RunError):
                float(loss)
            if kind.startswith("daggc.update") or step.steps != 1:
                torn += 1
                with pytest.raises(RunError, match="between two steps; load a checkpoint"):
                    step(*batches[1])
                with pytest.raises(RunError, match="load a checkpoint"):
                    step.sync()
                continue
            with pytest.raises(RunError):
                loss.result()
            assert step.steps == 1
            got.losses = [float(step(*batch)) for batch in batches[1:]]
            step.sync()
            assert_equal_numbers(got, Trained(wanted.model, wanted.optimizer, wanted.losses[1:]), tolerance=1e-12)
    assert torn
