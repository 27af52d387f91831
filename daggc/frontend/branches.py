"""Models whose Python decides on numbers of a tensor: captured along the branch that their example inputs take.

``torch.export`` has no numbers while it traces. Where a capture fails for the want of one, the model is run once in
eager, and what each ``item()``, ``bool(x)``, ``torch.equal``, ... gave is noted. The second capture hands out
these numbers in order, as constants, and marks the tensors they come from; a ``check`` in the program compares
them at each run. Integers and bools only: a float of the data would differ at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from daggc.errors import DataDependentError
from daggc.frontend.data_shapes import HANDLERS
from daggc.frontend.pytree import Spec

_MOST = 256  # numbers that one capture may hang on

_library = torch.library.Library("daggc", "FRAGMENT")
_library.define("decides(Tensor x) -> Tensor")
_library.define("check(Tensor x, Tensor found, int[] expected) -> Tensor")


@torch.library.impl(_library, "decides", "CompositeExplicitAutograd")
def _decides(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@torch.library.register_fake("daggc::decides", lib=_library)
def _fake_decides(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("daggc::check", lib=_library)
def _fake_check(x: torch.Tensor, found: torch.Tensor, expected: Sequence[int]) -> torch.Tensor:
    return torch.empty_like(x)


Number = bool | int
Answers = tuple[tuple[Number, ...], ...]  # what each question gave, in the order they are asked
_SCALARS: Mapping[Any, type] = {
    torch.Tensor.item: object,
    torch.Tensor.__bool__: bool,
    torch.Tensor.__int__: int,
    torch.Tensor.__index__: int,
    torch.Tensor.is_nonzero: bool,
    torch.is_nonzero: bool,
}
_EQUAL = (torch.equal, torch.Tensor.equal)
_ALLCLOSE = (torch.allclose, torch.Tensor.allclose)


@dataclass
class Decisions(TorchFunctionMode):
    """Answers what the model's Python asks of tensors.

    Attributes:
        answers: numbers to give; None while they are collected in eager.
        asked: what was asked so far: the tensors, and the numbers that they gave.
    """

    answers: Answers | None = None
    asked: list[tuple[torch.Tensor, tuple[Number, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SCALARS:
            (number,) = self.numbers(args[0])
            kind = _SCALARS[func]
            return number if kind is object else kind(number)
        if func is torch.Tensor.tolist:
            return _nested(self.numbers(args[0]), args[0].shape)
        if func in _EQUAL:
            first, second = args[0], kwargs.get("other", args[-1])
            return first.shape == second.shape and self.truth((first == second).all())
        if func in _ALLCLOSE:
            return self.truth(torch.isclose(*args, **kwargs).all())
        if func in HANDLERS:
            result = HANDLERS[func](self.number, *args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        return func(*args, **kwargs)

    def truth(self, tensor: torch.Tensor) -> bool:
        return bool(self.numbers(tensor)[0])

    def number(self, tensor: torch.Tensor) -> int:
        return int(self.numbers(tensor)[0])

    def numbers(self, tensor: torch.Tensor) -> tuple[Number, ...]:
        """The numbers of a tensor. Raises DataDependentError if they may not become constants of a program."""
        if tensor.is_floating_point() or tensor.is_complex():
            raise DataDependentError(
                "the model's Python takes a float out of a tensor, which a compiled program cannot; keep it a tensor, "
                "or mark the function with @daggc.opaque"
            )
        if tensor.numel() + sum(len(numbers) for _, numbers in self.asked) > _MOST:
            raise DataDependentError(f"the model's Python takes more than {_MOST} numbers out of tensors")
        if self.answers is None:
            numbers = tuple(torch.Tensor.tolist(tensor.detach().reshape(-1)))
        elif len(self.asked) == len(self.answers) or len(self.answers[len(self.asked)]) != tensor.numel():
            raise DataDependentError("the model's Python asks for other numbers while it is captured than in eager")
        else:
            numbers = self.answers[len(self.asked)]
            tensor = torch.ops.daggc.decides(tensor)
        self.asked.append((tensor, numbers))
        return numbers

    def checked(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A model's outputs, the first of which passes through a ``check`` for each answer."""
        outputs = list(outputs)
        if self.asked and not outputs:
            raise DataDependentError("the model returns numbers taken from a tensor's data only; return the tensor")
        for tensor, numbers in self.asked:
            outputs[0] = torch.ops.daggc.check(outputs[0], tensor, [int(number) for number in numbers])
        return outputs


def _nested(numbers: Sequence[Number], shape: Sequence[int]) -> Any:
    if not shape:
        return numbers[0]
    inner = len(numbers) // shape[0] if shape[0] else 0
    return [_nested(numbers[i * inner : (i + 1) * inner], shape[1:]) for i in range(shape[0])]


def decisions_of(model: nn.Module, call: Callable[..., Any], leaves: Sequence[torch.Tensor], in_spec: Spec) -> Answers:
    """Run the model in eager, and give what its Python asked of tensors. Nothing is changed."""
    decisions = Decisions()
    copies = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]
    args, kwargs = in_spec.rebuild(iter(copies))
    with _unchanged(model), torch.random.fork_rng(devices=[]), _as_if_exporting(), decisions:
        call(model, *args, **kwargs)
    return tuple(numbers for _, numbers in decisions.asked)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put buffers and attributes back as they were."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    saved = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, old in saved:
                buffer.copy_(old)


@contextmanager
def _as_if_exporting() -> Iterator[None]:
    """Libraries leave out some of their questions while a model is traced."""
    flags = torch.compiler
    before = (flags._is_compiling_flag, flags._is_exporting_flag)
    flags._is_compiling_flag = flags._is_exporting_flag = True
    try:
        yield
    finally:
        flags._is_compiling_flag, flags._is_exporting_flag = before
