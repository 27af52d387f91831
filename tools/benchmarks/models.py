"""What is compared: a model, its loss, a batch and an optimizer, the same for everyone who runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from char_gpt.model import GPT, Size, next_character_loss
from torch import nn
from torch.nn import functional as F

Batch = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A workload.

    Attributes:
        limit: of the ratio to eager in one process.
        make: model and batch, the same at each call.
        loss: of the model's output and the batch's last tensor; None for inference on the whole batch.
        optimizer: over the model's parameters.
    """

    name: str
    limit: float
    make: Callable[[], tuple[nn.Module, Batch]]
    loss: Callable[..., torch.Tensor] | None = None
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None


def _gpt(width: int, layers: int, batch: int, block: int, vocabulary: int) -> Callable[[], tuple[nn.Module, Batch]]:
    def make() -> tuple[nn.Module, Batch]:
        torch.manual_seed(0)
        model = GPT(Size(vocabulary, block, width, layers, max(1, width // 64)))
        return model, (torch.randint(vocabulary, (batch, block)), torch.randint(vocabulary, (batch, block)))

    return make


class _Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm_1 = nn.BatchNorm2d(width)
        self.conv_2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm_2 = nn.BatchNorm2d(width)
        project = stride != 1 or before != width
        shortcut = [nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)] if project else []
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm_1(self.conv_1(x)))
        return F.relu(self.norm_2(self.conv_2(y)) + self.shortcut(x))


def resnet18(classes: int = 1000) -> nn.Module:
    """ResNet-18 as He et al. (2016) have it."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks: list[nn.Module] = []
    before = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [_Residual(before, width, stride), _Residual(width, width, 1)]
        before = width
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def _resnet() -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    return resnet18(), (torch.randn(32, 3, 64, 64), torch.randint(1000, (32,)))


class _Encoder(nn.Module):
    """BERT-base with random weights, of which the last hidden state is wanted."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.bert = BertModel(BertConfig(), add_pooling_layer=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.bert(input_ids=tokens).last_hidden_state


def _bert() -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    return _Encoder().eval(), (torch.randint(30522, (8, 128)),)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def _momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


CASES = {
    case.name: case
    for case in (
        Case("gpt", 1.03, _gpt(512, 8, 16, 128, 5000), next_character_loss, _adamw),
        Case("resnet18", 1.03, _resnet, F.cross_entropy, _momentum),
        Case("small-gpt", 1.10, _gpt(128, 4, 4, 64, 65), next_character_loss, _adamw),
        Case("bert", 1.03, _bert),
        Case("tiny", 1.10, _gpt(32, 1, 2, 8, 5), next_character_loss, _adamw),  # what processes are warmed with
    )
}
