"""Updates on workers are torch's, and state goes to and fro in torch's own format."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import adamw, assert_equal_numbers, eagerly, mlp, points, stepwise

import daggc
from daggc.errors import RunError
from daggc.runtime.optimizers import Counts, read_groups


def classify(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
VARIANTS = [
    (SGD, {"lr": 0.1, "weight_decay": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    (ADAM, {"lr": 0.01, "weight_decay": 0.1}),
    (ADAM, {"lr": torch.tensor(0.01, dtype=torch.float64), "betas": (0.8, 0.95), "amsgrad": True}),
    (ADAMW, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    (ADAMW, {"lr": 0.01, "eps": 1e-4, "foreach": True}),
]


@pytest.mark.parametrize(("cls", "options"), VARIANTS, ids=str)
def test_steps_then_eager_steps_then_steps(cls, options):
    """Through sync and load_from_model, the state of either side is the other's."""
    model, batches = mlp(), points([7] * 6)

    def make(model):
        # A group that differs, and a schedule on top.
        first, *rest = model.parameters()
        own = copy.deepcopy(options)  # a scheduler writes to a rate that is a tensor
        return cls([{"params": rest}, {"params": [first], "lr": own["lr"] * 0.5}], **own)

    def rates(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)

    wanted = eagerly(model, classify, make, batches, clip=0.5, scheduler=rates)
    got = eagerly(model, classify, make, [])
    scheduler = rates(got.optimizer)
    step = daggc.compile(got.model).train_step(F.cross_entropy, got.optimizer, microbatches=3, max_grad_norm=0.5)
    for index, (x, y) in enumerate(batches):
        if index in (2, 3):
            got.optimizer.zero_grad()
            loss = classify(got.model, x, y)
            loss.backward()
            got.norms.append(float(nn.utils.clip_grad_norm_(got.model.parameters(), 0.5)))
            got.optimizer.step()
            got.losses.append(loss.item())
        else:
            loss = step(x, y)
            got.losses.append(float(loss))
            got.norms.append(loss.grad_norm)
        scheduler.step()
        if index == 1:
            step.sync()
        if index == 3:
            step.load_from_model()
    step.sync()
    assert_equal_numbers(got, wanted)


def test_sync_copies_from_workers(two_workers):
    """What the user then does to the model and optimizer does not reach the state of the training, until asked to."""
    model, batches = mlp(), points([4] * 3)
    wanted = eagerly(model, classify, adamw, batches)
    got = eagerly(model, classify, adamw, [])
    step = daggc.compile(got.model, client=two_workers).train_step(F.cross_entropy, got.optimizer)
    for batch in batches:
        got.losses.append(float(step(*batch)))
        step.sync()
        before = copy.deepcopy(got.optimizer.state_dict())
        state = got.optimizer.state[got.model[0].weight]
        assert torch.equal(before["state"][0]["exp_avg"], state["exp_avg"])
        if batch is not batches[-1]:
            for tensor in (got.model[0].weight.data, state["exp_avg"]):
                tensor.fill_(float("nan"))
    assert_equal_numbers(got, wanted)
    step.close()


def test_a_state_dict_has_the_models_own_keys():
    model = mlp()
    compiled = daggc.compile(model)
    (x, y), *_ = points([4])
    optimizer = adamw(model)
    twin = eagerly(model, classify, adamw, [(x, y)])
    step = compiled.train_step(F.cross_entropy, optimizer)
    step(x, y)
    step.sync()
    assert list(compiled.state_dict()) == list(model.state_dict()) == list(twin.model.state_dict())
    mine, theirs = optimizer.state_dict(), twin.optimizer.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert {k: set(v) for k, v in mine["state"].items()} == {k: set(v) for k, v in theirs["state"].items()}


def test_an_optimizer_with_a_past_is_continued():
    model, batches = mlp(), points([4] * 4)
    wanted = eagerly(model, classify, adamw, batches)
    got = eagerly(model, classify, adamw, batches[:2])
    step = daggc.compile(got.model).train_step(F.cross_entropy, got.optimizer)
    got.losses += [float(step(*batch)) for batch in batches[2:]]
    step.sync()
    assert_equal_numbers(got, wanted)


def test_changed_options_of_a_group_take_effect():
    model, batches = mlp(), points([4] * 2)
    got, wanted = (eagerly(model, classify, adamw, []) for _ in range(2))
    step = daggc.compile(got.model).train_step(F.cross_entropy, got.optimizer)
    for x, y in batches:
        wanted.optimizer.zero_grad()
        loss = classify(wanted.model, x, y)
        loss.backward()
        wanted.optimizer.step()
        wanted.losses.append(loss.item())
        got.losses.append(float(step(x, y)))
        for run in (got, wanted):
            run.optimizer.param_groups[0].update(weight_decay=0.5, betas=(0.5, 0.9))
    step.sync()
    assert_equal_numbers(got, wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: torch.optim.RMSprop(model.parameters()), "SGD, Adam and AdamW.* got RMSprop.*optimizer.step"),
        (lambda model: torch.optim.SGD(mlp().parameters()), r"shape \(16, 8\) that is not the model's"),
        (lambda model: torch.optim.SGD(model.parameters(), differentiable=True), "differentiable=True"),
        (lambda model: hooked(torch.optim.SGD(model.parameters())), "step hooks"),
    ],
)
def test_optimizers_that_are_refused(make, message):
    model = mlp()
    with pytest.raises(RunError, match=message):
        daggc.compile(model).train_step(F.cross_entropy, make(model))


def hooked(optimizer):
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


@pytest.mark.parametrize("option", [{"microbatches": 0}, {"max_grad_norm": 0.0}, {"max_grad_norm": -1.0}], ids=str)
def test_options_that_make_no_sense(option):
    model = mlp()
    with pytest.raises(RunError, match=next(iter(option))):
        daggc.compile(model).train_step(F.cross_entropy, adamw(model), **option)


def test_the_norm_is_there_only_with_clipping():
    model, (batch,) = mlp(), points([4])
    loss = daggc.compile(model).train_step(F.cross_entropy, adamw(model))(*batch)
    with pytest.raises(RunError, match="max_grad_norm"):
        loss.grad_norm  # noqa: B018  # reading it is what raises


def test_an_infinite_threshold_only_measures():
    model, batches = mlp(), points([6])
    got, _ = stepwise(model, F.cross_entropy, adamw, batches, microbatches=2, max_grad_norm=float("inf"))
    assert_equal_numbers(got, eagerly(model, classify, adamw, batches, clip=float("inf")))


def test_groups_are_by_canonical_names_of_tied_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    (group,) = read_groups(torch.optim.SGD(model.parameters()), model)
    assert group.names == ("0.weight", "0.bias", "1.bias")


def test_counts_take_back_steps_that_failed():
    counts = Counts(3, {"a": 3, "b": 3})
    for version in (3, 4, 5):
        counts.add(version, frozenset("ab"))
    counts.add(6, frozenset("a"))
    assert counts.at(7) == {"a": 7, "b": 6}
    with pytest.raises(RunError, match="'b' was updated 6 times, 'a' 7 times"):
        counts.common(7, ["a", "b"])
    counts.add(5, frozenset("ab"))  # the steps from 5 on failed
    assert counts.at(6) == {"a": 6, "b": 6} and counts.common(6, ["a", "b"]) == 6
