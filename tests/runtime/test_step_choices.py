"""What ``auto`` takes of a real model: numbers stay, and what fits is found."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_step_program import PretendedPool, classify
from torch import nn
from training import adamw, assert_equal_numbers, eagerly, mlp, points

from daggc.errors import PlanError
from daggc.plan.automatic import possible
from daggc.plan.bodies import Group
from daggc.plan.device import cluster_of, cpu_device
from daggc.runtime.batch import call_with_loss, read_batch
from daggc.runtime.predict import predict_step
from daggc.runtime.step_program import Options, StepBuilder, StepProgram
from daggc.runtime.train import train_step

FREE: dict[str, Any] = {"microbatches": "auto", "schedule": "auto", "replicas": "auto"}


@pytest.mark.parametrize(
    ("schedule", "devices"),
    [("zb-v", ["cpu:0", "cpu:1", "cpu:1", "cpu:0"]), ("interleaved", ["cpu:0", "cpu:1", "cpu:0", "cpu:1"])],
)
def test_several_stages_a_device_give_the_numbers_of_the_whole_batch(schedule: str, devices: list[str]):
    batches = points([7, 7, 5])
    run = eagerly(mlp(), classify, adamw, [])
    pool = PretendedPool(2)
    options: dict[str, Any] = {"microbatches": 3, "schedule": schedule, "stages": 4}
    step = train_step(run.model, F.cross_entropy, run.optimizer, pool, execution="graph", **options)  # pyright: ignore
    run.losses = [float(step(*batch)) for batch in batches]
    step.sync()
    assert_equal_numbers(run, eagerly(mlp(), classify, adamw, batches))
    assert step.plan is not None and [stage.device for stage in step.plan.stages] == devices


def test_where_a_device_cannot_have_two_stages_it_has_one():
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight  # no cut: both uses are on one device, one after the other
    program = predict_step(tied, F.mse_loss, (torch.randn(8, 6), torch.randn(8, 6)), devices(2, 1e9),
                           options=Options(microbatches=2, schedule="interleaved"))  # fmt: skip
    assert len(program.plan.stages) <= 2


def devices(count: int, memory: float):
    return cluster_of([cpu_device(index, memory) for index in range(count)])


def wide() -> nn.Module:
    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (nn.Linear(64, 64), nn.GELU(), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(64, 3))


@cache
def builder() -> tuple[StepBuilder, Any, list[Group]]:
    """One builder for all tests: captures are kept."""
    model = wide()
    batch = read_batch((torch.randn(8192, 64), torch.randint(3, (8192,))), {})
    names = tuple(name for name, _ in model.named_parameters())
    made = StepBuilder(model, call_with_loss(F.cross_entropy), devices(2, 1e9), Options())
    return made, batch, [Group("0", names, "adamw", {})]


@cache
def planned(memory: float, options: Options) -> StepProgram | None:
    own, batch, groups = builder()
    own.options = options
    own.use(devices(2, memory))
    try:
        return own.build([batch], groups, False)
    except PlanError as wrong:
        assert "short" in str(wrong)
        return None


@pytest.mark.parametrize(
    "part", [0.45, *(pytest.param(part, marks=pytest.mark.slow) for part in (0.3, 0.6, 0.75, 0.9))]
)
def test_auto_fits_wherever_a_choice_of_its_list_does(part: float):
    free = planned(1e9, Options(4))
    assert free is not None
    memory = part * max(free.predicted.peaks.values())
    chosen = planned(memory, Options(**FREE))
    if chosen is not None:
        assert max(chosen.predicted.peaks.values()) <= memory
        return
    for one in possible(2, 16, **FREE):  # 16: it would have tried no more microbatches than 8
        fixed = Options(one.microbatches, one.schedule, one.stages, None, one.split_backward, False, one.replicas)
        assert planned(memory, fixed) is None, one


def test_fewer_microbatches_in_flight_where_memory_is_short():
    fixed = Options(8, "1f1b", remat="none")
    free = planned(1e9, fixed)
    assert free is not None and free.predicted.in_flight()[0] == 2
    peak = max(free.predicted.peaks.values())
    fewer = planned(0.97 * peak, fixed)
    assert fewer is not None and fewer.tried[0].choice.in_flight == 1
    assert fewer.predicted.in_flight()[0] == 1 and max(fewer.predicted.peaks.values()) <= 0.97 * peak
    assert fewer.predicted.makespan > free.predicted.makespan
