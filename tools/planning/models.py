"""Models for measurements of the planner: real shapes, random weights, seconds and not minutes on one core."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Example:
    """A model, what it is trained on, and how.

    Attributes:
        loss: ``loss(output, target)``; None for a model that gives its own.
        batch: arguments of a step.
        force: microbatches change batch statistics, and are wanted all the same.
    """

    model: nn.Module
    loss: Callable[..., torch.Tensor] | None
    batch: tuple[Any, ...]
    force: bool = False


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, vocabulary: int, time: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(time, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def words_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gpt(width: int, layers: int, heads: int, vocabulary: int, batch: int, time: int) -> Example:
    ids = torch.randint(vocabulary, (batch, time + 1))
    return Example(GPT(width, layers, heads, vocabulary, time), words_loss, (ids[:, :-1], ids[:, 1:]))


def mlp(width: int, layers: int, batch: int) -> Example:
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(width, width), nn.GELU()]
    model = nn.Sequential(*parts, nn.Linear(width, 10))
    return Example(model, F.cross_entropy, (torch.randn(batch, width), torch.randint(10, (batch,))))


class Residual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = norm(out), norm(out)
        same = channels == out and stride == 1
        self.short = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.short(x))


def resnet(widths: tuple[int, ...], blocks: int, batch: int, size: int, batch_norm: bool) -> Example:
    """A residual network; with batch norm, which microbatches change, or group norm."""
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d if batch_norm else lambda channels: nn.GroupNorm(8, channels)
    parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), norm(widths[0]), nn.ReLU()]
    channels = widths[0]
    for index, width in enumerate(widths):
        for block in range(blocks):
            parts.append(Residual(channels, width, 2 if index and not block else 1, norm))
            channels = width
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    images = torch.randn(batch, 3, size, size)
    return Example(nn.Sequential(*parts), F.cross_entropy, (images, torch.randint(10, (batch,))), batch_norm)


def bert(batch: int, time: int) -> Example:
    from transformers import BertConfig, BertForMaskedLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = BertConfig(
        vocab_size=2000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
        max_position_embeddings=time, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ids = torch.randint(2000, (batch, time))
    return Example(BertForMaskedLM(config), None, ({"input_ids": ids, "labels": ids},))


class Tagger(nn.Module):
    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.rnn = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.tokens(ids))[0])


def lstm(width: int, vocabulary: int, batch: int, time: int) -> Example:
    ids = torch.randint(vocabulary, (batch, time + 1))
    return Example(Tagger(width, vocabulary), words_loss, (ids[:, :-1], ids[:, 1:]))


class Towers(nn.Module):
    """Two towers, of images and of words, whose results meet in a contrastive loss."""

    def __init__(self, width: int, layers: int, vocabulary: int, time: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.sight = nn.ModuleList(Block(width, 4, causal=False) for _ in range(layers))
        self.tokens = nn.Embedding(vocabulary, width)
        self.reading = nn.ModuleList(Block(width, 4, causal=False) for _ in range(layers))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.sight:
            x = block(x)
        y = self.tokens(ids)
        for block in self.reading:
            y = block(y)
        seen, read = F.normalize(x.mean(1), dim=-1), F.normalize(y.mean(1), dim=-1)
        return self.scale.exp() * seen @ read.T


def towers(width: int, layers: int, batch: int, time: int = 64) -> Example:
    images, ids = torch.randn(batch, 3, 64, 64), torch.randint(1000, (batch, time))
    return Example(Towers(width, layers, 1000, time), F.cross_entropy, (images, ids, torch.arange(batch)))


class Branches(nn.Module):
    """Parallel branches of unequal depth whose results are added."""

    def __init__(self, width: int, depths: tuple[int, ...]) -> None:
        super().__init__()
        self.enter = nn.Linear(width, width)
        self.branches = nn.ModuleList(
            nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(width, width), nn.GELU())))
            for depth in depths
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        return self.head(sum(branch(x) for branch in self.branches))


def branches(width: int, batch: int, depths: tuple[int, ...] = (5, 3, 4, 2, 6, 3, 4, 5)) -> Example:
    return Example(Branches(width, depths), F.cross_entropy, (torch.randn(batch, width), torch.randint(10, (batch,))))


MODELS: dict[str, Callable[[], Example]] = {
    "gpt": lambda: gpt(256, 6, 4, 2000, 16, 128),
    "small gpt": lambda: gpt(128, 4, 4, 500, 8, 64),
    "mlp": lambda: mlp(1024, 8, 256),
    "bert": lambda: bert(16, 128),
    "resnet": lambda: resnet((32, 64, 128), 2, 32, 32, batch_norm=False),
    "resnet bn": lambda: resnet((32, 64, 128, 256), 2, 32, 64, batch_norm=True),
    "lstm": lambda: lstm(256, 500, 32, 32),
    "towers": lambda: towers(256, 3, 32),
    "branches": lambda: branches(1024, 256),
}


def example(name: str) -> Example:
    """The model of a name, the same every time."""
    torch.manual_seed(0)
    return MODELS[name]()
