"""Models on the meta device: captured without memory for weights, and planned for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import daggc
from daggc.plan.device import Cluster, Device, Link
from daggc.plan.parallel import layers_of, plan_parallel


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Words(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(100, width), nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.register_buffer("order", torch.arange(16), persistent=False)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(self.order)
        for block in self.blocks:
            x = block(x)
        logits = x @ self.words.weight.T
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_program_is_the_one_of_a_model_with_weights(device):
    ids = torch.zeros(2, 16, dtype=torch.int64)
    given = (ids.to(device), ids.to(device))
    expected = daggc.trace(Words(8, 2), (ids, ids))
    with torch.device("meta"):
        model = Words(8, 2)
    found = daggc.trace(model, given)
    assert str(found) == str(expected)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_one_tensor_given_twice_is_two_inputs():
    """The program is for any two."""
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    compiled = daggc.compile(Difference())
    for other in (x, y):
        torch.testing.assert_close(compiled(x, other), x - 2 * other)


class Difference(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a - 2 * b


def test_a_model_larger_than_memory_is_planned():
    """412 GB of weights in 16 bits: with gradients and Adam too much for 16 devices of 80 GB, not for 1,024."""
    with torch.device("meta"):
        model = Words(32768, 24).to(torch.bfloat16)
        ids = torch.zeros(1, 16, dtype=torch.int64)
    layers = layers_of(daggc.trace(model, (ids, ids)))
    assert layers.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert [layer.name for layer in layers.layers] == ["before", *(f"blocks.{i}" for i in range(24)), "after"]
    gpu = Device("gpu:0", "cuda", {"gemm": 3e14, "elementwise": 1e13}, 2e12, 80e9, 0.0, 5e-6, "", 0)
    devices = [Device(f"gpu:{i}", *list(gpu.to_json().values())[1:7], f"host-{i // 8}", 0) for i in range(1024)]
    cluster = Cluster(tuple(devices), Link(1e-5, 2.5e10), link_within_host=Link(5e-6, 3e11))
    plan = plan_parallel(layers, cluster, 1024)
    assert plan.best.memory < 80e9 and plan.best.choice.tensor == 8
    small = Cluster(tuple(devices[:16]), Link(1e-5, 2.5e10), link_within_host=Link(5e-6, 3e11))
    with pytest.raises(daggc.PlanError, match=r"does not fit 16 devices of 75.2 GB; the nearest needs"):
        plan_parallel(layers, small, 1024)
