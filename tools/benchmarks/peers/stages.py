"""A GPT cut between its blocks, by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from char_gpt.model import GPT
from torch import nn


class Stage(nn.Module):
    """Some blocks of a GPT in a row; the first stage begins with the embeddings, the last ends with the logits."""

    def __init__(self, gpt: GPT, begin: int, end: int) -> None:
        super().__init__()
        first, last = begin == 0, end == len(gpt.blocks)
        self.characters, self.positions = (gpt.characters, gpt.positions) if first else (None, None)
        self.blocks = gpt.blocks[begin:end]
        self.norm, self.head = (gpt.norm, gpt.head) if last else (None, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.characters is not None and self.positions is not None:
            x = self.characters(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        x = self.blocks(x)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


def stages_of(gpt: nn.Module, cuts: Sequence[int]) -> list[Stage]:
    """The stages between the cuts; each is the number of the block before which it is."""
    assert isinstance(gpt, GPT)
    edges = [0, *cuts, len(gpt.blocks)]
    return [Stage(gpt, begin, end) for begin, end in itertools.pairwise(edges)]
