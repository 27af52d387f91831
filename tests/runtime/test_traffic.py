"""What steps send is what was planned, to the byte, even where Dask drops copies of values as often as it can."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dask
import pytest
import torch
import torch.nn.functional as F
from cluster import processes
from distributed import Client
from torch import nn

import daggc
from daggc.backend.serializers import take_sent_to
from daggc.runtime.traffic import CLIENT, sent, tell_receivers, total
from daggc.runtime.train import TrainStep

pytestmark = pytest.mark.timeout(180)
STEPS = 24


@pytest.fixture(scope="module")
def workers() -> Iterator[Client]:
    """Two workers of a scheduler that looks for superfluous copies all the time."""
    with (
        dask.config.set({"distributed.scheduler.active-memory-manager.interval": "10ms"}),
        processes(2) as client,
    ):
        yield client


class Branches(nn.Module):
    """Two ways from the input to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32))
        self.right = nn.Sequential(nn.Linear(64, 40), nn.GELU(), nn.Linear(40, 32))
        self.head = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.left(x) * self.right(x))


def chain() -> nn.Module:
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Tanh())), nn.Linear(64, 8))


PLANS: dict[str, tuple[type[nn.Module] | Any, dict[str, Any]]] = {
    "1f1b": (chain, {"stages": 2, "microbatches": 4}),
    "gpipe": (chain, {"stages": 2, "microbatches": 4, "schedule": "gpipe"}),
    "zb-h1": (chain, {"stages": 2, "microbatches": 4, "schedule": "zb-h1"}),
    "the batch whole": (chain, {"stages": 2}),
    "replicas": (chain, {"stages": 1, "microbatches": 2, "replicas": 2}),
    "branches": (Branches, {"pins": {"left": "cpu:0", "right": "cpu:1"}, "microbatches": 2}),
}


def begin(client: Client, name: str) -> tuple[TrainStep, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    make, options = PLANS[name]
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    step = daggc.compile(model, client=client).train_step(F.cross_entropy, optimizer, seed=0, **options)
    batch = torch.randn(96, 64), torch.randint(8, (96,))
    float(step(*batch))  # the state is where it belongs
    return step, batch


@pytest.mark.parametrize("name", PLANS)
def test_bytes_sent_are_as_planned(workers: Client, name: str) -> None:
    step, batch = begin(workers, name)
    step.compare()
    for _ in range(STEPS):
        step(*batch)
    found = step.compare()
    assert found.moved == found.measured_moved
    assert step.step_program is not None
    planned = sent(step.step_program.step.graph)
    assert total(planned) == found.moved and any(tensor.target != CLIENT for tensor in planned)
    moved_state = [tensor for tensor in planned if tensor.what in ("param", "state", "buffer")]
    assert bool(moved_state) == (name == "replicas")
    step.close()


def test_they_are_counted_by_way(workers: Client) -> None:
    step, batch = begin(workers, "branches")
    workers.run(tell_receivers)
    workers.run(tell_receivers)  # once is enough
    workers.run(take_sent_to)
    for _ in range(STEPS):
        loss = step(*batch)
    float(loss)
    assert step.step_program is not None and step.pool is not None
    planned = sent(step.step_program.step.graph)
    names = {address: device for device, address in step.pool.addresses.items()}
    counted = {
        (names[address], names.get(receiver, CLIENT)): nbytes
        for address, receivers in workers.run(take_sent_to).items()
        for receiver, nbytes in receivers.items()
    }
    ways = {(tensor.source, tensor.target) for tensor in planned}
    assert {way: STEPS * total(t for t in planned if (t.source, t.target) == way) for way in ways} == counted
    step.close()


def test_what_they_are(workers: Client) -> None:
    step, _ = begin(workers, "branches")
    assert step.step_program is not None
    kinds = {(tensor.what, tensor.target) for tensor in sent(step.step_program.step.graph)}
    assert ("input", "cpu:1") in kinds or ("input", "cpu:0") in kinds  # both branches read it
    assert {what for what, _ in kinds} >= {"activation", "cotangent", "output"}
    assert not {what for what, _ in kinds} & {"scalar", "key"}  # small ones go with the tasks that read them
    step.close()
