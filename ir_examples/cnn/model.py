"""A convolutional network in training mode: batch norm mixes samples and changes buffers."""

import torch
from torch import nn


class CNN(nn.Module):
    """Convolution, batch norm, pooling, a residual block, a linear classifier; returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 3)

    def forward(self, image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.stem(image))
        x = torch.relu(x + self.block(x))
        return nn.functional.cross_entropy(self.head(x.mean((2, 3))), target)


def factory() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The model and example inputs: 2 grey images of 8 x 8 pixels, 3 classes."""
    torch.manual_seed(0)
    return CNN(), (torch.randn(2, 1, 8, 8), torch.tensor([2, 0]))
