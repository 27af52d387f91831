"""Complex numbers in models: outputs, gradients and second derivatives equal eager PyTorch's, without a door."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import daggc
from daggc.errors import CaptureError
from daggc.ir.printer import print_program

Tensors = Sequence[torch.Tensor]


class FourierLayer(nn.Module):
    """A layer of a Fourier neural operator: low frequencies mixed by complex weights, in real and complex numbers."""

    def __init__(self, width: int = 3, modes: int = 2) -> None:
        super().__init__()
        self.modes = modes
        self.lift = nn.Conv2d(1, width, 1)
        self.weight = nn.Parameter(torch.randn(width, width, modes, modes, dtype=torch.cfloat) / width)
        self.skip = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lift(x)
        spectrum = torch.fft.rfft2(x, norm="ortho")
        mixed = torch.zeros_like(spectrum)
        low = spectrum[:, :, : self.modes, : self.modes]
        mixed[:, :, : self.modes, : self.modes] = torch.einsum("bixy,ioxy->boxy", low, self.weight)
        return torch.fft.irfft2(mixed, s=x.shape[-2:], norm="ortho") + torch.tanh(self.skip(x))


class Rotary(nn.Module):
    """Attention with rotary positions as products of complex numbers, the way Llama's first code has them."""

    angles: torch.Tensor

    def __init__(self, width: int = 8, heads: int = 2, length: int = 5) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        frequencies = 1.0 / 10.0 ** (torch.arange(0, width // heads, 2).double() / width)
        angles = torch.outer(torch.arange(length).double(), frequencies)
        self.register_buffer("angles", angles)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turns = torch.polar(torch.ones_like(self.angles), self.angles)
        query, key = (self.turned(linear(x), turns) for linear in (self.query, self.key))
        return (query @ key.mT).softmax(-1).sum(1)

    def turned(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (self.heads, -1, 2)).transpose(1, 2).contiguous())
        return torch.view_as_real(pairs * turns).flatten(3)


class Spectrogram(nn.Module):
    """A signal masked in the time-frequency plane."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.rand(5, 1))
        self.register_buffer("window", torch.hann_window(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"n_fft": 8, "hop_length": 2, "window": self.window}
        spectrum = torch.stft(x, return_complex=True, **options)
        size, angle = spectrum.abs(), spectrum.angle()
        return torch.istft(torch.polar(size * self.mask, angle), length=x.shape[-1], **options)


class ComplexLayers(nn.Module):
    """Complex inputs, parameters, activations and outputs; scalars that are complex."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6, dtype=torch.cfloat)
        self.second = nn.Linear(6, 3, dtype=torch.cfloat)
        self.kernel = nn.Parameter(torch.randn(2, 1, 3, dtype=torch.cfloat))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.first(x) * (0.5 - 1j)
        hidden = torch.complex(torch.tanh(hidden.real), hidden.imag) / (1 + hidden.abs())
        hidden = torch.nn.functional.conv1d(hidden.unsqueeze(1), self.kernel, padding=1).prod(1)
        y = torch.sigmoid(self.second(hidden)) ** 2
        return y, (y.conj() @ y.mT).real.exp() + torch.linalg.vecdot(y, y).abs().square()


CASES: dict[str, tuple[type[nn.Module], tuple[int, ...], torch.dtype]] = {
    "Fourier neural operator": (FourierLayer, (2, 1, 6, 5), torch.float64),
    "rotary positions": (Rotary, (2, 5, 8), torch.float64),
    "spectrogram": (Spectrogram, (2, 20), torch.float64),
    "complex layers": (ComplexLayers, (5, 4), torch.complex128),
}


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    factory, shape, dtype = CASES[name]
    model = factory().double()
    for module in model.modules():  # double() leaves complex numbers alone
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.is_complex():
                setattr(module, key, nn.Parameter(parameter.detach().to(torch.complex128)))
    return model, torch.randn(shape, dtype=dtype)


def normal(like: Tensors, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, dtype=x.dtype, generator=generator).requires_grad_() for x in like]


def derivatives(model: nn.Module, x: torch.Tensor) -> dict[str, Tensors]:
    """Outputs, gradients and second derivatives along fixed random cotangents."""
    x = x.clone().requires_grad_()
    leaves = [x, *model.parameters()]
    result = model(x)
    outputs = result if isinstance(result, tuple) else (result,)
    cts = normal(outputs, 1)
    gradients = torch.autograd.grad(outputs, leaves, cts, create_graph=True)
    second = torch.autograd.grad(gradients, [*leaves, *cts], normal(gradients, 2), allow_unused=True)
    zeros = [torch.zeros_like(like) for like in (*leaves, *cts)]
    return {
        "output": outputs,
        "gradient": gradients,
        "second derivative": [z if grad is None else grad for grad, z in zip(second, zeros, strict=True)],
    }


@pytest.mark.parametrize("name", CASES)
def test_complex_models_equal_eager(name: str):
    model, x = make(name)
    eager = derivatives(model, x)
    for what, tensors in derivatives(daggc.compile(model), x).items():
        scale = max(float(theirs.detach().norm()) for theirs in eager[what])
        for mine, theirs in zip(tensors, eager[what], strict=True):
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
            assert float((mine - theirs).detach().norm()) <= 1e-10 * scale, what


@pytest.mark.parametrize("name", CASES)
def test_complex_models_are_portable(name: str):
    """No node needs torch; the interpreter gives the numbers; the text reads back."""
    model, x = make(name)
    program = daggc.vjp(daggc.trace(model, (x,)))
    assert program.portable
    assert daggc.parse(print_program(program)) == program
    weights = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    results = daggc.interpret(program, {**weights, program.forward.inputs_of("input")[0].ref: x.numpy()})
    wanted = model(x)
    for index, tensor in enumerate(wanted if isinstance(wanted, tuple) else (wanted,)):
        ref = program.forward.outputs_of("output")[index].ref
        np.testing.assert_allclose(results[ref], tensor.detach().numpy(), rtol=0, atol=1e-10)


def test_complex_parameters_train():
    """torch's optimizers step in the direction of steepest descent of real and imaginary parts."""
    model, x = make("complex layers")
    losses = []
    for trained in (copy.deepcopy(model), daggc.compile(copy.deepcopy(model))):
        optimizer = torch.optim.Adam(trained.parameters(), lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            y, z = trained(x)
            loss = (y - 1j).abs().square().mean() + z.mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-9)
    assert losses[3] < losses[0]


class Scalars(nn.Module):
    """Complex numbers of Python in every place an op takes one."""

    def forward(self, x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        y = (x + 1j) * (2 - 1j) / (1 + 1j) - 0.5j
        y = 1j - y + torch.add(x, y, alpha=2j) + (1 - 1j) / (x + 4) + torch.addcmul(x, x, y, value=0.5j)
        y = y + 0.1 * (y ** (1 + 1j) + x**2 + 2**x + (1 + 2j) ** x)
        y = torch.where(r > 0, y, 3j).masked_fill(r > 1, 2 - 1j) * torch.full_like(x, 1j) + r * 2j
        return torch.constant_pad_nd(y, (1, 0), 0.5j) * (x.new_tensor([1 - 2j]) == 1 - 2j)


def test_complex_scalars_stay_attributes():
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.complex128, requires_grad=True)
    r = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    model = Scalars()
    program = daggc.trace(model, (x, r))
    assert program.portable
    assert daggc.parse(print_program(program)) == program
    ct = torch.randn(3, 5, dtype=torch.complex128)
    (mine, eager) = (f(x, r) for f in (daggc.compile(model), model))
    torch.testing.assert_close(mine, eager, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(*(torch.autograd.grad(y, (x, r), ct) for y in (mine, eager)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_half_precision_complex_numbers_are_refused():
    with pytest.raises(CaptureError, match="complex32"):
        daggc.trace(Scalars(), (torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.float16)))
