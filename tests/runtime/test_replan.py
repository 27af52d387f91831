"""Planning anew from what steps took: the work goes where it is done faster, the numbers stay."""

from __future__ import annotations

import copy

import pytest
import torch
from distributed import Client
from torch import nn

import daggc
from daggc.errors import RunError
from daggc.plan.cost import body_seconds
from daggc.runtime.replan import replanned
from daggc.runtime.step_program import StepProgram
from daggc.runtime.train import TrainStep
from daggc.runtime.worker import Record

pytestmark = pytest.mark.timeout(120)

LAYERS = 9


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(256, 256), nn.Tanh()))).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(64, 256, dtype=torch.float64, generator=generator) for _ in range(2))  # pyright: ignore[reportReturnType]


def train_step(net: nn.Module, client: Client, **options: object) -> TrainStep:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    compiled = daggc.compile(net, client=client)
    return compiled.train_step(nn.functional.mse_loss, optimizer, microbatches=4, **options)  # pyright: ignore[reportArgumentType]


def layers_on(program: StepProgram, device: str) -> int:
    homes = [port.value.type.device for port in program.step.graph.inputs_of("param")]
    return sum(home == device for home in homes) // 2


def as_if(program: StepProgram, slower: dict[str, float]) -> dict[str, list[Record]]:
    """Records of steps in which tasks take what is predicted, times a factor of their device."""
    records: dict[str, list[Record]] = {device: [] for device in slower}
    for turn in range(4):
        for node in program.step.graph.nodes:
            if node.op == "call":
                device = str(node.attrs["device"])
                body = program.step.program[str(node.attrs["callee"])]
                spent = slower[device] * body_seconds(body, program.cluster.device(device))
                task, microbatch = str(node.attrs["task"]), int(node.attrs.get("microbatch", -1))
                records[device].append(Record(task, microbatch, turn, turn + spent))
    return records


def test_a_device_found_slower_gets_less(two_workers: Client) -> None:
    step = train_step(model(), two_workers)
    program = step.plan_for(*batch())
    assert layers_on(program, "cpu:1") >= 4
    found = replanned(step._builder, program, as_if(program, {"cpu:0": 1.0, "cpu:1": 3.0}), steps=10_000_000)
    assert found.program is not None
    assert layers_on(found.program, "cpu:1") <= 3
    assert found.after < found.before
    assert "uses the new plan" in str(found)
    step.close()


def test_what_comes_as_predicted_stays(two_workers: Client) -> None:
    step = train_step(model(), two_workers)
    program = step.plan_for(*batch())
    found = replanned(step._builder, program, as_if(program, {"cpu:0": 1.0, "cpu:1": 1.0}), steps=10_000_000)
    assert found.program is None
    assert "the plan stays" in str(found)
    step.close()


def test_a_plan_is_not_replaced_for_less_than_moving_takes(two_workers: Client) -> None:
    step = train_step(model(), two_workers)
    program = step.plan_for(*batch())
    found = replanned(step._builder, program, as_if(program, {"cpu:0": 1.0, "cpu:1": 3.0}), steps=0)
    assert found.program is None
    assert found.moving > 0
    step.close()


def test_without_records_it_is_refused(two_workers: Client) -> None:
    step = train_step(model(), two_workers)
    with pytest.raises(RunError, match="nothing has run yet"):
        step.replan()
    step(*batch()).item()
    step.records()
    with pytest.raises(RunError, match="run some steps first"):
        step.replan()
    step.close()


def test_numbers_are_those_of_eager_across_a_new_plan(two_workers: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = model()
    net = copy.deepcopy(eager)
    step = train_step(net, two_workers, replan_after=3)
    home = step._home
    real = home.records
    scale = {"cpu:0": 1.0, "cpu:1": 4.0}  # as if the second worker were slow

    def doctored() -> dict[str, list[Record]]:
        found = real()
        assert step.step_program is not None
        return as_if(step.step_program, scale) if any(found.values()) else found

    monkeypatch.setattr(home, "records", doctored)
    optimizer = torch.optim.SGD(eager.parameters(), lr=0.1)
    layouts = []
    for _ in range(6):
        loss = nn.functional.mse_loss(eager(batch()[0]), batch()[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert step(*batch()).item() == pytest.approx(loss.item(), rel=1e-12)
        assert step.step_program is not None
        layouts.append(layers_on(step.step_program, "cpu:1"))
    assert layouts[:3] == [layouts[0]] * 3 and layouts[3] < layouts[0]
    step.sync()
    for own, other in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-14)
    step.close()


def test_a_number_of_steps_is_required(two_workers: Client) -> None:
    with pytest.raises(RunError, match="replan_after"):
        train_step(model(), two_workers, replan_after=0)
