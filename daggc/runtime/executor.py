"""Something that runs a program's forward and backward: in this process here, on workers in ``dask_executor``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from daggc.backend.local import run_graph
from daggc.ir.graph import Program
from daggc.passes.vjp import vjp
from daggc.runtime.devices import device_of

Tensors = Sequence[torch.Tensor]


class Executor(Protocol):
    """Runs ``@forward`` and ``@backward`` on tensors in the order of their ports.

    Attributes:
        program: has both graphs, or only ``@forward`` if it was made for inference.
    """

    program: Program

    def forward(self, inputs: Tensors) -> tuple[Tensors, Any]:
        """The outputs (without residuals), and a handle of the residuals: tensors, or what stands for them."""
        ...

    def backward(self, residuals: Any, inputs: Tensors, cotangents: Tensors) -> Tensors:
        """The gradients, in the order of ``@backward``'s outputs.

        Args:
            residuals: what ``forward`` gave.
            inputs: the inputs ``forward`` took.
            cotangents: one tensor for each ``cotangent`` port of ``@backward``.
        """
        ...


class LocalExecutor:
    """Runs in this process, on the device its inputs are on."""

    def __init__(self, primal: Program, wrt: Sequence[str] | None) -> None:
        """``wrt``: refs to differentiate with respect to; None for all, empty for inference."""
        inference = wrt is not None and not wrt
        self.program = primal if inference else vjp(primal, wrt)
        self._outputs = len(primal.forward.outputs)
        self._reads = () if inference else places_of_reads(self.program)

    def forward(self, inputs: Tensors) -> tuple[Tensors, Any]:
        results = run_graph(self.program, self.program.forward, inputs, device_of(inputs))
        return results[: self._outputs], results[self._outputs :]

    def backward(self, residuals: Any, inputs: Tensors, cotangents: Tensors) -> Tensors:
        given = iter(cotangents)
        rest = [next(given) if place is None else inputs[place] for place in self._reads]
        return run_graph(self.program, self.program.backward, [*residuals, *rest], device_of(inputs))


def places_of_reads(program: Program) -> tuple[int | None, ...]:
    """For each input of ``@backward`` but residuals: its place among forward's inputs, None for a cotangent."""
    places = {port.ref: index for index, port in enumerate(program.forward.inputs)}
    return tuple(places.get(port.ref) for port in program.backward.inputs if port.kind != "residual")
