"""What a call leaves behind beside its result: written arguments, tensors kept in attributes; as in eager."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import daggc
from daggc.errors import CaptureError, RunError

pytestmark = pytest.mark.timeout(60)


class Model(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, 4)
        self.seen: Any = None
        self.count = torch.zeros((), dtype=torch.int64)
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def x() -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


# --- arguments ----------------------------------------------------------------------------------------


def _add(m: Any, x: torch.Tensor) -> Any:
    y = x.sum(-1, keepdim=True)
    x.add_(1)
    return m.a(x) * y


def _slice(m: Any, x: torch.Tensor) -> Any:
    x[:, 0] = 0
    x.t()[1].mul_(m.a.bias[0])
    return m.a(x)


def _copy(m: Any, x: torch.Tensor) -> Any:
    return x.copy_(m.a(x.clone())), x.view(-1).sum()


def _normalize(m: Any, x: torch.Tensor) -> Any:
    with torch.no_grad():
        x.sub_(x.mean())
    return m.a(x)


WRITES = {"add_": _add, "slices and views": _slice, "copy_": _copy}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_to_an_argument_arrives(name: str) -> None:
    model = Model(WRITES[name])
    compiled = daggc.compile(copy.deepcopy(model))
    runs: list[list[torch.Tensor]] = []
    for call in (compiled, model):
        root = x().requires_grad_()
        given = root * 1.0
        result = call(given)
        result = result if isinstance(result, tuple) else (result,)
        loss = sum(r.sum() for r in result) + (given * given).sum()
        gradients = torch.autograd.grad(loss, [root, call.a.weight, call.a.bias], allow_unused=True)
        runs.append([given, *result, *(g if g is not None else torch.zeros(()) for g in gradients)])
    for got, wanted in zip(*runs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        assert got.requires_grad == wanted.requires_grad
    if name == "copy_":
        with torch.no_grad():
            given = x()
            assert compiled(given)[0] is given  # as eager's


def test_without_gradients() -> None:
    with torch.no_grad():
        for function in (*WRITES.values(), _normalize):
            model = Model(function)
            compiled = daggc.compile(model)
            first, second = x(), x()
            for _ in range(2):
                got, wanted = compiled(first), model(second)
                torch.testing.assert_close(got, wanted)
            assert torch.equal(first, second)


def test_a_write_without_gradients_to_what_has_one_is_refused() -> None:
    compiled = daggc.compile(Model(_normalize))
    compiled(x())
    with pytest.raises(CaptureError, match=r"under torch.no_grad\(\), to a tensor that has a gradient"):
        compiled(x().requires_grad_() * 1)


def test_a_leaf_that_requires_gradients_is_refused_as_in_eager() -> None:
    with pytest.raises(CaptureError, match="leaf Variable that requires grad"):
        daggc.compile(Model(_add))(x().requires_grad_())


def test_arguments_that_share_memory_are_refused() -> None:
    def function(m: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
        x.add_(1)
        return m.a(y)

    given = x()
    compiled = daggc.compile(Model(function))
    with torch.no_grad():
        compiled(given, given.clone())
        with pytest.raises(RunError, match="share memory"):
            compiled(given, given[:])


# --- attributes ---------------------------------------------------------------------------------------


def _map(m: Any, x: torch.Tensor) -> Any:
    m.seen = F.softmax(m.a(x), -1)
    return m.seen @ m.a.weight


def _several(m: Any, x: torch.Tensor) -> Any:
    m.seen = {"logits": m.a(x), "parts": [x * 2, x.argmax(-1)], "note": "two"}
    m.last = x.shape[0]
    return m.a(x)


@pytest.mark.parametrize("function", [_map, _several])
def test_tensors_kept_in_attributes(function: Callable[..., Any]) -> None:
    model = Model(function)
    compiled = daggc.compile(copy.deepcopy(model))
    runs: list[Any] = []
    for call in (compiled, model):
        for scale in (1, 2):
            result = call(x() * scale)
        left: Any = call.seen
        seen, others = (left["logits"], left["parts"]) if isinstance(left, dict) else (left, [])
        gradients = torch.autograd.grad(result.sum() + (seen * seen).sum(), list(call.parameters()))
        runs.append([result, seen, *others, *gradients])
    for got, wanted in zip(*runs, strict=True):
        torch.testing.assert_close(got, wanted)
        assert got.requires_grad == wanted.requires_grad
    if function is _several:
        assert compiled.seen["note"] == "two"
        assert compiled.model.last == 3


def test_what_a_later_call_reads_is_refused() -> None:
    def counts(m: Any, x: torch.Tensor) -> Any:
        m.count = m.count + 1
        return m.a(x)

    def caches(m: Any, x: torch.Tensor) -> Any:
        if m.seen is None:
            m.seen = torch.ones(20, 4)
        return m.a(x) * m.seen[:3]

    for function, name in ((counts, "count"), (caches, "seen")):
        model = Model(function)
        with pytest.raises(CaptureError, match=f"reads the tensor that an earlier call left in the attribute '{name}'"):
            daggc.compile(model)(x())
        assert model.seen is None
        assert model.count == 0
    cached = Model(caches)
    cached(x())  # as the message says
    assert torch.equal(daggc.compile(cached)(x()), cached(x()))


def test_a_training_step_refuses_what_it_would_not_leave_behind() -> None:
    for function, what in ((_map, "an attribute"), (_add, "an argument")):
        model = Model(function)
        step = daggc.compile(model).train_step(F.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.raises(CaptureError, match=f"leaves a tensor in {what}"):
            step(x(), x())


def test_a_lazy_call_refuses_to_write_to_an_argument() -> None:
    with pytest.raises(RunError, match="writes to its argument '0', which a lazy call would not"):
        daggc.compile(Model(_add)).lazy(x())
