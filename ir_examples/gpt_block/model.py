"""A block of a GPT between an embedding and a head that share one matrix."""

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, LENGTH, WIDTH, HEADS = 11, 6, 8, 2


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each after a layer norm and around a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.norm_2 = nn.LayerNorm(WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (x.shape[0], LENGTH, HEADS, WIDTH // HEADS)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(self.norm_1(x)).split(WIDTH, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.feed_forward(self.norm_2(x))


class GPT(nn.Module):
    """One block; returns the loss of predicting each next token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.block = Block()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(LENGTH))
        logits = self.head(self.norm(self.block(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def factory() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The model and example inputs: 2 sequences of 6 tokens and the tokens that follow."""
    torch.manual_seed(0)
    text = torch.randint(VOCABULARY, (2, LENGTH + 1))
    return GPT(), (text[:, :-1], text[:, 1:])
