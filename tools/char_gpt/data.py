"""Real English text that every Python has: the reference manual's topics, as ``help()`` prints them."""

from __future__ import annotations

from dataclasses import dataclass
from pydoc_data.topics import topics

import torch


@dataclass(frozen=True)
class Text:
    """A text as numbers, its last tenth held back from training.

    Attributes:
        alphabet: the characters; a character's number is its place here.
        train: i64[n].
        held_back: i64[m].
    """

    alphabet: str
    train: torch.Tensor
    held_back: torch.Tensor

    def encode(self, text: str) -> torch.Tensor:
        places = {character: place for place, character in enumerate(self.alphabet)}
        return torch.tensor([places[character] for character in text])

    def decode(self, characters: torch.Tensor) -> str:
        return "".join(self.alphabet[place] for place in characters.tolist())


def read_text() -> Text:
    """The topics, in order of their names; what is not ASCII becomes a question mark."""
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace").decode()
    alphabet = "".join(sorted(set(text)))
    numbers = Text(alphabet, torch.empty(0), torch.empty(0)).encode(text)
    cut = len(numbers) * 9 // 10
    return Text(alphabet, numbers[:cut], numbers[cut:])


def batch(characters: torch.Tensor, block: int, size: int, step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of a step: ``size`` random pieces, and the same one character on; i64[size, block] each.

    A function of its arguments, so that every run and every way of running sees the same batches.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(characters) - block, (size,), generator=generator).tolist()
    pieces = torch.stack([characters[start : start + block + 1] for start in starts])
    return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()
