"""Results that torch does not differentiate have no gradient here either."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import daggc

aten = torch.ops.aten

CASES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean of a layer norm": lambda x: torch.native_layer_norm(x, [3], None, None, 1e-5)[1],
    "deviation of a layer norm": lambda x: torch.native_layer_norm(x, [3], None, None, 1e-5)[2],
    "deviation of a group norm": lambda x: torch.native_group_norm(x, None, None, 3, 3, 1, 1, 1e-5)[2],
    "deviation of a batch norm": lambda x: torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[2],
    "LU of a determinant": lambda x: aten._linalg_det(x)[1],
    "LU of a log-determinant": lambda x: aten._linalg_slogdet(x)[2],
    "buffer of a log sigmoid": lambda x: aten.log_sigmoid_forward(x)[1],
    "deviation of an RMS norm, which has one": lambda x: aten._fused_rms_norm(x, [3], None, 1e-5)[1],
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_eager(case: str) -> None:
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (CASES[case](x) * 3).sum() + (x * x).sum()

    torch.manual_seed(0)
    x = (torch.randn(3, 3, dtype=torch.float64) + 3 * torch.eye(3)).requires_grad_()
    (wanted,) = torch.autograd.grad(Reads()(x), x)
    compiled = daggc.compile(Reads())
    torch.testing.assert_close(compiled(x), Reads()(x), rtol=1e-12, atol=0)
    (got,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
