"""Small models with something awkward in each: equal to eager PyTorch in every respect, or refused with a reason.

A case is called twice, in f64. Compared are results, which of them need gradients, gradients of parameters and inputs,
buffers, and the plain attributes of modules.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

import daggc
from daggc.errors import CaptureError

pytestmark = pytest.mark.timeout(60)

EQUAL: dict[str, Case] = {}
REFUSED: dict[str, tuple[str, Case]] = {}
INF = float("inf")


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...]


class Model(nn.Module):
    """A function of itself and its inputs, with parameters and buffers."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.w = nn.Parameter(torch.randn(4, generator=generator))
        self.W = nn.Parameter(torch.randn(4, 4, generator=generator))
        self.register_buffer("buf", torch.randn(4, generator=generator))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.function = function
        self.calls = 0

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def x(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*(shape or (3, 4)), generator=torch.Generator().manual_seed(seed))


def equal(name: str, *inputs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        EQUAL[name] = Case(lambda: Model(function), inputs or (x(),))
        return function

    return enter


def refused(name: str, reason: str, *inputs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        REFUSED[name] = reason, Case(lambda: Model(function), inputs or (x(),))
        return function

    return enter


# What is written in place, and buffers


@equal("writes to slices and views")
def _(m: Any, x: Any) -> Any:
    y = x * m.w
    y[:, 1] = m.w[1]
    y.view(-1)[2:5].add_(3)
    y.t()[1] *= 5
    z = x.clone()
    v = z[:, :2]
    v += m.w[:2]
    z[:, 2:] = v * 2
    return y, F.relu_(y * 1), z, v


@equal("fill_diagonal")
def _(m: Any, x: Any) -> Any:
    return x @ (m.W * 1.0).fill_diagonal_(2.0)


@equal("as_strided", x(12))
def _(m: Any, x: Any) -> Any:
    return x.as_strided((5, 4), (1, 1), 1) * m.w


@equal("buffer assigned")
def _(m: Any, x: Any) -> Any:
    m.buf = 0.9 * m.buf + 0.1 * x.detach().mean(0)
    return x * m.w + m.buf


@equal("slices of a buffer written without gradient")
def _(m: Any, x: Any) -> Any:
    with torch.no_grad():
        m.buf[0] = x[0, 0]
        m.buf[1:3].add_(x[0, 1:3])
    m.count += 1
    return x * m.w + m.buf, m.count * 1


@equal("a constant filled without gradient")
def _(m: Any, x: Any) -> Any:
    d = torch.zeros(3, 4, dtype=x.dtype)
    with torch.no_grad():
        d[0] = x[0]
    return d * m.w + x


# Gradients


@equal("straight through")
def _(m: Any, x: Any) -> Any:
    y = x * m.w
    return y + (y.round() - y).detach()


@equal("gradients inside")
def _(m: Any, x: Any) -> Any:
    given = x if x.requires_grad else x.detach().requires_grad_()
    return torch.autograd.grad((given * m.w).pow(3).sum(), given, create_graph=True)[0]


@equal("nan in the branch not taken")
def _(m: Any, x: Any) -> Any:
    return torch.where(x > 0, torch.sqrt(x * m.w.abs()), torch.zeros_like(x))


@equal("remainder of tensors")
def _(m: Any, x: Any) -> Any:
    return x % m.w, torch.fmod(x, m.w), x % 0.7


@equal("zero to the power of a tensor", torch.tensor([0.0, 1.0, 0.0, 2.0]))
def _(m: Any, x: Any) -> Any:
    return torch.pow(0.0, x) * m.w, torch.pow(2.0, x * m.w)


@equal("kinks", torch.tensor([[1.0, 1.0, 0.0, 1.0], [2.0, 2.0, 2.0, -2.0]]))
def _(m: Any, x: Any) -> Any:
    return (
        x.max(),
        x.amax(1),
        x.max(1)[0],
        x.clamp(0, 1) * m.w,
        x.clamp(1, 0),
        x.abs(),
        x.prod(1),
        x**0,
        x**2,
        F.relu6(x),
    )


@equal("complex numbers", x(2, 6, 4))
def _(m: Any, x: Any) -> Any:
    z = torch.view_as_complex(x.reshape(2, 6, 2, 2))
    angles = torch.arange(12, dtype=x.dtype).view(6, 2)
    turned = torch.view_as_real(z * torch.polar(torch.ones_like(angles), angles)).flatten(2)
    return turned * m.w, (z * z.conj()).abs(), torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(m.w)).real


@equal("masks of minus infinity")
def _(m: Any, x: Any) -> Any:
    scores = (x @ m.W).masked_fill(torch.tensor([0, 1, 0, 1]).bool(), -INF)
    return scores.softmax(-1), scores.log_softmax(-1)[:, ::2]


# Numbers


@equal("division of integers", torch.tensor([-7, 7, -1, 0]), torch.tensor([2, -2, 3, -5]))
def _(m: Any, a: Any, b: Any) -> Any:
    return (
        a // b,
        a % b,
        torch.fmod(a, b),
        a / b,
        a % -3,
        5 // b,
        5 % b,
        torch.div(a, 2, rounding_mode="trunc"),
        m.w * 1,
    )


@equal("promotion", x(), torch.tensor([[1, 2, 3, 0]] * 3), torch.tensor(3), torch.tensor(2.5, dtype=torch.float32))
def _(m: Any, x: Any, k: Any, s: Any, d: Any) -> Any:
    return (
        x * k,
        k / 2,
        k + True,
        x * s,
        x * d,
        k * d,
        (x > 0) * m.w,
        k**2,
        2**k,
        -k,
        k << 1,
        torch.where(x > 0, k, 2.5),
    )


# Results


@equal("results of torch's own types")
def _(m: Any, x: Any) -> Any:
    y = x * m.w
    return torch.max(y, 1), torch.topk(x, 2), x.shape, x.dtype, y, y, x, m.w, m.W.t(), None, 3


class Sizes(nn.Module):
    """Sets attributes to the same plain values at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))
        self.height: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.height, self.size = x.shape[0], x.shape
        return x * self.w * self.height


EQUAL["attributes that every call sets alike"] = Case(Sizes, (x(),))
for _name in ("LSTM", "GRU", "RNN"):
    EQUAL[_name] = Case(
        lambda name=_name: getattr(nn, name)(4, 3, 2, batch_first=True, bidirectional=True), (x(2, 5, 4),)
    )
EQUAL["old spectral norm"] = Case(lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), (x(),))
EQUAL["multi-head attention"] = Case(lambda: Attends(), (x(2, 5, 4),))
EQUAL["encoder layer"] = Case(lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), (x(2, 5, 4),))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        mask = torch.tensor([[0, 0, 0, 1, 1], [0] * 5]).bool()
        return self.attention(x, x, x, key_padding_mask=mask, average_attn_weights=False)


class Shared(Function):
    """Two results, one of which is not used; numbers as arguments."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, k: float) -> Any:
        ctx.k = k
        ctx.set_materialize_grads(False)
        return x * k, x + k

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        first, second = cotangents
        return first * 10 + (second * 100 if second is not None else 0), None


@equal("a function with a result unused")
def _(m: Any, x: Any) -> Any:
    return Shared.apply(x * m.w, 2.0)[0]


@equal("tensor kept")
def _(m: Any, x: Any) -> Any:
    m.cache = x * m.w
    return m.cache * 2


# Refused


@refused("tensor kept and read", "reads the tensor that an earlier call left in the attribute 'cache'")
def _(m: Any, x: Any) -> Any:
    m.cache = x * m.w + getattr(m, "cache", 0)
    return m.cache * 2


@refused("counter", "attribute 'calls' .*make it a buffer")
def _(m: Any, x: Any) -> Any:
    m.calls += 1
    return x * m.w * m.calls


@refused("buffer registered in forward", "create them in __init__")
def _(m: Any, x: Any) -> Any:
    m.register_buffer("late", torch.ones(4))
    return x * m.w


@refused("buffer with a gradient", "detach it: buffer 'buf'")
def _(m: Any, x: Any) -> Any:
    m.buf = m.buf + (x * m.w).mean(0)
    return x * m.buf


@refused("hook on a tensor", "hook on a tensor.*autograd.Function")
def _(m: Any, x: Any) -> Any:
    y = x * m.w
    y.register_hook(lambda g: g * 2)
    return y


@refused("backward inside", r"calls backward\(\)")
def _(m: Any, x: Any) -> Any:
    (x * m.w).sum().backward()
    return x


@refused("write without gradient to what has one", "under torch.no_grad")
def _(m: Any, x: Any) -> Any:
    y = x * m.w
    with torch.no_grad():
        y[0] = 0
    return y


@refused("data of a parameter", "uses the .data of a tensor")
def _(m: Any, x: Any) -> Any:
    m.w.data.mul_(0.9)
    return x * m.w


@refused("inference mode", "use torch.no_grad instead")
def _(m: Any, x: Any) -> Any:
    with torch.inference_mode():
        y = x * 2
    return y + m.w


@refused("seeds", "seeds torch's generator")
def _(m: Any, x: Any) -> Any:
    torch.manual_seed(3)
    return x * m.w * torch.rand(4)


@refused("own generator", "torch.Generator")
def _(m: Any, x: Any) -> Any:
    return x * m.w * torch.rand(4, generator=torch.Generator().manual_seed(1))


@refused("float returned", "takes a float out of a tensor")
def _(m: Any, x: Any) -> Any:
    return x * m.w, m.w.sum().item()


@refused("argument changed", "copy it first", {"a": x()})
def _(m: Any, given: Any) -> Any:
    given["b"] = given["a"] * m.w
    return given["b"]


@refused("as_strided out of order", "not contiguous", x(4, 3).t())
def _(m: Any, x: Any) -> Any:
    return x.as_strided((2, 4), (4, 1)) * m.w


class OnlyFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))
        self.first = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.w * (2 if self.first else 1)
        self.first = False
        return y


REFUSED["another first call"] = "call the model once before it is compiled", Case(OnlyFirst, (x(),))
REFUSED["max_norm"] = "max_norm", Case(lambda: nn.Embedding(6, 3, max_norm=0.5), (torch.tensor([1, 2]),))


def doubled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: doubled(item) for key, item in value.items()}
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_()


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        yield type(value)
        for item in value:
            yield from leaves(item)
    else:
        yield value


def observe(model: nn.Module, call: Callable[..., Any], case: Case) -> list[Any]:
    """All that can be seen of two calls and their gradients."""
    seen: list[Any] = []
    inputs = [doubled(value) for value in case.inputs]
    for _ in range(2):
        results = list(leaves(call(*inputs)))
        generator = torch.Generator().manual_seed(1)
        loss = torch.zeros((), dtype=torch.float64)
        for result in results:
            if isinstance(result, torch.Tensor):
                weight = torch.randn(result.shape, generator=generator, dtype=torch.float64)
                loss = loss + (result * weight).sum() if result.requires_grad else loss
                seen.append(result.requires_grad)
                result = result.detach().clone()
            seen.append(result)
        wrt = [value for value in (*inputs, *model.parameters()) if getattr(value, "requires_grad", False)]
        if loss.requires_grad:
            seen += torch.autograd.grad(loss, wrt, allow_unused=True)
        seen += [buffer.clone() for buffer in model.buffers()]
        plain = (bool, int, float, tuple)
        seen += [(k, v) for module in model.modules() for k, v in vars(module).items() if isinstance(v, plain)]
    return seen


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", EQUAL)
def test_equals_eager(name: str, training: bool) -> None:
    model = EQUAL[name].make().double().train(training)
    eager = copy.deepcopy(model)
    got, wanted = observe(model, daggc.compile(model), EQUAL[name]), observe(eager, eager, EQUAL[name])
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12, equal_nan=True)
        else:
            assert mine == theirs


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_and_leaves_the_model_alone(name: str) -> None:
    reason, case = REFUSED[name]
    model = case.make().double()
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(CaptureError) as wrong:
        daggc.compile(model)(*(doubled(value) for value in case.inputs))
    assert re.search(reason, str(wrong.value)), str(wrong.value)
    assert [dict(vars(module)) for module in model.modules()] == before


def test_padded_encoder_without_gradients_is_refused() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1).eval()
    mask = torch.tensor([[0, 0, 0, 1, 1], [0] * 5]).bool()
    with torch.no_grad(), pytest.raises(CaptureError, match="enable_nested_tensor=False"):
        daggc.compile(encoder)(x(2, 5, 4), src_key_padding_mask=mask)
