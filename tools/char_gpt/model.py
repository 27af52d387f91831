"""A small GPT, written as anyone would write it: nothing in it knows of daggc."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Size:
    """Of a GPT: ``vocabulary`` characters, contexts of ``block`` characters."""

    vocabulary: int
    block: int = 128
    width: int = 128
    layers: int = 4
    heads: int = 4


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each after a layer norm and around a residual connection."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm_1 = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.project = nn.Linear(size.width, size.width)
        self.norm_2 = nn.LayerNorm(size.width)
        self.grow = nn.Linear(size.width, 4 * size.width)
        self.shrink = nn.Linear(4 * size.width, size.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.feed_forward(self.attend(x))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm_1(x)).split(width, dim=-1)
        q, k, v = (part.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shrink(F.gelu(self.grow(self.norm_2(x))))


class GPT(nn.Module):
    """Characters (i64[batch, length]) -> logits of the next ones (f32[batch, length, vocabulary])."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.characters = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.block, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                residual = name.endswith(("project.weight", "shrink.weight"))  # GPT-2: their sum grows with depth
                spread = size.width * (2 * size.layers if residual else 1)
                nn.init.normal_(parameter, std=1 / math.sqrt(spread))

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        places = torch.arange(characters.shape[1], device=characters.device)
        return self.head(self.norm(self.blocks(self.characters(characters) + self.positions(places))))


def next_character_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats a character."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def sample(model: GPT, start: torch.Tensor, count: int, seed: int = 0, temperature: float = 0.5) -> torch.Tensor:
    """``count`` characters drawn one after the other, after the characters of ``start`` (i64[n])."""
    generator = torch.Generator().manual_seed(seed)
    characters = start
    for _ in range(count):
        logits = model(characters[None, -model.size.block :])[0, -1]
        drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        characters = torch.cat([characters, drawn])
    return characters[len(start) :]
