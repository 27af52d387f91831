"""A multilayer perceptron that classifies points, with its loss."""

import torch
from torch import nn


class MLP(nn.Module):
    """Two hidden layers; returns the loss and the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.layers(x)
        return nn.functional.cross_entropy(logits, target), logits


def factory() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The model and example inputs: 4 points of 8 features, 4 classes."""
    torch.manual_seed(0)
    return MLP(), (torch.randn(4, 8), torch.tensor([0, 3, 1, 2]))
