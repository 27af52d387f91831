"""Training in this process: the model and the optimizer are the state, as they are for eager's steps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import Trained, adamw, assert_equal_numbers, assert_same_bits, eagerly, gpt2, mlp, points

import daggc
from daggc.errors import RunError
from daggc.runtime import resident


def classify(model, x, y):
    return F.cross_entropy(model(x), y)


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def plain(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def compiled(model, make, loss_fn=F.cross_entropy, **options):
    run = Trained(copy.deepcopy(model), None)
    run.optimizer = make(run.model)
    return run, daggc.compile(run.model).train_step(loss_fn, run.optimizer, **options)


def eager_step(run, x, y):
    run.optimizer.zero_grad()
    loss = classify(run.model, x, y)
    loss.backward()
    run.optimizer.step()
    run.losses.append(loss.item())


@pytest.mark.parametrize("make", [plain, momentum, adamw])
def test_the_model_is_always_up_to_date_and_eager_may_go_on(make):
    """Steps of both kinds in any order, without a word in between."""
    model, batches = mlp(), points([6] * 6)
    wanted = eagerly(model, classify, make, batches)
    run, step = compiled(model, make)
    places = [parameter.data_ptr() for parameter in run.model.parameters()]
    for number, batch in enumerate(batches):
        if number in (2, 3, 5):
            eager_step(run, *batch)
        else:
            run.losses.append(float(step(*batch)))
    assert_equal_numbers(run, wanted)
    assert step.steps == 3
    assert places == [parameter.data_ptr() for parameter in run.model.parameters()]


def test_a_step_adds_no_copy_of_parameters_or_optimizer_state():
    run, step = compiled(mlp(), adamw)
    for batch in points([6] * 3):
        step(*batch)
    held = step._home.snapshot()
    for name, parameter in run.model.named_parameters():
        assert held[f"param:{name}"].data_ptr() == parameter.data_ptr()
        assert held[f"state:exp_avg:{name}"].data_ptr() == run.optimizer.state[parameter]["exp_avg"].data_ptr()


def test_what_the_caller_changes_between_steps_is_seen():
    model, batches = mlp(), points([6] * 7)
    (run, step), wanted = compiled(model, adamw), Trained(copy.deepcopy(model), None)
    wanted.optimizer = adamw(wanted.model)
    saved = {}

    def in_place(one):
        with torch.no_grad():
            one.model[0].weight.mul_(0.5)

    def other_memory(one):
        one.model[0].weight.data = one.model[0].weight.detach() * 2

    def other_layout(one):
        square = one.model[2].weight
        square.data = square.data.t()

    def keep(one):
        saved[id(one)] = copy.deepcopy((one.model.state_dict(), one.optimizer.state_dict()))

    def take_back(one):
        weights, state = saved[id(one)]
        one.model.load_state_dict(weights)
        one.optimizer.load_state_dict(state)

    for batch, change in zip(batches, (None, in_place, other_memory, other_layout, keep, take_back, None), strict=True):
        for one in (run, wanted):
            if change is not None:
                change(one)
        run.losses.append(float(step(*batch)))
        eager_step(wanted, *batch)
    assert_equal_numbers(run, wanted)


def test_a_model_of_another_type_is_told():
    run, step = compiled(mlp(), adamw)
    (batch,) = points([6])
    step(*batch)
    run.model.float()
    with pytest.raises(RunError, match=r"'param:0.weight' of type f64\[16,8\], now it is f32\[16,8\]"):
        step(*batch)


def test_tied_parameters_are_one():
    model = gpt2()
    run, step = compiled(model, adamw, None)
    head, table = run.model.get_parameter("lm_head.weight"), run.model.get_parameter("transformer.wte.weight")
    ids, before = torch.randint(0, 64, (4, 8)), head.detach().clone()
    step({"input_ids": ids, "labels": ids})
    assert head is table is run.model.get_parameter("lm_head.weight")
    assert not torch.equal(head, before)


class Views(nn.Module):
    """Two parameters in one memory, as flattened models have them: side by side, or the one inside the other."""

    def __init__(self, overlap: int) -> None:
        super().__init__()
        flat = torch.linspace(-1, 1, 64, dtype=torch.float64)
        self.first = nn.Parameter(flat[:32].view(8, 4))
        self.second = nn.Parameter(flat[32 - overlap : 64 - overlap].view(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.first + (x * x) @ self.second


@pytest.mark.parametrize("overlap", [0, 8])
@pytest.mark.parametrize("make", [plain, momentum, adamw])
def test_parameters_in_one_memory(overlap, make):
    batches = points([6] * 3)
    wanted, run = Trained(Views(overlap), None), Trained(Views(overlap), None)
    wanted.optimizer, run.optimizer = make(wanted.model), make(run.model)
    step = daggc.compile(run.model).train_step(F.cross_entropy, run.optimizer)
    for batch in batches:
        eager_step(wanted, *batch)
        run.losses.append(float(step(*batch)))
    assert_equal_numbers(run, wanted)


class Products(nn.Module):
    """A gradient that is another parameter, and buffers that get each other's memory."""

    a: torch.Tensor
    b: torch.Tensor
    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.v = nn.Parameter(torch.tensor([3.0, 5.0]))
        self.register_buffer("a", torch.tensor([1.0, 2.0]))
        self.register_buffer("b", torch.tensor([3.0, 4.0]))
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.a.clone(), self.b.clone()
        self.a.copy_(b)
        self.b.copy_(a)
        self.seen.copy_(self.u)
        return (self.u * self.v).sum() + 0 * x.sum()


def test_what_lies_in_the_memory_of_a_parameter_is_read_before_it_changes():
    wanted, run = Trained(Products(), None), Trained(Products(), None)
    wanted.optimizer, run.optimizer = plain(wanted.model), plain(run.model)
    step = daggc.compile(run.model).train_step(None, run.optimizer)
    x = torch.ones(2)
    for _ in range(3):
        wanted.optimizer.zero_grad()
        loss = wanted.model(x)
        loss.backward()
        wanted.optimizer.step()
        wanted.losses.append(loss.item())
        run.losses.append(float(step(x)))
    assert_same_bits(run.model, wanted.model)
    assert run.losses == wanted.losses


@daggc.opaque(out=lambda x: torch.empty_like(x))
def brittle(x: torch.Tensor) -> torch.Tensor:
    if (x > 1000).any():
        raise ValueError("too large")
    return x.clone()


class Brittle(nn.Module):
    """Fails after batch norm has computed new statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x)) + brittle(x)[:, :4]


def test_a_step_that_fails_before_its_updates_changes_nothing():
    run, step = compiled(Brittle().double(), adamw)
    good, bad = points([6] * 2)
    step(*good)
    before = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    bad[0][0, 0] = 1001.0
    with pytest.raises(RunError, match="too large"):
        step(*bad)
    after = run.model.state_dict(), run.optimizer.state_dict()
    assert all(torch.equal(x, y) for x, y in zip(before[0].values(), after[0].values(), strict=True))
    torch.testing.assert_close(after[1]["state"], before[1]["state"], rtol=0, atol=0)
    assert step.steps == 1
    float(step(*good))


def test_a_first_step_that_fails_leaves_the_optimizer_without_state():
    run, step = compiled(Brittle().double(), adamw)
    (bad,) = points([6])
    bad[0][0, 0] = 1001.0
    with pytest.raises(RunError, match="too large"):
        step(*bad)
    assert not run.optimizer.state


def test_a_step_that_fails_in_its_updates_is_told_and_a_checkpoint_helps(monkeypatch, tmp_path):
    model, batches = mlp(), points([6] * 3)
    wanted = eagerly(model, classify, adamw, batches)
    run, step = compiled(model, adamw)
    run.losses.append(float(step(*batches[0])))
    step.save(path := tmp_path / "c")
    plain_calls = resident.run_calls

    def torn(program, nodes, *rest):
        plain_calls(program, nodes, *rest)
        if nodes and nodes[0].attrs["phase"] == "update":
            raise MemoryError("no memory for the last bit")

    monkeypatch.setattr(resident, "run_calls", torn)
    with pytest.raises(MemoryError):
        step(*batches[1])
    monkeypatch.setattr(resident, "run_calls", plain_calls)
    for use in (lambda: step(*batches[1]), step.sync, lambda: step.save(tmp_path / "d")):
        with pytest.raises(RunError, match=r"between two steps; load a checkpoint .*no memory for the last bit"):
            use()
    step.load(path)
    run.losses += [float(step(*batch)) for batch in batches[1:]]
    assert_equal_numbers(run, wanted)


def test_closing_leaves_all_in_the_model_and_optimizer():
    model, batches = mlp(), points([6] * 4)
    wanted = eagerly(model, classify, adamw, batches)
    run, step = compiled(model, adamw)
    run.losses += [float(step(*batch)) for batch in batches[:2]]
    step.close()
    run.losses += [float(step(*batch)) for batch in batches[2:]]
    assert_equal_numbers(run, wanted)
    assert step.steps == 4


def test_a_graph_of_the_users_sees_that_its_parameters_were_written_to():
    run, step = compiled(mlp(), plain)
    x, y = points([6])[0]
    loss = classify(run.model, x, y)
    step(x, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
