"""Functions that capture computes by others: the same numbers as torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import daggc


class Call(nn.Module):
    """A function of tensors and what does not change."""

    def __init__(self, function, *static, **options) -> None:
        super().__init__()
        self.function, self.static, self.options = function, static, options

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.function(*tensors, *self.static, **self.options)


def assert_equal_to_eager(model: nn.Module, *tensors: torch.Tensor) -> None:
    assert daggc.trace(model, tensors).portable
    runs = []
    for run in (daggc.compile(model), model):
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in tensors]
        result = run(*leaves)
        wanted = [x for x in leaves if x.requires_grad]
        runs.append([result.detach(), *torch.autograd.grad(result.sum(), wanted)])
    for mine, eager in zip(*runs, strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-10, atol=1e-10, equal_nan=True)


LOG_PROBS = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(2)
TARGETS = torch.tensor([[1, 1, 2, 3], [4, 2, 0, 0], [3, 0, 0, 0]])
FLAT = torch.tensor([1, 1, 2, 3, 4, 2, 3])
INPUTS, LENGTHS = (6, 5, 2), (4, 2, 1)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("targets", [TARGETS, FLAT], ids=["padded", "flat"])
def test_ctc_loss(reduction: str, targets: torch.Tensor):
    lengths = torch.tensor(INPUTS), torch.tensor(LENGTHS)
    assert_equal_to_eager(Call(F.ctc_loss, reduction=reduction), LOG_PROBS, targets, *lengths)
    assert_equal_to_eager(Call(F.ctc_loss, INPUTS, LENGTHS, reduction=reduction), LOG_PROBS, targets)


@pytest.mark.parametrize("zero_infinity", [True, False])
def test_ctc_loss_of_targets_that_do_not_fit(zero_infinity: bool):
    options = {"reduction": "none", "zero_infinity": zero_infinity}
    assert_equal_to_eager(Call(F.ctc_loss, (3, 5, 2), LENGTHS, **options), LOG_PROBS, TARGETS)


def test_ctc_loss_without_a_batch():
    assert_equal_to_eager(Call(nn.CTCLoss(), (6,), (4,)), LOG_PROBS[:, 0], TARGETS[0])


@pytest.mark.parametrize("shape", [(4, 3), (4,), (4, 1)])
@pytest.mark.parametrize("full", [True, False])
def test_gaussian_nll_loss(shape: tuple[int, ...], full: bool):
    x, y, var = torch.randn(2, 4, 3, dtype=torch.float64).unbind() + (torch.rand(shape, dtype=torch.float64),)
    var.view(-1)[0] = 0.0  # below eps
    assert_equal_to_eager(Call(nn.GaussianNLLLoss(full=full)), x, y, var)


def test_gaussian_nll_loss_of_a_negative_variance_is_nan():
    x = torch.ones(3)
    compiled = daggc.compile(Call(F.gaussian_nll_loss, reduction="none"))
    assert compiled(x, x, torch.tensor([1.0, -1.0, 2.0])).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_multilabel_margin_loss_without_a_batch(reduction: str):
    x, target = torch.randn(4, dtype=torch.float64), torch.tensor([3, 0, -1, 1])
    assert_equal_to_eager(Call(F.multilabel_margin_loss, reduction=reduction), x, target)


@pytest.mark.parametrize("batch", [(6,), ()])
def test_adaptive_log_softmax(batch: tuple[int, ...]):
    model = nn.AdaptiveLogSoftmaxWithLoss(4, 12, [3, 7], div_value=2.0).double()
    target = torch.tensor([0, 11, 5, 2, 7, 3]) if batch else torch.tensor(8)
    x = torch.randn(*batch, 4, dtype=torch.float64)
    assert_equal_to_eager(Call(lambda x, target: model(x, target).loss), x, target)
    assert_equal_to_eager(Call(lambda x, target: model(x, target).output), x, target)
