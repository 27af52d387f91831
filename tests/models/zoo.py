"""The models that daggc is held against eager PyTorch with: small configurations of real ones, and hand-written ones.

Each builder returns a :class:`Case`; the numbers are those of ``torch.manual_seed(0)``. Sizes are such that two
devices can share the work, each at least a quarter of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from distributed import get_worker
from torch import nn

import daggc

logging.getLogger("transformers").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Case:
    """A model and the arguments of one call; floating-point tensors that require gradients are compared for them."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=32, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = torch.randint(0, 64, (2, 8))
    return Case(GPT2LMHeadModel(config), (), {"input_ids": ids, "labels": ids})


def bert() -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=64,
        max_position_embeddings=32, hidden_dropout_prob=0, attention_probs_dropout_prob=0, num_labels=3,
    )  # fmt: skip
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    ids = torch.randint(0, 64, (2, 8))
    kwargs = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2])}
    return Case(BertForSequenceClassification(config), (), kwargs)


def vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0, num_labels=3,
    )  # fmt: skip
    pixels = torch.randn(2, 3, 16, 16, requires_grad=True)
    return Case(ViTForImageClassification(config), (), {"pixel_values": pixels, "labels": torch.tensor([0, 2])})


def resnet() -> Case:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, layer_type="basic")
    pixels = torch.randn(4, 3, 32, 32, requires_grad=True)
    kwargs = {"pixel_values": pixels, "labels": torch.tensor([0, 2, 1, 1])}
    return Case(ResNetForImageClassification(config), (), kwargs)


def llama() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=64, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = torch.randint(0, 64, (2, 8))
    return Case(LlamaForCausalLM(config), (), {"input_ids": ids, "labels": ids})


def t5() -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        num_layers=2, d_model=32, num_heads=2, d_kv=16, d_ff=64, vocab_size=64, dropout_rate=0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    kwargs = {"input_ids": torch.randint(2, 64, (2, 8)), "labels": torch.randint(2, 64, (2, 6))}
    return Case(T5ForConditionalGeneration(config), (), kwargs)


def mlp() -> Case:
    net = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 8)
    )
    return Case(net, (torch.randn(6, 16, requires_grad=True),))


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 16, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(16, momentum=0.2)
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.max_pool2d(F.relu_(self.norm2(self.conv2(x))), 2)
        x = F.max_pool2d(F.relu(self.norm3(self.conv3(x))), 2)
        return self.head(x.flatten(1))


def cnn() -> Case:
    return Case(CNN(), (torch.randn(6, 2, 8, 8, requires_grad=True),))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.right = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
        self.out = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([self.left(x), self.right(x)], -1))


def branches() -> Case:
    return Case(Branches(), (torch.randn(6, 16, requires_grad=True),))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(ids)))


def tied() -> Case:
    return Case(Tied(), (torch.randint(0, 24, (3, 6)),))


class NotItsDerivative(torch.autograd.Function):
    """``exp`` forward, the derivative of ``x ** 2`` backward: tracing through it would give other gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return cotangents[0] * 2 * x


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 32)
        self.third = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = NotItsDerivative.apply(self.first(x))
        return self.third(NotItsDerivative.apply(self.second(x)))


def custom() -> Case:
    return Case(Custom(), (torch.randn(6, 16, requires_grad=True),))


PLACES: list[str] = []  # where `speaking_layer` ran in this process


@daggc.opaque(out=lambda x, weight, number: torch.empty_like(x))
def speaking_layer(x: torch.Tensor, weight: torch.Tensor, number: int) -> torch.Tensor:
    """A Python layer that daggc does not look into: it says where it runs."""
    try:
        place = str(get_worker().address)
    except ValueError:
        place = "this process"
    print(f"layer {number} on {place}")
    PLACES.append(place)
    return torch.tanh(x @ weight) if float(x.detach().sum()) < 1e9 else x  # depends on data: cannot be traced


class Speaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(16, 16) / 4 for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, weight in enumerate(self.weights):
            x = speaking_layer(x, weight, number)
        return x


def speaking() -> Case:
    return Case(Speaking(), (torch.randn(6, 16, requires_grad=True),))


ZOO: dict[str, Callable[[], Case]] = {
    "gpt2": gpt2,
    "bert": bert,
    "vit": vit,
    "resnet": resnet,
    "llama": llama,
    "t5": t5,
    "mlp": mlp,
    "cnn": cnn,
    "branches": branches,
    "tied": tied,
    "custom": custom,
    "opaque": speaking,
}
