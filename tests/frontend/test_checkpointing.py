"""torch.utils.checkpoint: the same numbers, and nothing of the region kept for the backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

import daggc
from daggc.errors import CaptureError
from daggc.frontend.export import capture
from daggc.passes.vjp import vjp

pytestmark = pytest.mark.timeout(120)


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(4, 16)
        self.down = nn.Linear(16, 4)
        self.drop = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x + self.norm(self.drop(self.down(torch.tanh(self.up(x)) * scale)))


class Model(nn.Module):
    def __init__(self, wrap: bool = True, reentrant: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block(**options) for _ in range(3))
        self.wrap, self.reentrant = wrap, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, 0.5, use_reentrant=self.reentrant) if self.wrap else block(x, 0.5)
        return x.sin()


def x() -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def gradients(call: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor | None]:
    y = call(inputs)
    (y * y).sum().backward()
    return [y, *(p.grad for p in call.parameters()), inputs.grad]


@pytest.mark.parametrize("reentrant", [False, True])
def test_equals_eager_and_keeps_nothing_of_a_region(reentrant: bool) -> None:
    model = Model(reentrant=reentrant)
    compiled = daggc.compile(copy.deepcopy(model))
    for got, wanted in zip(*(gradients(m, x().requires_grad_()) for m in (compiled, model)), strict=True):
        torch.testing.assert_close(got, wanted)
    program = daggc.run_pipeline(capture(model, (x(),)).program, "fold,canonicalize,cse,dce")
    regions = [node for node in program.forward.nodes if node.op == "checkpoint"]
    assert [node.path for node in regions] == ["blocks.0", "blocks.1", "blocks.2"]
    inner = regions[0].attrs["body"].nodes
    assert {node.op for node in inner} >= {"linear", "tanh"}
    assert inner[0].path == "blocks.0.up"
    assert "test_checkpointing.py" in inner[0].source
    kept = vjp(program).forward.outputs_of("residual")
    plain = vjp(daggc.run_pipeline(program, "uncheckpoint")).forward.outputs_of("residual")
    assert all(port.value.type.shape == (6, 4) for port in kept)
    assert len(kept) < len(plain)
    assert any(port.value.type.shape == (6, 16) for port in plain)


def test_dropout_draws_the_same_mask_again() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(lambda x: nn.functional.dropout(x * 2, 0.5).sin(), x, use_reentrant=False)

    inputs = torch.full((40, 4), 0.3).requires_grad_()
    y = daggc.compile(Masked())(inputs)
    (gradient,) = torch.autograd.grad(y.sum(), inputs)
    assert 0 < int((y == 0).sum()) < y.numel()
    assert torch.equal(y == 0, gradient == 0)


def test_a_reentrant_region_without_inputs_that_need_gradients_has_none() -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()
            self.last = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(checkpoint(self.block, x, use_reentrant=True))

    model = Only()
    compiled = daggc.compile(copy.deepcopy(model))
    with pytest.warns(UserWarning, match="None of the inputs"):
        wanted = gradients(model, x())
    for got, expected in zip(gradients(compiled, x()), wanted, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected)


def test_second_derivatives_and_regions_in_regions() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def outer(x: torch.Tensor) -> torch.Tensor:
                return checkpoint(self.block, x, use_reentrant=False).exp()

            return checkpoint(outer, x, use_reentrant=False)

    model = Nested().double()
    inputs = x().double().requires_grad_()
    assert torch.autograd.gradcheck(daggc.compile(model), (inputs,))
    assert torch.autograd.gradgradcheck(daggc.compile(model), (inputs,))


def test_a_buffer_written_inside_is_refused_where_a_backward_may_follow() -> None:
    model = Model(norm=True)
    with pytest.raises(CaptureError, match=r"'blocks.0.norm.running_mean' is written inside torch.utils.checkpoint"):
        daggc.compile(model)(x())
    with torch.no_grad():
        twin = copy.deepcopy(model)
        torch.testing.assert_close(daggc.compile(model)(x()), twin(x()))
        torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.parametrize("microbatches", [1, 3])
def test_training(microbatches: int) -> None:
    models = [Model(), Model(wrap=False)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    step = daggc.compile(models[0]).train_step(nn.functional.mse_loss, optimizers[0], microbatches=microbatches)
    for _ in range(2):
        got = float(step(x(), x()))
        optimizers[1].zero_grad()
        loss = nn.functional.mse_loss(models[1](x()), x())
        loss.backward()
        optimizers[1].step()
        assert got == pytest.approx(loss.item(), rel=1e-5)
    if microbatches > 1:
        assert "3 microbatches" in step.explain() or "exact" in step.explain()


def test_transformers() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable()
    twin = copy.deepcopy(model)
    ids = torch.arange(8)[None]
    compiled = daggc.compile(twin)
    for call in (model, compiled):
        call(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    program = capture(model, (), {"input_ids": ids, "labels": ids, "use_cache": False}).program
    assert sum(node.op == "checkpoint" for node in program.forward.nodes) == 2
