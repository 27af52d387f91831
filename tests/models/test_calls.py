"""What a call of a compiled model sees and leaves beside its numbers: strides, grad mode, attributes, shared memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_adversarial import Model, x
from torch import nn

import daggc
from daggc.errors import RunError

pytestmark = pytest.mark.timeout(60)


def alike(got: Any, wanted: Any) -> None:
    if wanted is None or got is None:
        assert got is wanted
    else:
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def twins(function: Callable[..., Any]) -> tuple[nn.Module, nn.Module]:
    eager = Model(function).double()
    return daggc.compile(copy.deepcopy(eager)), eager


@pytest.mark.parametrize("asked", ["contiguous", "stride", "written through reshape"])
def test_strides_of_an_input_decide(asked: str) -> None:
    def forward(m: Any, x: Any) -> Any:
        if asked == "contiguous":
            return x * m.w if x.is_contiguous() else x @ m.W
        if asked == "stride":
            return x * m.w * x.stride(0)
        y = x * 1
        y.reshape(-1)[0] = 5
        return y * m.w

    compiled, eager = twins(forward)
    for given in (x(4, 4).double(), x(4, 4).double().t(), x(4, 4).double()):
        alike(compiled(given), eager(given))


def test_python_sees_whether_gradients_are_on() -> None:
    def forward(m: Any, x: Any) -> Any:
        y = x * m.w
        return (y if y.requires_grad else y * 2), (y if torch.is_grad_enabled() else y * 3), y if x.requires_grad else x

    compiled, eager = twins(forward)
    for wanted in (True, False):
        given = x().double().requires_grad_(wanted)
        alike(compiled(given), eager(given))
        with torch.no_grad():
            alike(compiled(given), eager(given))


def test_pythons_max_chooses_one() -> None:
    compiled, eager = twins(lambda m, x: max((x * m.w).sum() * 0, (x @ m.W).sum() * 0) * 1)  # the first of equal ones
    for model in (compiled, eager):
        model(x().double()).backward()
    alike(compiled.w.grad, eager.w.grad)
    alike(compiled.W.grad, eager.W.grad)


def test_parameters_of_unused_results_have_no_gradient() -> None:
    compiled, eager = twins(lambda m, x: (x * m.w, x @ m.W))
    for model in (compiled, eager):
        model(x().double())[0].sum().backward()
    alike(compiled.w.grad, eager.w.grad)
    assert compiled.W.grad is None and eager.W.grad is None


def test_an_attribute_follows_the_branch() -> None:
    def forward(m: Any, x: Any) -> Any:
        m.flag = bool(x.sum() > 0)
        m.kind = ("a",) if m.flag else ("b",)
        return x * m.w

    compiled, eager = twins(forward)
    for sign in (1, -1, 1, 1, -1, 1):
        given = sign * x().double().abs()
        alike(compiled(given), eager(given))
        assert (compiled.flag, compiled.kind) == (eager.flag, eager.kind)


@pytest.mark.parametrize("gradients", [True, False])
def test_results_share_memory_only_where_eagers_do(gradients: bool) -> None:
    def forward(m: Any, x: Any) -> Any:
        m.copied = x.clone()
        y = x * m.w
        return x.clone(), x * 1, x.view(-1), x, m.w.clone(), m.buf.clone(), y, y.detach().clone()

    compiled, eager = twins(forward)
    seen = []
    for model in (compiled, eager):
        given = x().double()
        with torch.set_grad_enabled(gradients):
            results = model(given)
        with torch.no_grad():
            for tensor in (given, *model.parameters(), *model.buffers(), results[6]):
                tensor.add_(1)
        seen.append((*results, model.copied))
    for got, wanted in zip(*seen, strict=True):
        alike(got, wanted)


def test_results_of_a_written_input_are_apart() -> None:
    compiled, eager = twins(lambda m, x: (x.add_(1), x.clone(), m.buf.add_(1)))
    for model in (compiled, eager):
        given = x().double()
        first, second = model(given), model(given)
        assert first[0] is given and second[0] is given
        alike(first[1] + 1, second[1])
        alike(first[2], second[2])


def test_a_written_buffer_is_no_argument() -> None:
    compiled, _ = twins(lambda m, x: (m.buf.add_(1), x * m.w))
    compiled(x(4).double())
    with pytest.raises(RunError, match="share memory"):
        compiled(compiled.buf)
