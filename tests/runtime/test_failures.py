"""What goes wrong ends soon, with an error that says what and where, and leaves nothing running."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cluster import processes
from distributed import Client
from torch import nn
from training import Trained, adamw, assert_equal_numbers, assert_same_bits, eagerly, mlp, points, stepwise

import daggc
from daggc.errors import PlanError, RunError, WorkerLostError
from daggc.runtime import lanes, pool, store, worker


def classify(model, x, y):
    return F.cross_entropy(model(x), y)


@daggc.opaque(out=lambda x, stage: torch.empty_like(x))
def fragile(x: torch.Tensor, stage: int) -> torch.Tensor:
    """Passes its input on; numbers in it tell it to raise, or to end its process."""
    told = float(x.detach().max())
    if told == 1000 + stage:
        raise ValueError("the 13th sample is bad")
    if told == 2000 + stage:
        os._exit(7)
    return x * 1.0


class Fragile(nn.Module):
    """Two like halves, so that each is on a worker of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
        self.second = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        told = x[:, :1]
        calm = torch.where(x.abs() < 500, x, 0.0)
        x = fragile(torch.cat([told, self.first(calm)], 1), 0)[:, 1:]
        return fragile(torch.cat([told, self.second(x)], 1), 1)[:, 1:]


PINS = {"first*": "cpu:0", "second*": "cpu:1"}


def fragile_model():
    torch.manual_seed(0)
    return Fragile().double()


def telling(batch, number):
    """The batch with a number for `fragile`."""
    x = batch[0].clone()
    x[4, 0] = number
    return x, batch[1]


def training(client, execution="auto", **options):
    run = Trained(fragile_model(), None)  # pyright: ignore
    run.optimizer = adamw(run.model)
    compiled = daggc.compile(run.model, client=client, **options)
    pins = None if client is None or options else PINS
    return run, compiled.train_step(F.cross_entropy, run.optimizer, pins=pins, execution=execution)


def assert_nothing_left(client, seconds=5.0):
    """No task of ours is known to the scheduler."""
    end = time.monotonic() + seconds
    while True:
        left = client.run_on_scheduler(lambda dask_scheduler: [k for k in dask_scheduler.tasks if "daggc" in str(k)])
        if not left:
            return
        assert time.monotonic() < end, left
        time.sleep(0.1)


@contextmanager
def at_most(seconds):
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


@pytest.mark.parametrize("where", ["graph", "lanes", "here"])
def test_a_task_that_raises_costs_its_step_only(two_workers, where):
    """Steps submitted after it are given up too; the state is that before the step, and training goes on."""
    batches = points([6] * 5)
    wanted = eagerly(fragile_model(), classify, adamw, batches)
    run, step = training(None) if where == "here" else training(two_workers, where)
    run.losses += [float(step(*batch)) for batch in batches[:2]]
    for number in (1000, 1001):
        with at_most(10), pytest.raises(RunError, match="13th sample is bad"):
            bad = step(*telling(batches[2], number))
            after = step(*batches[3])
            float(bad)
        if where != "here":
            with pytest.raises(RunError, match=r"not run: an earlier step failed.*13th sample"):
                float(after)
            with pytest.raises(RunError, match="13th sample"):
                float(bad)
        assert step.steps == 2
    run.losses.append(float(step(*batches[2])))
    if where != "here":
        step(*telling(batches[3], 1001))  # met by whoever waits next
        with pytest.raises(RunError, match="13th sample is bad"):
            step.sync()
        late, _ = step(*telling(batches[3], 1000)), step(*batches[3])
        with pytest.raises(RunError, match="13th sample is bad"):
            step(*batches[3])
        del late
    run.losses += [float(step(*batch)) for batch in batches[3:]]
    step.sync()
    assert_equal_numbers(run, wanted)
    step.close()
    if where != "here":
        assert_nothing_left(two_workers)


def tear() -> None:
    """From now on an update does its work and then fails; runs on a worker."""
    plain = worker.run_graph

    def torn(program, graph, *args):
        results = plain(program, graph, *args)
        if graph.name.endswith(".update"):
            raise MemoryError("no memory for the last bit")
        return results

    worker.run_graph = lanes.run_graph = torn
    torn.plain = plain  # pyright: ignore


def mend() -> None:
    worker.run_graph = lanes.run_graph = worker.run_graph.plain  # pyright: ignore


@pytest.mark.parametrize("execution", ["graph", "lanes"])
def test_an_update_that_fails_halfway_is_told_and_a_checkpoint_helps(two_workers, tmp_path, execution):
    batches = points([6] * 4)
    wanted, other = stepwise(fragile_model(), F.cross_entropy, adamw, batches, client=two_workers, pins=PINS)
    other.close()
    run, step = training(two_workers, execution)
    step(*batches[0])
    step.save(path := tmp_path / "c")
    float(step(*batches[1]))
    one = next(iter(two_workers.scheduler_info()["workers"]))
    two_workers.run(tear, workers=[one])
    try:
        with at_most(10), pytest.raises(RunError, match="no memory for the last bit"):
            float(step(*batches[2]))
    finally:
        two_workers.run(mend, workers=[one])
    for use in (lambda: step(*batches[2]), step.sync, lambda: step.save(tmp_path / "d")):
        with at_most(10), pytest.raises(RunError, match=r"on cpu:\d.* between two steps; load a checkpoint"):
            use()
    step.load_from_model()  # what it was when it was saved nowhere: the start
    assert float(step(*batches[0])) == wanted.losses[0]
    step.load(path)
    run.losses = wanted.losses[:1] + [float(step(*batch)) for batch in batches[1:]]
    step.sync()
    assert_same_bits(run.model, wanted.model)
    assert run.losses == wanted.losses
    step.close()
    assert_nothing_left(two_workers)


@pytest.mark.parametrize("execution", ["graph", "lanes"])
def test_a_worker_that_dies_in_mid_step(tmp_path, execution):
    """A clear error soon; the others are left idle; from the checkpoint the numbers are those of no accident."""
    batches = points([6] * 4)
    with processes(2) as client:
        wanted, step = stepwise(fragile_model(), F.cross_entropy, adamw, batches, client=client, pins=PINS)
        step.close()
        run, step = training(client, execution)
        places = pool.pool_of(client).addresses
        float(step(*batches[0]))
        last = step.plan.stages[-1].device
        step.save(path := tmp_path / "c")
        dying = step(*telling(batches[1], 2001))
        after = step(*batches[2])
        with at_most(5), pytest.raises(WorkerLostError, match=rf"{last} \({places[last]}\) is gone.*last checkpoint"):
            float(dying)
        for use in (lambda: float(after), lambda: float(dying), lambda: step(*batches[1]), step.sync):
            with at_most(5), pytest.raises(RunError, match="is gone"):
                use()
        assert_nothing_left(client)
        client.wait_for_workers(2, timeout=60)
        end = time.monotonic() + 60
        while len(client.nthreads()) < 2 or places[last] in client.nthreads():
            assert time.monotonic() < end
            time.sleep(0.1)
        one = next(name for name in places if name != last)
        for options in ({}, {"devices": [one]}):  # the new worker and the old, or the one that is left
            run, step = training(client, execution, **options)
            with torch.no_grad():
                for parameter in run.model.parameters():
                    parameter.zero_()
            step.load(path)
            run.losses = wanted.losses[:1] + [float(step(*batch)) for batch in batches[1:]]
            step.sync()
            assert_equal_numbers(run, wanted)
            if not options:
                assert_same_bits(run.model, wanted.model)
            step.close()
        assert_nothing_left(client)


def test_a_worker_that_is_killed_between_steps():
    """Found when the next step is waited for."""
    with processes(2) as client:
        _, step = training(client)
        (batch,) = points([6])
        float(step(*batch))
        pid = list(client.run(os.getpid).values())[-1]
        os.kill(pid, 9)
        with at_most(5), pytest.raises(WorkerLostError, match="is gone"):
            for _ in range(3):
                float(step(*batch))
        assert_nothing_left(client)


@contextmanager
def separate_scheduler(folder):
    """A scheduler and two workers as processes of their own; gives a client and the scheduler's process."""
    run = [sys.executable, "-m"]
    started = []
    try:
        file = str(folder / "scheduler.json")
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        arguments = ["distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", file]
        started.append(subprocess.Popen([*run, *arguments], **quiet))
        for name in "01":
            arguments = ["distributed.cli.dask_worker", "--scheduler-file", file, "--no-nanny", "--nthreads", "1"]
            arguments += ["--no-dashboard", "--name", name, "--death-timeout", "5"]
            started.append(subprocess.Popen([*run, *arguments], cwd=os.path.dirname(__file__), **quiet))
        with Client(scheduler_file=file, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
            yield client, started[0]
    finally:
        for process in started:
            process.kill()
            process.wait(timeout=30)


def test_a_scheduler_that_dies(tmp_path):
    """Only a checkpoint helps; nothing hangs."""
    with separate_scheduler(tmp_path) as (client, scheduler):
        model = mlp()
        step = daggc.compile(model, client=client).train_step(F.cross_entropy, adamw(model), microbatches=2)
        (batch,) = points([6])
        float(step(*batch))
        loss = step(*batch)
        scheduler.kill()
        with at_most(15), pytest.raises(RunError, match="scheduler"):
            for _ in range(3):
                float(loss)
                loss = step(*batch)
        with at_most(15), pytest.raises(RunError):
            step.sync()


def test_a_model_larger_than_all_memory(two_workers, monkeypatch):
    found = pool.pool_of

    def small(client, devices=None):
        real = found(client, devices)
        devices = tuple(replace(device, memory=2000.0) for device in real.cluster.devices)
        return replace(real, cluster=replace(real.cluster, devices=devices))

    monkeypatch.setattr("daggc.runtime.compile.pool_of", small)
    model = mlp()
    step = daggc.compile(model, client=two_workers).train_step(F.cross_entropy, adamw(model))
    with (
        at_most(20),
        pytest.raises(PlanError, match=r"does not fit.*devices have 4,000 together: [\d,]+ bytes are short"),
    ):
        step(*points([4])[0])
    assert_nothing_left(two_workers)


def test_devices_that_are_not_there(two_workers):
    with pytest.raises(PlanError, match=r"no device cpu:7; the client's workers are cpu:0, cpu:1"):
        daggc.compile(mlp(), client=two_workers, devices=["cpu:0", "cpu:7"])
    with pytest.raises(RunError, match="there is no client"):
        daggc.compile(mlp(), devices=["cpu:0"])
    model = mlp()
    step = daggc.compile(model, client=two_workers).train_step(F.cross_entropy, adamw(model), pins={"0": "gpu:3"})
    with pytest.raises(PlanError, match="gpu:3"):
        step(*points([4])[0])


def test_a_train_step_that_is_forgotten_leaves_no_state(two_workers):
    def stores():
        return list(store._STORES)

    def programs():
        return list(worker._PROGRAMS)

    before = two_workers.run(stores), two_workers.run(programs)
    model = mlp()
    compiled = daggc.compile(model, client=two_workers)
    step = compiled.train_step(F.cross_entropy, adamw(model))
    float(step(*points([4])[0]))
    assert two_workers.run(stores) != before[0]
    del step, compiled
    gc.collect()
    end = time.monotonic() + 10
    while (two_workers.run(stores), two_workers.run(programs)) != before:
        assert time.monotonic() < end
        time.sleep(0.1)
