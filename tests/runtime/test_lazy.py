"""Lazy results and pullbacks as Dask collections, with a client and without one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import dask
import pytest
import torch
import torch.nn.functional as F
from distributed import Client
from torch import nn

import daggc
from daggc.errors import DifferentiationError, RunError
from daggc.runtime.thunk import Thunk

pytestmark = pytest.mark.timeout(120)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor, index: torch.Tensor | None = None) -> dict[str, Any]:
        hidden = torch.tanh(self.second(F.gelu(self.first(x))))
        return {"y": self.third(hidden), "hidden": hidden, "none": None}


def x() -> torch.Tensor:
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["here", "workers"])
def place(request: pytest.FixtureRequest) -> Callable[[nn.Module], Any]:
    if request.param == "here":
        return daggc.compile
    client: Client = request.getfixturevalue("two_workers")
    return lambda model: daggc.compile(model, client=client)


def close(mine: Any, theirs: Any) -> None:
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_compute_gives_what_a_call_gives(place: Callable[..., Any]) -> None:
    model = Model().double()
    thunk = place(model).lazy(x())
    assert isinstance(thunk, Thunk)
    assert dask.is_dask_collection(thunk)
    result = thunk.compute()
    assert list(result) == ["y", "hidden", "none"]
    assert result["none"] is None
    expected = model(x())
    close([result["y"], result["hidden"]], [expected["y"].detach(), expected["hidden"].detach()])


def test_several_thunks_at_once_and_persist(place: Callable[..., Any], request: pytest.FixtureRequest) -> None:
    model = Model().double()
    compiled = place(model)
    first, second = compiled.lazy(x()), compiled.lazy(2 * x())
    with _scheduler(compiled):
        one, two = dask.compute(first, second)
        kept = first.persist()
        again = dask.compute(kept)[0]
    close([one["y"], two["y"], again["y"]], [y.detach() for y in (model(x())["y"], model(2 * x())["y"], one["y"])])


def _scheduler(compiled: Any) -> Any:
    """``dask.compute`` uses the default scheduler: make it the pool's client, as users have it."""
    return compiled._pool.client.as_current() if compiled._pool else dask.config.set(scheduler="threads")


def test_a_thunk_outlives_its_module_and_parameters(place: Callable[..., Any]) -> None:
    model = Model().double()
    expected = model(x())["y"].detach()
    compiled = place(model)
    thunk = compiled.lazy(x())
    with torch.no_grad():
        model.first.weight.add_(1)
    compiled(x())
    del compiled
    gc.collect()
    close(thunk.compute()["y"], expected)


def test_pullback_gives_thunks_of_eager_gradients(place: Callable[..., Any]) -> None:
    model = Model().double()
    compiled = place(model)
    result, pullback = compiled.vjp(x())
    cotangent = {"y": torch.ones(5, 2, dtype=torch.float64), "hidden": None, "none": None}
    parameters, inputs = pullback(cotangent)
    assert set(parameters) == {name for name, _ in model.named_parameters()}
    assert all(isinstance(thunk, Thunk) for thunk in parameters.values())
    given = x().requires_grad_()
    expected = model(given)["y"]
    expected.sum().backward()
    close(result.compute()["y"], expected.detach())
    for name, parameter in model.named_parameters():
        close(parameters[name].compute(), parameter.grad)
    (thunk,) = inputs
    assert thunk is not None
    close(thunk.compute(), given.grad)
    with _scheduler(compiled):
        together = dask.compute(result, parameters, thunk)
    close(together[1]["third.bias"], model.third.bias.grad)
    close(together[2], given.grad)


def test_pullback_twice_with_other_cotangents(place: Callable[..., Any]) -> None:
    model = Model().double()
    _, pullback = place(model).vjp(x())
    for scale in (1.0, -2.0):
        weights = torch.full((5, 16), scale, dtype=torch.float64)
        parameters, _ = pullback({"y": None, "hidden": weights, "none": None})
        expected = torch.autograd.grad((model(x())["hidden"] * weights).sum(), model.second.weight)[0]
        close(parameters["second.weight"].compute(), expected)


def test_integer_inputs_have_no_gradient(place: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)).double()
    ids = torch.tensor([[1, 2], [3, 3]])
    result, pullback = place(model).vjp(ids)
    parameters, inputs = pullback(torch.ones(2, 2, 3, dtype=torch.float64))
    assert inputs == (None,)
    expected = torch.autograd.grad(model(ids).sum(), model[0].weight)[0]
    close(parameters["0.weight"].compute(), expected)
    close(result.compute(), model(ids).detach())


def test_a_wrong_cotangent_is_refused() -> None:
    _, pullback = daggc.compile(Model().double()).vjp(x())
    with pytest.raises(RunError, match="the result is a dict of 3: its cotangent is one too"):
        pullback(torch.ones(5, 2))
    with pytest.raises(RunError, match="the result has no z; it has y, hidden, none"):
        pullback({"z": torch.ones(5, 2)})
    with pytest.raises(RunError, match=r"must be a f64\[5,2\], got a f32\[5,2\]"):
        pullback({"y": torch.ones(5, 2)})


def test_nothing_to_differentiate() -> None:
    class Integers(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return ids + 1

    with pytest.raises(DifferentiationError, match="no result of the model depends differentiably"):
        daggc.compile(Integers()).vjp(torch.arange(3))


def test_a_lazy_call_freezes_its_inputs(place: Callable[..., Any]) -> None:
    """Values are those of the moment of the call, as for submitted steps."""
    model, given = Model().double(), x()
    thunk = place(model).lazy(given)
    expected = model(given)["y"].detach()
    given.zero_()
    with torch.no_grad():
        model.first.weight.zero_()
    close(thunk.compute()["y"], expected)
