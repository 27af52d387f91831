"""bf16 in a training step: autocast around the step or inside the model, and models in bf16, as eager has them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from precision import (
    BF16,
    GPT,
    assert_equal_training,
    bert,
    classified,
    continued,
    convolutions,
    distance,
    eager_groups,
    images,
    llama,
    next_word,
    sentences,
    sgd,
    step_groups,
)
from torch import nn
from training import adamw, assert_same_bits, mlp, points

import daggc
from daggc.plan.bodies import Group
from daggc.plan.device import cluster_of, cpu_device
from daggc.runtime.batch import call_with_loss, read_batch
from daggc.runtime.resident import WorkerHome
from daggc.runtime.step_program import Options, StepBuilder

SIZES = [8, 8, 8]
CASES = {
    "mlp": (lambda: mlp(torch.float32), F.cross_entropy, lambda: points(SIZES, torch.float32)),
    "gpt": (GPT, next_word, lambda: sentences(SIZES)),
}
WHERE = {
    "pipeline": {"microbatches": 2},
    "replicas": {"microbatches": 2, "replicas": 2},
    "one worker": {"microbatches": 2, "stages": 1},
    "recomputing": {"microbatches": 2, "remat": "full"},
}


def alone(batches):
    return [[batch] for batch in batches]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", CASES)
def test_autocast_around_a_step_on_workers(two_workers, name, where):
    make, loss_fn, batches = CASES[name]
    model, groups = make(), alone(batches())
    wanted = eager_groups(model, loss_fn, adamw, groups, parts=2, autocast=BF16)
    got, step = step_groups(model, loss_fn, adamw, groups, client=two_workers, autocast=BF16, **WHERE[where])
    assert_equal_training(got, wanted, tolerance=1e-5)
    graph = step.step_program.step.graph
    assert {port.value.type.dtype for port in graph.inputs_of("param", "state")} == {"f32"}
    gradients = [value for node in graph.nodes if node.attrs.get("phase") == "update" for value in node.inputs]
    assert {value.type.dtype for value in gradients if value.type.rank} == {"f32"}
    step.close()


def test_autocast_in_this_process():
    model, groups = GPT(), alone(sentences(SIZES))
    got, _ = step_groups(model, next_word, adamw, groups, autocast=BF16)
    assert_equal_training(got, eager_groups(model, next_word, adamw, groups, autocast=BF16), tolerance=1e-5)


def test_activations_travel_in_bf16(two_workers):
    model, groups = mlp(torch.float32), alone(points([8], torch.float32))
    _, step = step_groups(model, F.cross_entropy, sgd, groups, client=two_workers, autocast=BF16, microbatches=2)
    graph = step.step_program.step.graph
    made = {value.name for node in graph.nodes if node.op == "call" for value in node.outputs}
    moved = [n.output.type for n in graph.nodes if n.op == "transfer" and n.inputs[0].name in made]
    assert {type_.dtype for type_ in moved if type_.rank} == {"bf16"}
    step.close()


def test_batch_norm_under_autocast(two_workers):
    """The batch stays whole; two batches of one step follow each other through the stages, statistics with them."""
    model, batches = convolutions(), images([6, 6, 6, 6])
    groups = [batches[:2], batches[2:]]
    wanted = eager_groups(model, F.cross_entropy, sgd, groups, autocast=BF16)
    got, step = step_groups(model, F.cross_entropy, sgd, groups, client=two_workers, autocast=BF16, microbatches=2)
    assert_equal_training(got, wanted, tolerance=1e-5)
    assert len(step.plan.stages) == 2 and step.step_program.sizes == (6, 6)
    assert int(got.model[1].num_batches_tracked) == 4
    step.close()


@pytest.mark.parametrize(("make", "batches"), [(bert, classified), (llama, continued)], ids=["bert", "llama"])
@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "in bf16"])
def test_transformers_are_as_near_to_more_digits_as_eager_is(two_workers, make, batches, whole):
    model, groups = make(), alone(batches(SIZES))
    exact = eager_groups(copy.deepcopy(model).double(), None, sgd, groups)
    cast = None if whole else BF16
    model = model.bfloat16() if whole else model
    theirs = eager_groups(model, None, sgd, groups, parts=2, autocast=cast)
    got, step = step_groups(model, None, sgd, groups, client=two_workers, autocast=cast, microbatches=2)
    error, own = distance(theirs.model, exact.model), distance(got.model, exact.model)
    assert 0 < own < 1.25 * error
    assert {p.dtype for p in got.model.parameters()} == {torch.bfloat16 if whole else torch.float32}
    step.close()


@pytest.mark.parametrize("client", [False, True], ids=["here", "on workers"])
def test_a_model_in_bf16_with_adamw(two_workers, client):
    """Parameters and state in bf16, as torch has them; to the bit, for this model's gradients are eager's."""
    model, groups = mlp(torch.bfloat16), alone(points(SIZES, torch.bfloat16))
    wanted = eager_groups(model, F.cross_entropy, adamw, groups, parts=2)
    got, step = step_groups(
        model, F.cross_entropy, adamw, groups, client=two_workers if client else None, microbatches=2
    )
    assert_same_bits(got.model, wanted.model)
    torch.testing.assert_close(got.losses, wanted.losses, rtol=2e-2, atol=0)
    state = got.optimizer.state[got.model[0].weight]
    assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    step.close()


class Inside(nn.Module):
    """Autocast in part of forward, and taken back in part of that."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.middle, self.leave = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.enter(x).relu()
            with torch.autocast("cpu", enabled=False):
                x = self.middle(x.float()).tanh()
            x = self.leave(x)
        return x.float()


def test_autocast_inside_forward(two_workers):
    model, groups = Inside(), alone(points(SIZES, torch.float32))
    wanted = eager_groups(model, F.cross_entropy, adamw, groups, parts=2)
    got, step = step_groups(model, F.cross_entropy, adamw, groups, client=two_workers, microbatches=2)
    assert_equal_training(got, wanted, tolerance=1e-5)
    step.close()


def test_autocast_may_be_left_from_step_to_step(two_workers, monkeypatch):
    """Another program; the state stays where it is."""
    loads = []
    load = WorkerHome.load
    monkeypatch.setattr(WorkerHome, "load", lambda *args: (loads.append(1), load(*args)))
    model, batches = mlp(torch.float32), points([8] * 4, torch.float32)
    wanted, got = copy.deepcopy(model), copy.deepcopy(model)
    optimizer, own = adamw(wanted), adamw(got)
    step = daggc.compile(got, client=two_workers).train_step(F.cross_entropy, own)
    for index, (x, y) in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=index % 2 == 0):
            loss = F.cross_entropy(wanted(x), y)
            step(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    step.sync()
    for mine, theirs in zip(got.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert len(loads) == 1
    step.close()


def test_a_step_is_planned_anew_under_its_own_autocast():
    """Whatever is on where somebody asks for it."""
    model, (batch, *_) = mlp(torch.float32), points([8], torch.float32)
    devices = cluster_of([cpu_device(0), cpu_device(1)])
    builder = StepBuilder(model, call_with_loss(F.cross_entropy), devices, Options(2))
    groups = [Group("0", tuple(name for name, _ in model.named_parameters()), "adamw", {})]
    with BF16:
        made = builder.build([read_batch(batch, {})], groups, False)
    again = builder.again(devices)
    assert daggc.to_text(again.step.program) == daggc.to_text(made.step.program)
    with torch.autocast("cpu", torch.float16):
        assert daggc.to_text(builder.again(devices).step.program) == daggc.to_text(made.step.program)
