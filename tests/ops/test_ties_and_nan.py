"""Where functions are not smooth: ties, zeros and NaN give the gradients that torch gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import daggc
from daggc.errors import CaptureError
from daggc.interp import interpret
from daggc.ir.graph import Program
from daggc.ops import REGISTRY
from daggc.ops.opdef import t
from daggc.passes.vjp import vjp

NAN, INF = float("nan"), float("inf")
NUMBERS = {
    "ties": [[1.0, 3, 3, 2], [0, 0, 0, 0], [5, 4, 3, 5]],
    "nan": [[1.0, NAN, 3, 2], [NAN, NAN, 0, 1], [1, 2, 3, 4]],
    "infinite": [[INF, 1, INF, 2], [-INF, -INF, -INF, -INF], [-INF, 0, 1, 2]],
    "zeros": [[0.0, 1, 2, 3], [0, 0, 2, 3], [1, 2, 3, 0]],
}
PLACES = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 2, 2]])
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda x: x.amax(1),
    "amin of two axes": lambda x: x.amin((0, 1)),
    "max": lambda x: x.max(),
    "min": lambda x: x.min(),
    "max along": lambda x: x.max(1)[0],
    "median": lambda x: x.median(),
    "nanmedian": lambda x: x.nanmedian(),
    "median along": lambda x: x.median(1)[0],
    "kthvalue": lambda x: x.kthvalue(2, 1)[0],
    "cummax": lambda x: x.cummax(1)[0],
    "prod": lambda x: x.prod(1),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "logsumexp": lambda x: x.logsumexp(1),
    "std": lambda x: x.std(1),
    "var without freedom": lambda x: x.var(correction=12),
    "var with freedom of one": lambda x: x.var(correction=11),
    "nanmean": lambda x: x.nanmean(1),
    "quantile": lambda x: x.quantile(0.4, 1),
    "nanquantile": lambda x: x.nanquantile(0.3),
    "safe softmax": lambda x: torch.ops.aten._safe_softmax(x, 1),
    "scatter amax": lambda x: torch.scatter_reduce(x, 1, PLACES, x.flip(1), "amax"),
    "scatter prod": lambda x: torch.scatter_reduce(x, 1, PLACES, x.flip(1), "prod"),
    "scatter mean, not of itself": lambda x: torch.scatter_reduce(x, 1, PLACES, x, "mean", include_self=False),
    "index_reduce amin": lambda x: torch.index_reduce(x, 1, PLACES[0], x.flip(1), "amin", include_self=False),
}


class Model(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def value_and_gradient(model: Callable[[Tensor], Tensor], numbers: list[list[float]]) -> tuple[Tensor, Tensor]:
    x = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y.backward(torch.linspace(1.0, 2.0, y.numel(), dtype=y.dtype).reshape(y.shape))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_torch(name: str):
    compiled = daggc.compile(Model(FUNCTIONS[name]))
    for kind, numbers in NUMBERS.items():
        for got, wanted in zip(
            value_and_gradient(compiled, numbers), value_and_gradient(FUNCTIONS[name], numbers), strict=True
        ):
            torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-10, atol=1e-12, msg=f"{name} of {kind}")


def test_second_derivatives_where_nothing_varies():
    """Of a standard deviation that is 0."""
    numbers = np.array([[2.0, 2, 2], [1, 2, 4]])
    b = REGISTRY.builder("forward")
    b.output(b.emit("std", b.input(t(2, 3), "input", "0"), dims=(1,), keepdim=False, correction=1), "output", "0")
    first, second = np.array([1.0, 2.0]), np.linspace(-1.0, 1.0, 6).reshape(2, 3)
    inputs = {"input:0": numbers, "cotangent:output:0": first, "cotangent:grad:input:0": second}
    with np.errstate(all="ignore"):
        found = interpret(vjp(vjp(Program({"forward": b.build()}))), inputs)
    x, ct = (torch.tensor(array, requires_grad=True) for array in (numbers, first))
    (slope,) = torch.autograd.grad(x.std(1), x, ct, create_graph=True)
    wanted = torch.autograd.grad(slope, (x, ct), torch.tensor(second))
    for ref, tensor in zip(("grad:input:0'", "grad:cotangent:output:0"), wanted, strict=True):
        np.testing.assert_allclose(found[ref], tensor, rtol=1e-10, atol=1e-12, err_msg=ref)


def test_as_strided_outside_of_its_tensor_is_refused():
    model = Model(lambda x: (x + 1)[5:15].as_strided((2, 2), (1, 2), 5))
    with pytest.raises(CaptureError, match="outside of its tensor"):
        daggc.trace(model, (torch.arange(20.0),))
