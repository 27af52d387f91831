"""Linear algebra that looks at data, captured without data; and what it does where eager refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import daggc


class Apply(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.function(*tensors)


def drawn(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def results(model: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and the gradients."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output = model(*leaves)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (torch.cov, [(3, 5)]),
        (lambda x: x.cov(correction=0), [(5,)]),
        (lambda x, w: torch.cov(x, fweights=torch.tensor([1, 0, 3]), aweights=w.square()), [(2, 3), (3,)]),
        (torch.corrcoef, [(3, 5)]),
        (lambda a, b: torch.linalg.lstsq(a, b).solution, [(4, 2), (4, 3)]),
        (lambda a, b: torch.linalg.lstsq(a, b, driver="gels").residuals, [(2, 4, 2), (2, 4, 3)]),
        (lambda a, b: torch.linalg.lstsq(a, b, driver="gelsd")[0], [(2, 2, 4), (2, 2)]),
        (torch.linalg.det, [(2, 3, 3)]),
    ],
)
def test_equal_to_eager(function: Callable[..., torch.Tensor], shapes: list[tuple[int, ...]]):
    tensors = drawn(*shapes)
    model = Apply(function)
    assert daggc.trace(model, tuple(tensors)).portable
    for got, wanted in zip(results(daggc.compile(model), tensors), results(model, tensors), strict=True):
        torch.testing.assert_close(got, wanted)


def test_singular_matrices():
    """The determinant has eager's gradient; an inverse is eager's error."""
    singular = [torch.tensor([[1.0, 2.0], [2.0, 4.0]])]
    model = Apply(torch.linalg.det)
    for got, wanted in zip(results(daggc.compile(model), singular), results(model, singular), strict=True):
        torch.testing.assert_close(got, wanted)
    with pytest.raises(daggc.errors.DaggcError, match="singular"):
        daggc.compile(Apply(torch.linalg.inv))(*singular)


def test_residuals_of_a_matrix_of_lower_rank_are_nan():
    a = torch.ones(4, 2)
    residuals = daggc.compile(Apply(lambda a, b: torch.linalg.lstsq(a, b, driver="gelsd").residuals))(a, a)
    assert residuals.shape == (2,) and residuals.isnan().all()


def test_negative_weights_are_nan():
    weights = torch.tensor([1.0, -1.0, 2.0])
    assert daggc.compile(Apply(lambda x, w: torch.cov(x, aweights=w)))(torch.ones(2, 3), weights).isnan().all()
