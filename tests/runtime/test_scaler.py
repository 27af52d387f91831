"""A training step with a GradScaler is eager's with one: scale, skipped steps, unscaled and clipped gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from precision import (
    F16,
    GPT,
    assert_equal_training,
    bert,
    classified,
    distance,
    eager_groups,
    next_word,
    sentences,
    sgd,
    step_groups,
)
from training import adamw, assert_same_bits, eagerly, mlp, points

import daggc
from daggc.errors import RunError


def scaler(scale: float = 2.0**18, interval: int = 2) -> torch.amp.GradScaler:
    """By default one of which some of the first steps overflow, in these models."""
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)


def alone(batches):
    return [[batch] for batch in batches]


WHERE = {
    "here": {},
    "pipeline": {"microbatches": 2},
    "replicas": {"microbatches": 2, "replicas": 2},
    "one worker": {"stages": 1},
    "recomputing": {"microbatches": 2, "remat": "full"},
    "zero bubble": {"microbatches": 2, "schedule": "zb-h1"},
    "graph of tasks": {"microbatches": 2, "execution": "graph"},
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_f16_with_adamw_from_too_large_a_scale(two_workers, where, clip):
    """Overflows first, then the scale grows again; the optimizer counts its steps without those skipped."""
    model, groups = mlp(torch.float32), alone(points([8] * 6, torch.float32))
    theirs, own = scaler(), scaler()
    parts = WHERE[where].get("microbatches", 1)
    options = {"autocast": F16, "clip": clip, "scheduler": cosine}
    wanted = eager_groups(model, F.cross_entropy, adamw, groups, scaler=theirs, parts=parts, **options)
    client = None if where == "here" else two_workers
    got, step = step_groups(model, F.cross_entropy, adamw, groups, client=client, scaler=own, **options, **WHERE[where])
    assert sum(wanted.skipped) == 2
    assert_equal_training(got, wanted, tolerance=1e-5)
    assert own.state_dict() == theirs.state_dict()
    assert step.steps == 6
    step.close()


@pytest.mark.parametrize("where", ["here", "pipeline", "replicas"])
def test_gpt_in_f16_with_accumulation(two_workers, where):
    model, batches = GPT(), sentences([6, 4] * 4)
    groups = [batches[at : at + 2] for at in range(0, 8, 2)]
    theirs, own = scaler(2.0**20), scaler(2.0**20)
    options = {"autocast": F16, "clip": 10.0}
    parts = WHERE[where].get("microbatches", 1)
    wanted = eager_groups(model, next_word, sgd, groups, scaler=theirs, parts=parts, **options)
    client = None if where == "here" else two_workers
    got, step = step_groups(model, next_word, sgd, groups, client=client, scaler=own, **options, **WHERE[where])
    assert 0 < sum(wanted.skipped) < 4
    assert_equal_training(got, wanted, tolerance=2e-3)  # f16 rounds to 1e-3
    assert own.state_dict() == theirs.state_dict()
    step.close()


def test_bert_in_f16_is_as_near_to_more_digits_as_eager_is(two_workers):
    model, groups = bert(), alone(classified([8] * 4))
    theirs, own = scaler(2.0**14), scaler(2.0**14)
    exact = eager_groups(copy.deepcopy(model).double(), None, sgd, groups)
    wanted = eager_groups(model, None, sgd, groups, parts=2, autocast=F16, scaler=theirs)
    got, step = step_groups(model, None, sgd, groups, client=two_workers, autocast=F16, scaler=own, microbatches=2)
    assert got.skipped == wanted.skipped == [False] * 4
    assert distance(got.model, exact.model) < 1.25 * distance(wanted.model, exact.model)
    assert own.get_scale() == theirs.get_scale() == 2.0**16
    step.close()


@pytest.mark.parametrize("client", [False, True], ids=["here", "on workers"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_step_without_an_end_changes_nothing_but_the_scale(two_workers, client, wrong):
    """Parameters, momentum and counts are those from before it, to the bit, and training goes on."""
    model, ((x, y), *rest) = mlp(torch.float32), points([8] * 3, torch.float32)
    run, own = eagerly(model, classify, adamw, []), scaler(1024.0)
    step = daggc.compile(run.model, client=two_workers if client else None).train_step(
        F.cross_entropy, run.optimizer, microbatches=2, scaler=own
    )
    first = step(x, y)
    step.sync()
    before, state = copy.deepcopy(run.model), copy.deepcopy(run.optimizer.state_dict()["state"])
    broken = x.clone()
    broken[-1] = wrong
    second = step(broken, y)
    step.sync()
    assert not first.skipped and second.skipped
    assert_same_bits(run.model, before)
    torch.testing.assert_close(run.optimizer.state_dict()["state"], state, rtol=0, atol=0)
    assert own.get_scale() == 512.0 and step.steps == 2
    losses = [first, *(step(*batch) for batch in rest)]
    step.sync()
    wanted = eagerly(model, classify, adamw, [(x, y), *rest])
    run.losses = [float(loss) for loss in losses]
    for mine, theirs in zip(run.model.parameters(), wanted.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert {int(one["step"]) for one in run.optimizer.state.values()} == {3}
    step.close()


def classify(model, x, y):
    return F.cross_entropy(model(x), y)


@pytest.mark.parametrize("client", [False, True], ids=["here", "on workers"])
def test_a_resumed_training_has_the_same_bits(two_workers, client, tmp_path):
    """With its scale, how long that has lasted, and the count of steps without those skipped."""
    model, groups = mlp(torch.float32), alone(points([8] * 6, torch.float32))
    whole = scaler(interval=3)
    options = {"autocast": F16, "microbatches": 2, "client": two_workers if client else None}
    wanted, step = step_groups(model, F.cross_entropy, adamw, groups, scaler=whole, **options)
    step.close()
    _, step = step_groups(model, F.cross_entropy, adamw, groups[:4], scaler=scaler(interval=3), **options)
    assert any(wanted.skipped[:4])
    step.save(tmp_path / "c.safetensors")
    step.close()
    run, own = eagerly(model, classify, adamw, []), scaler(1.0, 3)
    step = daggc.compile(run.model, client=options["client"]).train_step(
        F.cross_entropy, run.optimizer, microbatches=2, scaler=own
    )
    step.load(tmp_path / "c.safetensors")
    assert own.get_scale() > 1.0 and own.get_growth_interval() == 3
    with F16:
        losses = [float(step(*batch)) for (batch,) in groups[4:]]
    step.sync()
    assert losses == wanted.losses[4:]
    assert_same_bits(run.model, wanted.model)
    assert own.state_dict() == whole.state_dict()
    step.close()
    plain = daggc.compile(run.model).train_step(F.cross_entropy, run.optimizer)
    with pytest.raises(RunError, match="'state:growth' is in it alone"):
        plain.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize("client", [False, True], ids=["here", "on workers"])
def test_steps_skipped_before_a_layer_is_frozen(two_workers, client):
    """The state is put there anew, and what was skipped before is not counted again."""
    model, batches = mlp(torch.float32), points([8] * 6, torch.float32)
    theirs, own = scaler(), scaler()
    wanted, run = eagerly(model, classify, adamw, []), eagerly(model, classify, adamw, [])
    step = daggc.compile(run.model, client=two_workers if client else None).train_step(
        F.cross_entropy, run.optimizer, scaler=own
    )
    for index, (x, y) in enumerate(batches):
        for trained in (wanted, run):
            trained.model[0].requires_grad_(index < 3)
        wanted.optimizer.zero_grad()
        with F16:
            loss = F.cross_entropy(wanted.model(x), y)
            step(x, y)
        theirs.scale(loss).backward()
        theirs.step(wanted.optimizer)
        theirs.update()
    step.sync()
    assert own.state_dict() == theirs.state_dict()
    for mine, its in zip(run.model.parameters(), wanted.model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-7)
        assert run.optimizer.state[mine]["step"] == wanted.optimizer.state[its]["step"]
    step.close()


def test_a_scale_that_the_user_sets_is_taken_by_the_next_step(two_workers):
    model, (x, y) = mlp(torch.float32), points([8], torch.float32)[0]
    for client in (None, two_workers):
        run, own = eagerly(model, classify, adamw, []), scaler(8.0, 100)
        step = daggc.compile(run.model, client=client).train_step(F.cross_entropy, run.optimizer, scaler=own)
        step(x, y)
        step.sync()
        own.load_state_dict({**own.state_dict(), "scale": 32.0})
        if client is not None:
            step.load_from_model()
        broken = step(x * float("inf"), y)
        step.sync()
        assert broken.skipped and own.get_scale() == 16.0
        step.close()


def test_a_disabled_scaler_changes_nothing():
    model, (batch, *_) = mlp(torch.float32), points([8], torch.float32)
    texts = []
    for own in (None, torch.amp.GradScaler("cpu", enabled=False)):
        step = daggc.compile(model).train_step(F.cross_entropy, sgd(model), scaler=own)
        texts.append(daggc.to_text(step.plan_for(*batch).step.program))
    assert texts[0] == texts[1]
    assert not step(*batch).skipped


def test_what_cannot_be_scaled_is_refused():
    model = mlp(torch.float16)
    with pytest.raises(RunError, match=r"'0\.weight' is of float16"):
        daggc.compile(model).train_step(F.cross_entropy, sgd(model), scaler=scaler())
    with pytest.raises(RunError, match="GradScaler, got a float"):
        daggc.compile(model).train_step(F.cross_entropy, sgd(model), scaler=1024.0)
