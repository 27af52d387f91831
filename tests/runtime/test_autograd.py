"""The compiled module in torch's autograd: graphs kept and freed, higher derivatives, optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import Client
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import daggc

pytestmark = pytest.mark.timeout(200)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 2)).double()


def x() -> torch.Tensor:
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["here", "workers"])
def place(request: pytest.FixtureRequest) -> Callable[[nn.Module], Any]:
    """``daggc.compile`` for this process, or for two workers."""
    if request.param == "here":
        return daggc.compile
    client: Client = request.getfixturevalue("two_workers")
    return lambda model: daggc.compile(model, client=client)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def close(mine: Any, theirs: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


def test_retained_graph_gives_the_gradients_again(place: Callable[..., Any]) -> None:
    model = mlp()
    eager = copy.deepcopy(model)
    loss = place(model)(x()).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    theirs = eager(x()).square().sum()
    theirs.backward(retain_graph=True)
    theirs.backward()
    close(gradients(model), gradients(eager))


def test_a_second_backward_without_retaining_fails_as_in_eager(place: Callable[..., Any]) -> None:
    loss = place(mlp())(x()).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_parameter_changed_before_backward_fails_as_in_eager(place: Callable[..., Any]) -> None:
    model = mlp()
    loss = place(model)(x()).square().sum()
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_input_changed_before_backward_fails_as_in_eager() -> None:
    given = x()
    loss = daggc.compile(mlp())(given).square().sum()
    given.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_forwards_then_two_backwards(place: Callable[..., Any]) -> None:
    model = mlp()
    eager, compiled = copy.deepcopy(model), place(model)
    (compiled(x()).sum() + compiled(2 * x()).square().sum()).backward()
    (eager(x()).sum() + eager(2 * x()).square().sum()).backward()
    close(gradients(model), gradients(eager))


def test_a_part_of_the_outputs_is_enough() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, given: torch.Tensor) -> Any:
            return self.a(given), self.b(given)

    model = Two().double()
    daggc.compile(model)(x())[0].sum().backward()
    eager = copy.deepcopy(model)
    eager.zero_grad()
    eager(x())[0].sum().backward()
    close(model.a.weight.grad, eager.a.weight.grad)


def test_chained_with_other_torch_code_and_itself() -> None:
    first, second = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    compiled = daggc.compile(first)
    (mine,) = torch.autograd.grad(second(compiled(compiled(x().tanh()))).sum(), first.weight)
    (theirs,) = torch.autograd.grad(second(first(first(x().tanh()))).sum(), first.weight)
    close(mine, theirs)


class GPT(nn.Module):
    """One small block with causal attention, embeddings and a loss."""

    def __init__(self, vocabulary: int = 11, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(6, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads = heads

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        b, t, c = h.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(h)).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(a.transpose(1, 2).reshape(b, t, c))
        h = h + self.down(F.gelu(self.up(self.norm2(h))))
        logits = h @ self.embed.weight.T
        return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def gpt() -> tuple[GPT, torch.Tensor]:
    torch.manual_seed(1)
    return GPT().double(), torch.randint(0, 11, (2, 6))


def hessian_vector_product(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    vectors = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
    along = sum((g * v).sum() for g, v in zip(first, vectors, strict=True))
    return list(torch.autograd.grad(along, parameters))


def test_hessian_vector_products_of_a_gpt(place: Callable[..., Any]) -> None:
    model, ids = gpt()
    mine = hessian_vector_product(model, place(model)(ids))
    with sdpa_kernel(SDPBackend.MATH):
        theirs = hessian_vector_product(model, model(ids))
    scale = sum(float(t.norm()) ** 2 for t in theirs) ** 0.5
    for name, (a, b) in zip(dict(model.named_parameters()), zip(mine, theirs, strict=True), strict=True):
        assert float((a - b).norm()) <= 1e-10 * max(float(b.norm()), 1e-6 * scale), name


def test_third_derivative() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    compiled = daggc.compile(model)

    def third(function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        given = torch.linspace(-1, 1, 3, dtype=torch.float64).view(1, 3).requires_grad_()
        y = function(given).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(y, given, create_graph=True)
            y = grad.sum()
        return grad.detach()

    close(third(compiled), third(model))


def test_gradient_penalty_with_an_input_gradient() -> None:
    model = mlp()
    eager = copy.deepcopy(model)

    def penalty(function: Any) -> None:
        given = x().requires_grad_()
        (grad,) = torch.autograd.grad(function(given).sum(), given, create_graph=True)
        (grad.square().sum() + function(given).mean()).backward()

    penalty(daggc.compile(model))
    penalty(eager)
    close(gradients(model), gradients(eager))


def test_vjp_twice_through_the_interpreter() -> None:
    model, ids = gpt()
    captured = daggc.capture(model, (ids,))
    twice = daggc.vjp(daggc.vjp(captured.program))
    inputs = {port: tensor.detach().numpy() for port, tensor in daggc.weights_of(model, captured).items()}
    inputs |= {port.ref: ids.numpy() for port in captured.program.forward.inputs_of("input")}
    generator = torch.Generator().manual_seed(2)
    vectors = {
        f"param:{name}": torch.randn(p.shape, dtype=p.dtype, generator=generator)
        for name, p in model.named_parameters()
    }
    cotangents = {}
    for graph in (twice.forward, twice.backward):
        for port in graph.inputs_of("cotangent"):
            if "grad" not in port.ref:  # of the loss: one for the first derivative, none for the value
                cotangents[port.ref] = torch.ones(()).double() if port.ref[-1] != "'" else torch.zeros(()).double()
            else:
                (target,) = [ref for ref in vectors if ref in port.ref]
                cotangents[port.ref] = vectors[target]
    results = daggc.interpret(twice, inputs | {ref: ct.numpy() for ref, ct in cotangents.items()})
    with sdpa_kernel(SDPBackend.MATH):
        theirs = hessian_vector_product(model, model(ids))
    for name, wanted in zip(dict(model.named_parameters()), theirs, strict=True):
        got = results[f"grad:param:{name}'"]  # without the prime: the first derivative
        close(torch.from_numpy(got), wanted, 1e-9)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_trains_as_with_eager(place: Callable[..., Any], name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
    eager = copy.deepcopy(model)
    losses: list[list[float]] = []
    for module, function in ((model, place(model)), (eager, eager)):
        optimizer = OPTIMIZERS[name](module.parameters())

        def closure(function: Any = function, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (function(x()) - x()[:, :2]).square().sum()
            loss.backward()
            return loss

        losses.append([optimizer.step(closure).item() for _ in range(4)])
    close(losses[0], losses[1], 1e-9)
    for (key, mine), theirs in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9, msg=key)


def test_writes_through_data_reach_the_workers(two_workers: Client) -> None:
    model = mlp()
    compiled = daggc.compile(model, client=two_workers)
    compiled(x())
    model[0].weight.data.mul_(3)  # the version counter does not see this
    close(compiled(x()), model(x()))
    model[2].weight.data[[0, 1]] = model[2].weight.data[[1, 0]]
    close(compiled(x()), model(x()))


def test_a_replaced_parameter_reaches_the_workers(two_workers: Client) -> None:
    model = mlp()
    compiled = daggc.compile(model, client=two_workers)
    for value in (0.1, 0.2, 0.3, 0.4):
        model[0].weight = nn.Parameter(torch.full((8, 4), value, dtype=torch.float64))
        close(compiled(x()), model(x()))


def test_two_compiled_models_of_equal_programs_do_not_disturb_each_other(two_workers: Client) -> None:
    first, second = mlp(), mlp()
    one, two = daggc.compile(first, client=two_workers), daggc.compile(second, client=two_workers)
    one(x())
    two(x())
    del one
    close(two(x()), second(x()))
    two(x()).sum().backward()


def test_runs_are_bitwise_equal(place: Callable[..., Any]) -> None:
    model, ids = gpt()
    compiled = place(model)
    runs = [[t.clone() for t in torch.autograd.grad(compiled(ids), list(model.parameters()))] for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
