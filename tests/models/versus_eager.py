"""The measure of "the same numbers": one call and one backward of a compiled model beside eager PyTorch's.

In f64 the norm of an error is at most 1e-10 of max(norm of the tensor, 1e-6 x norm of all gradients); in f32 at most
4 times eager's own error against the f64 run, with a floor of a few units in the last place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from zoo import ZOO, Case

Compile = Callable[[nn.Module], nn.Module]
ULPS = 16 * torch.finfo(torch.float32).eps  # the floor in f32, in proportion to a tensor's norm


@dataclass
class Run:
    """What one forward and backward gave."""

    result: Any
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor | None]
    input_gradients: list[torch.Tensor | None]
    buffers: dict[str, torch.Tensor]
    state_keys: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Errors:
    """The largest errors as fractions of what is allowed (at most 1), and relative to the norm of the tensor."""

    allowed: float
    outputs: float
    gradients: float
    inputs: float
    buffers: float


def make(name: str, training: bool, dtype: torch.dtype) -> Case:
    """A model of the zoo at a dtype; f32 and f64 hold the same numbers."""
    torch.manual_seed(0)
    case = ZOO[name]()
    model = case.model.to(dtype).train(training)
    return Case(model, tuple(_as(x, dtype) for x in case.args), {k: _as(x, dtype) for k, x in case.kwargs.items()})


def copied(case: Case) -> Case:
    args = tuple(_as(x, None) for x in case.args)
    return Case(copy.deepcopy(case.model), args, {key: _as(x, None) for key, x in case.kwargs.items()})


def _as(value: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    new = value.detach().clone()
    if dtype is not None and value.is_floating_point():
        new = new.to(dtype)
    return new.requires_grad_(value.requires_grad)


def run(model: nn.Module, case: Case, everything: bool) -> Run:
    """Forward, loss, backward.

    Args:
        everything: the loss depends on all outputs; otherwise on the model's own loss, where it has one.
    """
    result = model(*case.args, **case.kwargs)
    own = getattr(result, "loss", None)
    if own is not None and not everything:
        loss = own
    else:
        generator = torch.Generator().manual_seed(1)
        loss = torch.zeros((), dtype=torch.float64)
        for _, leaf in tensors_of(result):
            if leaf.requires_grad:
                weight = torch.randn(leaf.shape, dtype=torch.float64, generator=generator)
                loss = loss + (leaf * weight.to(leaf.dtype)).sum()
    loss.backward()
    inputs = [x for x in (*case.args, *case.kwargs.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
    return Run(
        result,
        loss.detach(),
        {name: parameter.grad for name, parameter in model.named_parameters()},
        [x.grad for x in inputs],
        {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
        list(model.state_dict()),
    )


def tensors_of(value: Any, path: str = "result") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a result with its path: containers, dataclasses, cache objects."""
    for where, item in walk(value, path):
        if isinstance(item, torch.Tensor):
            yield where, item


def walk(value: Any, path: str = "result") -> Iterator[tuple[str, Any]]:
    """Every node of a structure with its path: the type of a container, a tensor, or a plain value."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        yield path, type(value)
        for key, item in value.items():
            yield from walk(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        yield path, type(value)
        for index, item in enumerate(value):
            yield from walk(item, f"{path}.{index}")
    elif isinstance(value, bool | int | float | str | type | torch.dtype | torch.device | None):
        yield path, value
    else:
        yield path, type(value)
        for key, item in getattr(value, "__dict__", {}).items():
            yield from walk(item, f"{path}.{key}")


class Judge:
    """Collects errors of one kind and checks each against what is allowed."""

    def __init__(self, exact: bool, all_gradients: float) -> None:
        self.exact = exact
        self.all_gradients = all_gradients
        self.worst = 0.0

    def compare(
        self, where: str, got: torch.Tensor, eager: torch.Tensor, reference: torch.Tensor, gradient: bool = False
    ) -> float:
        """The relative error of one tensor. Raises AssertionError if it is more than allowed."""
        assert (got.dtype, got.shape) == (eager.dtype, eager.shape), where
        if not eager.is_floating_point():
            assert torch.equal(got, eager), where
            return 0.0
        finite = torch.isfinite(eager)
        assert torch.equal(got[~finite].nan_to_num(), eager[~finite].nan_to_num()), where
        got, eager, reference = (x.detach().double()[finite] for x in (got, eager, reference))
        scale = max(float(reference.norm()), 1e-6 * self.all_gradients if gradient else 0.0)
        error = float((got - reference).norm())
        allowed = 1e-10 * scale if self.exact else 4 * float((eager - reference).norm()) + ULPS * scale
        assert error <= allowed, f"{where}: error {error:.2e} of a norm of {scale:.2e}, {allowed:.2e} is allowed"
        self.worst = max(self.worst, error / allowed if allowed else 0.0)
        return error / scale if scale else 0.0


def compare(got: Run, eager: Run, reference: Run, exact: bool) -> Errors:
    """Compare everything. Raises AssertionError naming what differs.

    Args:
        reference: eager's run in f64; in f64 it is ``eager`` itself.
        exact: by the measure for f64.
    """
    known = [gradient for gradient in eager.gradients.values() if gradient is not None]
    judge = Judge(exact, sum(float(gradient.double().norm()) ** 2 for gradient in known) ** 0.5)
    assert got.state_keys == eager.state_keys
    shape = [(path, None if isinstance(item, torch.Tensor | torch.dtype) else item) for path, item in walk(got.result)]
    wanted = [(path, None if isinstance(x, torch.Tensor | torch.dtype) else x) for path, x in walk(eager.result)]
    assert shape == wanted
    outputs = [judge.compare("loss", got.loss, eager.loss, reference.loss)]
    triples = zip(*(tensors_of(run.result) for run in (got, eager, reference)), strict=True)
    for (path, mine), (_, theirs), (_, exactly) in triples:
        assert mine.requires_grad == theirs.requires_grad, f"{path} requires_grad"
        outputs.append(judge.compare(path, mine, theirs, exactly))
    assert list(got.gradients) == list(eager.gradients)
    gradients = [0.0]
    for name, theirs in eager.gradients.items():
        mine, exactly = got.gradients[name], reference.gradients[name]
        assert (mine is None) == (theirs is None), f"gradient of {name}: {mine} for {theirs}"
        if mine is not None and theirs is not None and exactly is not None:
            gradients.append(judge.compare(f"gradient of {name}", mine, theirs, exactly, gradient=True))
    inputs = [0.0]
    both = zip(got.input_gradients, eager.input_gradients, reference.input_gradients, strict=True)
    for index, (mine, theirs, exactly) in enumerate(both):
        assert mine is not None and theirs is not None and exactly is not None
        inputs.append(judge.compare(f"gradient of input {index}", mine, theirs, exactly, gradient=True))
    assert list(got.buffers) == list(eager.buffers)
    buffers = [0.0]
    for name, theirs in eager.buffers.items():
        buffers.append(judge.compare(f"buffer {name}", got.buffers[name], theirs, reference.buffers[name]))
    return Errors(judge.worst, max(outputs), max(gradients), max(inputs), max(buffers))


def versus_eager(name: str, training: bool, dtype: torch.dtype, compile: Compile) -> tuple[Errors, nn.Module]:
    """One model of the zoo, compiled, beside eager; returns the errors and the compiled model.

    In train mode the loss is the model's own, as it is called in training; in eval mode it depends on all outputs.
    """
    everything = not training
    case = make(name, training, dtype)
    mine, exactly = copied(case), make(name, training, torch.float64)
    compiled = compile(mine.model)
    eager = run(case.model, case, everything)
    reference = eager if dtype == torch.float64 else run(exactly.model, exactly, everything)
    got = run(compiled, mine, everything)
    return compare(got, eager, reference, exact=dtype == torch.float64), compiled
