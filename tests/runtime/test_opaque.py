"""Functions that stay Python: what they may take and give, their own backward, and how they reach workers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from distributed import Client, get_worker
from torch import nn

import daggc
from daggc.errors import CaptureError, RunError

pytestmark = pytest.mark.timeout(120)


class Calls(nn.Module):
    """Applies a function to a weight and the input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 4, dtype=torch.float64))
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.weight, x)


def x() -> torch.Tensor:
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()


def assert_equals_eager(model: nn.Module, client: Any = None) -> None:
    given, other = x(), x()
    compiled = daggc.compile(model, client=client)
    results, wanted = compiled(given), model(other)
    results, wanted = ([y] if isinstance(y, torch.Tensor) else list(y) for y in (results, wanted))
    parameters = list(model.parameters())
    weights = [torch.randn_like(y) for y in wanted]
    mine = torch.autograd.grad([(y * w).sum() for y, w in zip(results, weights, strict=True)], [given, *parameters])
    theirs = torch.autograd.grad([(y * w).sum() for y, w in zip(wanted, weights, strict=True)], [other, *parameters])
    torch.testing.assert_close(results, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@daggc.opaque
def two_results(w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x * w, (x + w).sin()


@daggc.opaque
def one_in_a_tuple(w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
    return (x * w,)


@daggc.opaque
def with_options(w: torch.Tensor, x: Any, *, power: float, mode: str | None = None, flags: Any = ()) -> torch.Tensor:
    y = (x[0] * w).abs() ** power
    return y.exp() if mode == "exp" and flags == [True, None] else y


@daggc.opaque(out=lambda w, x: torch.empty_like(x))
def on_data(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Its control flow depends on data."""
    return x * w if x.detach().sum().item() > math.pi else x / w


@daggc.opaque
def item_inside(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x * w * x.detach().sum().item()


class Clipped(torch.autograd.Function):
    """A straight-through estimator with two inputs, a number, and an input that gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, limit: float) -> torch.Tensor:
        ctx.save_for_backward(w)
        return (x * w).clamp(-limit, limit)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        (w,) = ctx.saved_tensors
        return cotangents[0] * w * 7, None, None


class Twice(torch.autograd.Function):
    """Two results; its backward does not agree with its forward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> Any:
        return x * 2, x.exp()

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        return cotangents[0] * 10 + cotangents[1] * 100


@daggc.opaque
def calls_a_function_with_its_own_backward(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return Clipped.apply(x, w, 0.3)


CASES = {
    "two results": two_results,
    "one in a tuple": one_in_a_tuple,
    "options": lambda w, x: with_options(w, [x], power=2.0, mode="exp", flags=[True, None]),
    "on data": on_data,
    "item": item_inside,
    "straight through": lambda w, x: Clipped.apply(x, w, 0.5) * w,
    "two results of a Function": lambda w, x: [*Twice.apply(x * w)],
    "inside an opaque function": lambda w, x: calls_a_function_with_its_own_backward(w, x) * w,
    "twice in a row": lambda w, x: on_data(w, on_data(w, x).tanh()),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_eager(name: str) -> None:
    assert_equals_eager(Calls(CASES[name]))


@pytest.mark.parametrize("name", ["two results", "straight through", "inside an opaque function"])
def test_equals_eager_on_workers(two_workers: Client, name: str) -> None:
    assert_equals_eager(Calls(CASES[name]), two_workers)


def test_a_closure_travels_to_workers(two_workers: Client) -> None:
    table = {"scale": 3.0}

    @daggc.opaque(out=lambda w, x: torch.empty_like(x))
    def local(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        get_worker()  # raises anywhere else
        return x * w * table["scale"]

    model = Calls(local)
    given = x()
    result = daggc.compile(model, client=two_workers)(given)
    torch.testing.assert_close(result, given * model.weight * 3, rtol=0, atol=1e-12)
    result.sum().backward()


def test_outside_daggc_it_is_the_function() -> None:
    w, given = torch.ones(4), torch.ones(3, 4)
    assert two_results.__name__ == "two_results"
    assert torch.equal(two_results(w, given)[0], given)


def test_functions_of_one_name_stay_apart() -> None:
    made = []
    for factor in (2.0, 3.0):

        @daggc.opaque
        def scaled(w: torch.Tensor, x: torch.Tensor, factor: float = factor) -> torch.Tensor:
            return x * factor

        made.append(scaled)
    model = Calls(lambda w, x: made[0](w, x) + 10 * made[1](w, x) + 0 * w)
    assert_equals_eager(model)


def test_a_function_that_raises_names_the_users_line(two_workers: Client) -> None:
    @daggc.opaque(out=lambda w, x: torch.empty_like(x))
    def broken(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("the user's own words")

    class Inner(nn.Module):
        def forward(self, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return broken(w, x)  # the line the error names

    line = Inner.forward.__code__.co_firstlineno + 1
    for client in (None, two_workers):
        model = Calls(Inner())
        with pytest.raises(RunError, match=rf"(?s)the user's own words.*'function'.*test_opaque.py:{line}"):
            daggc.compile(model, client=client)(x())


def test_a_write_to_an_input_is_refused() -> None:
    @daggc.opaque(out=lambda w, x: torch.empty_like(x))
    def writes(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x.detach().mul_(2)

    with pytest.raises(RunError, match="wrote to one of its inputs"):
        daggc.compile(Calls(writes))(x().detach())


def test_results_that_are_not_as_declared_are_refused() -> None:
    @daggc.opaque(out=lambda w, x: torch.empty_like(x))
    def lies(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x.float()

    @daggc.opaque(out=lambda w, x: torch.empty_like(x))
    def sparse(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x.detach().to_sparse()

    with pytest.raises(RunError, match=r"declared to give \(f64\[3,4\]\), it gave \(f32\[3,4\]\)"):
        daggc.compile(Calls(lies))(x())
    with pytest.raises(daggc.DaggcError, match=r"sparse_coo tensor.*make it dense"):
        daggc.compile(Calls(sparse))(x().detach())


def test_what_cannot_be_recorded_is_refused_at_capture() -> None:
    takes_object = daggc.opaque(lambda w, x, thing: x, name="takes_object")
    with pytest.raises(CaptureError, match="takes_object is given a object"):
        daggc.compile(Calls(lambda w, x: takes_object(w, x, object())))(x())
    no_tensor = daggc.opaque(lambda: torch.ones(3), name="no_tensor")
    with pytest.raises(CaptureError, match="no_tensor takes no tensor"):
        daggc.compile(Calls(lambda w, x: x + no_tensor()))(x())
    unlearnable = daggc.opaque(lambda w, x: x if x.sum().item() > 0 else -x, name="unlearnable")
    with pytest.raises(CaptureError, match=r"unlearnable cannot be called on tensors without data.*out=lambda"):
        daggc.compile(Calls(unlearnable))(x())
    not_a_tensor = daggc.opaque(lambda w, x: {"a": x}, name="not_a_tensor")
    with pytest.raises(CaptureError, match="not_a_tensor must return a tensor or a tuple of tensors"):
        daggc.compile(Calls(not_a_tensor))(x())


def test_the_program_says_that_it_is_not_portable() -> None:
    assert not daggc.trace(Calls(on_data), (x(),)).portable
    assert daggc.trace(Calls(lambda w, x: w * x), (x(),)).portable
