"""Eager training as its users write it: autocast, accumulation over batches, a GradScaler. And models for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map
from training import MakeOptimizer, Trained, assert_equal_numbers, words

import daggc
from daggc.runtime.train import TrainStep

BF16 = torch.autocast("cpu", torch.bfloat16)
F16 = torch.autocast("cpu", torch.float16)
Groups = Sequence[Sequence[tuple[Any, ...]]]  # of batches, one group for each step


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Unlike Adam, it does not divide the rounding of a gradient that is zero by itself."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        q, k, v = (part.view(batch, time, 2, -1).transpose(1, 2) for part in self.qkv(self.before(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, time, width)
        x = x + self.proj(y)
        return x + self.down(F.gelu(self.up(self.after(x))))


class GPT(nn.Module):
    """A small causal language model with tied embeddings; gives logits."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(64, width), nn.Embedding(16, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 64, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def images(sizes: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 8, 8, generator=generator), torch.randint(4, (n,), generator=generator)) for n in sizes]


def sentences(sizes: Sequence[int], length: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and targets, none of them ignored."""
    return [(ids, (ids + 1) % 64) for ids, _ in words(sizes, length)]


def next_word(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, hidden_dropout_prob=0, attention_probs_dropout_prob=0, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def classified(sizes: Sequence[int]) -> list[tuple[dict[str, torch.Tensor]]]:
    return [({"input_ids": ids, "labels": ids[:, 0] % 3},) for ids, _ in words(sizes)]


def continued(sizes: Sequence[int]) -> list[tuple[dict[str, torch.Tensor]]]:
    return [({"input_ids": ids, "labels": ids},) for ids, _ in words(sizes)]


@dataclass
class Scaled(Trained):
    """A training with a scaler: which steps were skipped."""

    skipped: list[bool] = field(default_factory=list)


def eager_groups(
    model: nn.Module,
    loss_fn: Callable[..., torch.Tensor] | None,
    make: MakeOptimizer,
    groups: Groups,
    *,
    parts: int = 1,
    autocast: Any = None,
    scaler: torch.amp.GradScaler | None = None,
    clip: float | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> Scaled:
    """Train a copy of a model; ``parts``: equal ones that each batch comes in, its loss the mean of theirs."""
    model = copy.deepcopy(model)
    run = Scaled(model, make(model))
    rates = scheduler(run.optimizer) if scheduler else None
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for group in groups:
        run.optimizer.zero_grad()
        total = 0.0
        for batch in group:
            for part in range(parts):
                own = tree_map(lambda tensor, at=part: tensor.chunk(parts)[at], tuple(batch))
                with copy.copy(autocast) or nullcontext():
                    loss = loss_fn(model(*own[:-1]), own[-1]) if loss_fn else model(**own[0]).loss
                scaler.scale(loss / (len(group) * parts)).backward()
                total += loss.item() / (len(group) * parts)
        if clip is not None:
            scaler.unscale_(run.optimizer)
            run.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        before = scaler.get_scale()
        scaler.step(run.optimizer)
        scaler.update()
        if rates is not None:
            rates.step()
        run.losses.append(total)
        run.skipped.append(scaler.get_scale() < before)
    return run


def step_groups(
    model: nn.Module,
    loss_fn: Callable[..., torch.Tensor] | None,
    make: MakeOptimizer,
    groups: Groups,
    *,
    client: Any = None,
    autocast: Any = None,
    scaler: torch.amp.GradScaler | None = None,
    clip: float | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    **options: Any,
) -> tuple[Scaled, TrainStep]:
    """The same by a train step, synced at the end."""
    model = copy.deepcopy(model)
    run = Scaled(model, make(model))
    rates = scheduler(run.optimizer) if scheduler else None
    step = daggc.compile(model, client=client).train_step(
        loss_fn, run.optimizer, scaler=scaler, max_grad_norm=clip, **options
    )
    losses = []
    for group in groups:
        with copy.copy(autocast) or nullcontext():
            losses.append(step.accumulate(group) if len(group) > 1 else step(*group[0]))
        if rates is not None:
            rates.step()
    step.sync()
    run.losses = [float(loss) for loss in losses]
    run.skipped = [loss.skipped for loss in losses]
    run.norms = [loss.grad_norm for loss in losses] if clip is not None else []
    return run, step


def assert_equal_training(got: Scaled, wanted: Scaled, tolerance: float) -> None:
    assert got.skipped == wanted.skipped
    finite = [index for index, skipped in enumerate(wanted.skipped) if not skipped]
    for run in (got, wanted):  # norms of steps that were skipped are infinite or NaN
        run.norms = [run.norms[index] for index in finite] if run.norms else []
    assert_equal_numbers(got, wanted, tolerance)


def distance(model: nn.Module, exact: nn.Module) -> float:
    """Of all parameters from those of a model trained in more digits."""
    pairs = zip(model.parameters(), exact.parameters(), strict=True)
    return sum(float((mine.detach().double() - its.detach()).norm()) ** 2 for mine, its in pairs) ** 0.5
