"""Models whose Python decides on the data of a tensor: captured along a branch, and held to it at each run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import daggc
from daggc.errors import BranchError, DataDependentError


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(4, 3), nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if labels.max() >= 10:
            raise ValueError("labels are below 10")
        self.calls += 1
        layer = self.low if x.sum() > 0 else self.high
        return layer(x) * int(labels.max())


def equal_to_eager(model: nn.Module, *inputs: torch.Tensor, compiled: nn.Module | None = None) -> nn.Module:
    compiled = daggc.compile(model) if compiled is None else compiled
    for one in (model, compiled):
        model.zero_grad()
        one_result = one(*inputs)
        one_result.sum().backward()
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        if one is model:
            wanted = (one_result, gradients)
    torch.testing.assert_close(one_result, wanted[0])
    for mine, theirs in zip(gradients, wanted[1], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs)
    return compiled


def test_each_branch_equals_eager_and_is_captured_once():
    torch.manual_seed(0)
    model = Branches()
    x, labels = torch.rand(3, 4), torch.tensor([1, 2, 3])
    compiled = equal_to_eager(model, x, labels)
    for inputs in ((-x, labels), (x, labels), (-x, labels), (x, labels + 1)):
        equal_to_eager(model, *inputs, compiled=compiled)
    (entry,) = compiled._entries.values()
    assert len(entry.branches) == 3
    assert model.calls == 10  # five comparisons: a run along the wrong branch changes no buffer


def test_an_error_that_eager_raises_is_raised():
    model = Branches()
    compiled = daggc.compile(model)
    x = torch.rand(3, 4)
    compiled(x, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="labels are below 10"):
        compiled(x, torch.tensor([1, 2, 13]))


def test_the_program_checks_and_names_the_line():
    program = daggc.trace(Branches(), (torch.ones(3, 4), torch.tensor([1, 2, 3])))
    checks = [node for node in program.forward.nodes if node.op == "check"]
    assert [node.attrs["expected"] for node in checks] == [(0,), (1,), (3,)]
    assert all("test_branches.py:" in node.source for node in checks)
    assert daggc.parse(daggc.to_text(program)) == program
    model = Branches()
    weights = daggc.weights_of(model, daggc.capture(model, (torch.ones(3, 4), torch.tensor([1, 2, 3]))))
    inputs = {ref: tensor.detach().numpy() for ref, tensor in weights.items()}
    inputs |= {"input:0": -torch.ones(3, 4).numpy(), "input:1": torch.tensor([1, 2, 3]).numpy()}
    with pytest.raises(BranchError, match=r"captured again.*test_branches\.py"):
        daggc.interpret(program, inputs)


class Shapes(nn.Module):
    """Results whose shapes hang on data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        chosen = x[labels > 1]
        selected = torch.masked_select(x, x.detach() > 0.1)
        places = torch.nonzero(labels)
        repeated = torch.repeat_interleave(x, labels, dim=0)
        hot = F.one_hot(labels).to(x.dtype)
        counts = torch.bincount(labels, weights=x[:, 0].detach())
        return chosen.sum() + selected.sum() + places.sum() + repeated.sum() + hot.sum() * x.mean() + counts.sum()


def test_shapes_that_hang_on_data():
    torch.manual_seed(0)
    model = Shapes()
    compiled = equal_to_eager(model, torch.randn(3, 4), torch.tensor([1, 2, 3]))
    equal_to_eager(model, torch.randn(3, 4), torch.tensor([2, 2, 0]), compiled=compiled)
    equal_to_eager(model, torch.randn(3, 4), torch.tensor([1, 2, 3]), compiled=compiled)


def test_a_float_of_the_data_is_refused():
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.max().item()

    with pytest.raises(DataDependentError, match=r"takes a float out of a tensor.*test_branches\.py"):
        daggc.trace(Model(), (torch.ones(3),))


def test_a_training_step_fails_on_another_branch_and_changes_nothing():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if x.sum() > 0 else -self.layer(x)

    model = Model()
    step = daggc.compile(model).train_step(F.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.rand(3, 4)
    float(step(x, torch.zeros(3, 1)))
    step.sync()
    before = model.layer.weight.detach().clone()
    with pytest.raises(BranchError, match="captured again"):
        float(step(-x, torch.zeros(3, 1)))
    assert torch.equal(model.layer.weight, before)
