"""Lanes on worker processes: steps of one device, and of several."""

from __future__ import annotations

import pytest
import torch
from distributed import Client
from torch import nn

import daggc

STEPS = 5


def trained(client: Client | None, **options: object) -> tuple[list[float], dict[str, torch.Tensor], object]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
    x, y = torch.randn(STEPS, 12, 8), torch.randn(STEPS, 12, 1)
    step = daggc.compile(model, client=client).train_step(
        nn.MSELoss(), torch.optim.AdamW(model.parameters(), lr=0.01), **options
    )
    step.records()  # of others on these workers
    pending = [step(a, b) for a, b in zip(x, y, strict=True)]  # submitted ahead, in order
    losses = [float(loss) for loss in pending]
    names = {record.name for own in step.records().values() for record in own}
    step.sync()
    return losses, {name: tensor.clone() for name, tensor in model.state_dict().items()}, names


def test_a_step_of_one_device_is_one_task_with_the_numbers_of_this_process(two_workers: Client) -> None:
    here = trained(None)
    there = trained(two_workers, stages=1)
    assert there[0] == here[0]
    assert all(torch.equal(there[1][name], tensor) for name, tensor in here[1].items())


def test_its_calls_are_recorded_one_by_one(two_workers: Client) -> None:
    assert trained(two_workers, stages=1)[2] == {"FB0.0", "U0"}


OPTIONS = [
    {"microbatches": 4, "force_microbatches": True},
    {"microbatches": 4, "force_microbatches": True, "schedule": "zb-h1"},
    {"microbatches": 4, "force_microbatches": True, "replicas": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_lanes_have_the_numbers_of_the_graph_of_tasks_to_the_bit(
    two_workers: Client, options: dict[str, object]
) -> None:
    graph = trained(two_workers, execution="graph", **options)
    lanes = trained(two_workers, execution="lanes", **options)
    assert lanes[0] == graph[0]
    assert all(torch.equal(lanes[1][name], tensor) for name, tensor in graph[1].items())
    assert lanes[2] == graph[2]
