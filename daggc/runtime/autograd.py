"""A program as one node of torch's autograd graph, differentiable as often as asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from daggc.frontend.dtypes import TO_TORCH
from daggc.ir.graph import Program
from daggc.passes.dce import eliminate
from daggc.passes.vjp import counterparts, has_gradient, joined, reached, vjp
from daggc.runtime.executor import Executor

# (program with @forward only, refs to differentiate with respect to: none for inference, None for all) -> executor
MakeExecutor = Callable[[Program, "Sequence[str] | None"], Executor]


class Differentiable:
    """A program that runs with its VJP and has, on demand, a derivative that is such a program again."""

    def __init__(self, primal: Program, wrt: Sequence[str] | None, make_executor: MakeExecutor) -> None:
        self.executor = make_executor(primal, wrt)
        self.program = program = self.executor.program
        self._primal, self._wrt, self._make_executor = primal, wrt, make_executor
        self._reached: dict[tuple[bool, ...], frozenset[int]] = {}
        self.outputs = primal.forward.outputs
        inputs = {port.ref: place for place, port in enumerate(primal.forward.inputs)}
        outputs = {port.ref: place for place, port in enumerate(self.outputs)}
        # Each new cotangent belongs to an output, each gradient to an input of forward.
        new = [port for port in program.backward.inputs_of("cotangent") if port.ref not in inputs]
        grads = program.backward.outputs
        if primal.forward.inputs_of("cotangent"):
            output_of, input_of = counterparts(primal.forward, wrt)
        else:  # a first derivative: ports are named after what they belong to
            output_of = {port.ref: port.target for port in new}
            input_of = {port.ref: port.target for port in grads}
        self.cotangents = tuple((outputs[output_of[port.ref]], port.value.type) for port in new)
        self.gradient_places = tuple(inputs[input_of[port.ref]] for port in grads)

    @cached_property
    def derivative(self) -> Differentiable | None:
        """The program whose forward computes this one's gradients, and nothing else; None if they are constants.

        With the outputs, it would ask for their cotangents, and where a slope is infinite not even zeros are harmless.
        """
        program = vjp(self._primal, self._wrt)
        gradients = {port.ref for port in program.backward.outputs}
        joint = joined(program)
        kept = tuple(port for port in joint.forward.outputs if port.ref in gradients)
        program = joint.with_graphs(eliminate(replace(joint.forward, outputs=kept)), provenance="gradients")
        return Differentiable(program, None, self._make_executor) if has_gradient(program, _floats(program)) else None

    def reached_from(self, given: tuple[bool, ...]) -> frozenset[int]:
        """Places of the inputs that have a gradient, rather than none, where only these outputs have a cotangent."""
        if given not in self._reached:
            outputs = [port.ref for port, is_given in zip(self.outputs, given, strict=True) if is_given]
            refs = reached(self._primal, outputs)
            inputs = enumerate(self._primal.forward.inputs)
            self._reached[given] = frozenset(place for place, port in inputs if port.ref in refs)
        return self._reached[given]

    def __call__(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Outputs in the order of ``self.outputs``; gradients flow to the inputs."""
        return _Run.apply(self, *inputs)  # pyright: ignore[reportReturnType]  # apply is untyped


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Differentiable, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs, residuals = function.executor.forward(inputs)
        # Distinct objects: autograd keeps one gradient slot for each output.
        seen: set[int] = {id(tensor) for tensor in inputs}
        distinct: list[torch.Tensor] = []
        for output in outputs:
            distinct.append(output.view_as(output) if id(output) in seen else output)
            seen.add(id(output))
        ctx.function = function
        ctx.count = len(inputs)
        # Tensors go through autograd, which frees them after backward and notices writes to them.
        keeps_tensors = isinstance(residuals, tuple)
        ctx.handle = None if keeps_tensors else residuals
        ctx.save_for_backward(*inputs, *(residuals if keeps_tensors else ()))
        differentiable = {place for place, _ in function.cotangents}
        ctx.mark_non_differentiable(*(out for place, out in enumerate(distinct) if place not in differentiable))
        ctx.set_materialize_grads(False)
        return tuple(distinct)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        function: Differentiable = ctx.function
        inputs, residuals = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        given = [
            _zeros(type_, inputs) if (ct := cotangents[place]) is None else ct for place, type_ in function.cotangents
        ]
        derivative = function.derivative if torch.is_grad_enabled() else None
        if derivative is not None:  # create_graph=True: the gradients are themselves differentiable
            results = derivative(_with_cotangents(derivative, function, inputs, given))
            by_ref = {port.ref: result for result, port in zip(results, derivative.outputs, strict=True)}
            gradients = [by_ref[port.ref] for port in function.program.backward.outputs]
        else:
            handle = residuals if ctx.handle is None else ctx.handle
            gradients = function.executor.backward(handle, inputs, given)
        known = function.reached_from(tuple(ct is not None for ct in cotangents))
        by_place = {place: x for place, x in zip(function.gradient_places, gradients, strict=True) if place in known}
        return (None, *(by_place.get(place) for place in range(ctx.count)))


def _with_cotangents(
    derivative: Differentiable, function: Differentiable, inputs: Sequence[torch.Tensor], given: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The inputs of the derivative's forward: those of forward, and the cotangents."""
    known = {port.ref: x for port, x in zip(function.program.forward.inputs, inputs, strict=True)}
    rest = iter(given)
    return [known[p.ref] if p.ref in known else next(rest) for p in derivative.program.forward.inputs]


def _floats(program: Program) -> list[str]:
    """The inputs that a derivative is taken by: parameters, inputs, cotangents."""
    ports = program.forward.inputs_of("param", "input", "cotangent")
    return [port.ref for port in ports if port.value.type.differentiable]


def _zeros(type_: Any, like: Sequence[torch.Tensor]) -> torch.Tensor:
    device = like[0].device if like else None
    return torch.zeros(type_.shape, dtype=TO_TORCH[type_.dtype], device=device)
