"""torch.cond, while_loop, scan and map as IR ops with graphs inside: eager, torch code, interpreter and text agree."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cluster import processes
from torch import nn
from torch._higher_order_ops import associative_scan, cond, scan, while_loop
from torch._higher_order_ops.map import map as torch_map
from torch.utils.checkpoint import checkpoint

import daggc
from daggc.errors import CaptureError
from daggc.frontend.export import capture, weights_of
from daggc.ir.parser import parse
from daggc.ir.printer import print_program
from daggc.ir.serialize import from_json, to_json
from daggc.passes import SIMPLIFY
from daggc.passes.vjp import vjp

pytestmark = pytest.mark.timeout(120)


class Model(nn.Module):
    """A function of itself and its inputs, with two linear layers and a buffer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(8, 4)
        self.register_buffer("shift", torch.randn(4))
        self.drop = nn.Dropout(0.5)
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def x(*shape: int, sign: float = 1.0) -> torch.Tensor:
    return sign * torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + sign * 0.1


CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {}


def case(name: str, *inputs: torch.Tensor) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        CASES[name] = function, inputs
        return function

    return enter


def _branches(m: Any, x: torch.Tensor) -> Any:
    return cond(x.sum() > 0, lambda x: m.a(x).tanh(), lambda x: m.a(x) * torch.ones(4) + m.shift, (x,)) * 2


case("cond, true", x(3, 4))(_branches)
case("cond, false", x(3, 4, sign=-1))(_branches)


@case("cond in a cond, several results", x(3, 4))
def _(m: Any, x: torch.Tensor) -> Any:
    def then(x: torch.Tensor) -> Any:
        inner = cond(x.max() > 100, lambda x: x.sin(), lambda x: m.a(x), (x,))
        return inner * x, x.sum()

    y, total = cond((x > 0).all(), then, lambda x: (x.clone(), x.mean() * 3), (x,))
    return {"y": y, "total": total}


@case("cond with integers and detached parts", x(3, 4), torch.arange(3))
def _(m: Any, x: torch.Tensor, n: torch.Tensor) -> Any:
    return cond(n.sum() == 3, lambda x, n: (x.detach() * m.a(x), x * n[1]), lambda x, n: (x.exp(), x.clone()), (x, n))


@case("scan", x(5, 3, 4))
def _(m: Any, x: torch.Tensor) -> Any:
    def step(h: torch.Tensor, part: torch.Tensor) -> Any:
        h = torch.tanh(m.b(torch.cat([h, part], -1)))
        return h, h * 2

    return scan(step, torch.zeros(3, 4, dtype=x.dtype), x)


@case("scan that gives its carry, reversed, along another axis", x(3, 5, 4))
def _(m: Any, x: torch.Tensor) -> Any:
    def step(h: torch.Tensor, part: torch.Tensor) -> Any:
        h = torch.tanh(m.a(h) + part)
        return h, h.clone()

    return scan(step, x[:, 0] * 0.5, x, dim=1, reverse=True)


@case("scan of several with a count", x(4, 3), x(4, 2))
def _(m: Any, x: torch.Tensor, z: torch.Tensor) -> Any:
    def step(carry: Any, parts: Any) -> Any:
        n, h = carry
        a, c = parts
        h = h * a.sum() + c * m.shift[:2] * n
        return (n + 1, h), (h.sin(), h.cos())

    return scan(step, (torch.tensor(0.0), torch.ones(2, dtype=x.dtype)), (x, z))


@case("cond in a scan", x(4, 3) - 0.5)
def _(m: Any, x: torch.Tensor) -> Any:
    def step(h: torch.Tensor, part: torch.Tensor) -> Any:
        h = cond(part.sum() > 0, lambda h, p: h * p, lambda h, p: h + p * m.shift[:3], (h, part))
        return h, h.sum()

    return scan(step, torch.ones(3, dtype=x.dtype), x)


@case("map", x(5, 4))
def _(m: Any, x: torch.Tensor) -> Any:
    def function(row: torch.Tensor) -> Any:
        return m.a(row).relu() * m.shift

    return torch_map(function, x)


@case("associative_scan", x(5, 4))
def _(m: Any, x: torch.Tensor) -> Any:
    return associative_scan(lambda a, b: a * b, m.a(x), dim=0, combine_mode="generic")


@case("while_loop", x(4))
def _(m: Any, x: torch.Tensor) -> Any:
    def step(i: torch.Tensor, h: torch.Tensor) -> Any:
        return i + 1, torch.sin(m.a(h)) + h

    n, y = while_loop(lambda i, h: (i < 4) & (h.sum() < 1e9), step, (torch.tensor(0), x))
    return n, y


def _case(name: str) -> tuple[Model, tuple[torch.Tensor, ...]]:
    function, inputs = CASES[name]
    return Model(function).double(), inputs


def _leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(item)]


def _gradients(model: nn.Module, inputs: tuple[torch.Tensor, ...], **options: Any) -> list[torch.Tensor | None]:
    wrt = [*model.parameters(), *(x for x in inputs if x.requires_grad)]
    loss = torch.stack([(y * y).sum() for y in _leaves(model(*inputs)) if y.is_floating_point()]).sum()
    return list(torch.autograd.grad(loss, wrt, allow_unused=True, **options))


def _floats(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x.clone().requires_grad_(x.is_floating_point()) for x in inputs)


@pytest.mark.parametrize("name", CASES)
def test_equals_eager(name: str) -> None:
    model, inputs = _case(name)
    compiled = daggc.compile(copy.deepcopy(model))
    for got, wanted in zip(_leaves(compiled(*inputs)), _leaves(model(*inputs)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    gradients = (_gradients(m, _floats(inputs)) for m in (compiled, model))
    for got, wanted in zip(*gradients, strict=True):
        if got is None or wanted is None:  # of what no branch reads torch's own ops give zeros, or nothing
            assert not any(g is not None and g.any() for g in (got, wanted))
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"cond with integers and detached parts"}))  # no true slope
def test_second_derivatives(name: str) -> None:
    """Beside differences of first derivatives along a direction: torch has none of its own for most of these ops."""
    model, inputs = _case(name)
    compiled = daggc.compile(model)
    inputs = _floats(inputs)
    wrt = [*model.parameters(), *(x for x in inputs if x.requires_grad)]
    directions = [torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(7)) for p in wrt]
    first = _gradients(compiled, inputs, create_graph=True)
    along = torch.stack([(g * d).sum() for g, d in zip(first, directions, strict=True) if g is not None]).sum()
    second = torch.autograd.grad(along, wrt, allow_unused=True)
    got = sum(float((g * d).sum()) for g, d in zip(second, directions, strict=True) if g is not None)

    step = 1e-6
    slopes: list[float] = []
    for sign in (1, -2):  # there and, over the middle, to the other side
        with torch.no_grad():
            for p, d in zip(wrt, directions, strict=True):
                p.add_(d, alpha=sign * step)
        shifted = _gradients(compiled, inputs)
        slopes.append(sum(float((g * d).sum()) for g, d in zip(shifted, directions, strict=True) if g is not None))
    wanted = (slopes[0] - slopes[1]) / (2 * step)
    assert got == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_interpreter_agrees_and_text_and_json_give_the_program_back(name: str) -> None:
    model, inputs = _case(name)
    captured = capture(model, inputs)
    program = vjp(daggc.run_pipeline(captured.program, SIMPLIFY))
    assert any(op in print_program(program) for op in ("cond(", "scan(", "while_loop(")) or "associative" in name
    for stage in (captured.program, program):
        daggc.verify(stage)
        assert parse(print_program(stage)) == stage
        assert from_json(json.loads(json.dumps(to_json(stage)))) == stage
        assert [g.structure() for g in parse(print_program(stage)).graphs.values()] == [
            g.structure() for g in stage.graphs.values()
        ]
    arrays = {ref: tensor.detach().numpy() for ref, tensor in weights_of(model, captured).items()}
    arrays |= {f"input:{place}": tensor.numpy() for place, tensor in enumerate(inputs)}
    outputs = program.forward.outputs_of("output")
    by_ref = {f"cotangent:{port.ref}": y for port, y in zip(outputs, _leaves(model(*inputs)), strict=True)}
    arrays |= {port.ref: (2 * by_ref[port.ref]).detach().numpy() for port in program.backward.inputs_of("cotangent")}
    results = daggc.interpret(program, arrays)
    for port, wanted in zip(program.forward.outputs_of("output"), _leaves(model(*inputs)), strict=True):
        np.testing.assert_allclose(results[port.ref], wanted.detach().numpy(), rtol=1e-10, atol=1e-10)
    wanted = _gradients(model, _floats(inputs))
    named = [f"param:{n}" for n, _ in model.named_parameters()]
    named += [f"input:{place}" for place, tensor in enumerate(inputs) if tensor.is_floating_point()]
    for ref, gradient in zip(named, wanted, strict=True):
        if gradient is not None and f"grad:{ref}" in results:
            np.testing.assert_allclose(results[f"grad:{ref}"], gradient.numpy(), rtol=1e-9, atol=1e-9)


def test_dropout_in_a_branch_draws_the_mask_of_its_own_stream() -> None:
    def function(m: Any, x: torch.Tensor) -> Any:
        y = m.drop(x)
        return y, cond(x.sum() > 0, lambda x: m.drop(x), lambda x: x.clone(), (x,))

    compiled = daggc.compile(Model(function).double())
    inputs = x(50, 4).requires_grad_()
    first, second = compiled(inputs)
    assert not torch.equal(first == 0, second == 0)
    (gradient,) = torch.autograd.grad(second.sum(), inputs)
    assert torch.equal(gradient == 0, second == 0)  # made again in the backward, from the same key


def test_random_numbers_in_a_loop_are_refused() -> None:
    def function(m: Any, x: torch.Tensor) -> Any:
        return scan(lambda h, part: (m.drop(h + part), h.clone()), x[0].clone(), x)

    with pytest.raises(CaptureError, match=r"random numbers inside a scan.*draw them before it"):
        daggc.trace(Model(function).double(), (x(5, 4),))


def test_a_step_trains_through_a_branch_and_a_scan() -> None:
    def function(m: Any, x: torch.Tensor) -> Any:
        h = CASES["scan"][0](m, x)[0]
        return cond(h.sum() > 0, lambda h: m.a(h).tanh(), lambda h: m.a(h), (h,))

    losses: list[list[float]] = []
    models = [Model(function).double(), Model(function).double()]
    target = torch.ones(3, 4, dtype=torch.float64)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
    step = daggc.compile(models[0]).train_step(nn.functional.mse_loss, optimizers[0])
    losses.append([float(step(x(5, 3, 4), target)) for _ in range(3)])
    losses.append([])
    for _ in range(3):
        optimizers[1].zero_grad()
        loss = nn.functional.mse_loss(models[1](x(5, 3, 4)), target)
        loss.backward()
        optimizers[1].step()
        losses[1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    step.sync()
    for got, wanted in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_on_workers() -> None:
    """Branches and loops travel inside their tasks."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.parts = nn.ModuleList([Model(CASES["scan"][0]), Model(CASES["cond, true"][0]), Model(_kept)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h, _ = self.parts[0](x)
            return self.parts[2](self.parts[1](h))

    def _kept(m: Any, x: torch.Tensor) -> Any:
        return checkpoint(m.a, x, use_reentrant=False).exp()

    model = Deep().double()
    inputs = x(5, 3, 4)
    wanted = [model(inputs), *_gradients(model, (inputs,))]
    with processes(2) as client:
        compiled = daggc.compile(model, client=client, stages=2)
        got = [compiled(inputs), *_gradients(compiled, (inputs,))]
        assert compiled.plan is not None
        assert len(compiled.plan.shares()) == 2
    for mine, theirs in zip(got, wanted, strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
