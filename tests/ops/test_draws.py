"""Random functions that are compositions of uniform and normal draws: distributed as torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import ks_2samp
from torch import nn

import daggc

DRAWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cauchy": lambda x: x.clone().cauchy_(1.0, 2.0),
    "exponential": lambda x: x.clone().exponential_(3.0),
    "geometric": lambda x: x.clone().geometric_(0.3),
    "geometric of integers": lambda x: torch.empty_like(x, dtype=torch.int64).geometric_(0.3),
    "log_normal": lambda x: x.clone().log_normal_(0.5, 0.3),
    "random": lambda x: torch.empty_like(x, dtype=torch.int64).random_(7),
    "multinomial": lambda x: torch.multinomial(x[:5], 4000, replacement=True),
    "multinomial of rows": lambda x: torch.multinomial(x.view(-1, 4), 2),
}


class Draw(nn.Module):
    def __init__(self, draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.draw(x)


@pytest.mark.parametrize("name", DRAWS)
def test_distribution(name: str):
    torch.manual_seed(0)
    x = torch.rand(4000)
    x[1] = 0.0
    model = Draw(DRAWS[name])
    assert daggc.trace(model, (x,)).portable
    mine, eager = daggc.compile(model)(x), model(x)
    assert (mine.dtype, mine.shape) == (eager.dtype, eager.shape)
    samples = [x.double().flatten().numpy() for x in (mine, eager)]
    result: Any = ks_2samp(*samples, method="asymp")
    assert result.pvalue > 1e-4


def test_multinomial_gives_no_class_without_weight():
    weights = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    compiled = daggc.compile(Draw(lambda x: torch.multinomial(x, 1000, replacement=True)))
    assert set(compiled(weights).tolist()) == {1, 3}
