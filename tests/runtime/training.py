"""Training steps beside eager PyTorch's on the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import daggc
from daggc.runtime.train import TrainStep

Batches = Sequence[tuple[Any, ...]]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, as is usual: vectors have no weight decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=3e-3)


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 4)]
    return nn.Sequential(*layers).to(dtype)


def points(sizes: Iterable[int], dtype: torch.dtype = torch.float64, classes: int = 4) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 8, generator=generator, dtype=dtype), torch.randint(0, classes, (n,), generator=generator))
        for n in sizes
    ]


def gpt2(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=32, attn_pdrop=dropout, resid_pdrop=dropout,
        embd_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype)


class Words(nn.Module):
    """A causal language model of transformers' that gives its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).logits


def words(sizes: Iterable[int], length: int = 8) -> Batches:
    """Token ids and targets of which some are -1, to be ignored."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(0, 64, (n, length), generator=generator),
            torch.randint(-1, 64, (n, length), generator=generator),
        )
        for n in sizes
    ]


def words_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-1)


@dataclass
class Trained:
    """A model after some steps."""

    model: nn.Module
    optimizer: Any
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def eagerly(
    model: nn.Module,
    loss_of: Callable[..., torch.Tensor],
    make: MakeOptimizer,
    batches: Batches,
    clip: float | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> Trained:
    """Train a copy of a model; ``loss_of(model, *batch)``."""
    model = copy.deepcopy(model)
    run = Trained(model, make(model))
    rates = scheduler(run.optimizer) if scheduler else None
    for batch in batches:
        run.optimizer.zero_grad()
        loss = loss_of(model, *batch)
        loss.backward()
        if clip is not None:
            run.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        run.optimizer.step()
        if rates is not None:
            rates.step()
        run.losses.append(loss.item())
    return run


def stepwise(
    model: nn.Module,
    loss_fn: Callable[..., torch.Tensor] | None,
    make: MakeOptimizer,
    batches: Batches,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    client: Any = None,
    **options: Any,
) -> tuple[Trained, TrainStep]:
    """Train a copy of a model by a train step, in this process if there is no client; synced at the end."""
    model = copy.deepcopy(model)
    run = Trained(model, make(model))
    rates = scheduler(run.optimizer) if scheduler else None
    step = daggc.compile(model, client=client).train_step(loss_fn, run.optimizer, **options)
    losses = []
    for batch in batches:
        losses.append(step(*batch))
        if rates is not None:
            rates.step()
    step.sync()
    run.losses = [float(loss) for loss in losses]
    if options.get("max_grad_norm"):
        run.norms = [loss.grad_norm for loss in losses]
    return run, step


def assert_equal_numbers(got: Trained, wanted: Trained, tolerance: float = 1e-9) -> None:
    """Weights, buffers, optimizer state, losses and norms."""
    pairs = zip(got.model.state_dict().items(), wanted.model.state_dict().items(), strict=True)
    for (name, mine), (key, theirs) in pairs:
        assert name == key
        assert_near(name, mine, theirs, tolerance)
    for mine, theirs in zip(got.model.parameters(), wanted.model.parameters(), strict=True):
        mine_state, their_state = got.optimizer.state.get(mine, {}), wanted.optimizer.state.get(theirs, {})
        present = {key for key, value in their_state.items() if value is not None}
        assert {key for key, value in mine_state.items() if value is not None} == present
        for key in present:
            assert_near(key, torch.as_tensor(mine_state[key]), torch.as_tensor(their_state[key]), tolerance)
    torch.testing.assert_close(got.losses, wanted.losses, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.norms, wanted.norms, rtol=tolerance, atol=tolerance)


def assert_near(name: str, got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), name
    error = float((got.double() - wanted.double()).norm())
    assert error <= tolerance * max(float(wanted.double().norm()), 1e-3), f"{name}: {error:.2e}"


def assert_same_bits(got: nn.Module, wanted: nn.Module) -> None:
    for (name, mine), theirs in zip(got.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
