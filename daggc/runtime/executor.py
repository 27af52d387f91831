"""Something that runs a program's forward and backward: in this process here, on workers in ``dask_executor``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from daggc.backend.local import run_graph
from daggc.ir.graph import Program

Tensors = Sequence[torch.Tensor]


class Executor(Protocol):
    """Runs ``@forward`` and ``@backward`` on tensors in the order of their ports."""

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
    """Runs in this process."""

    def __init__(self, program: Program, device: str = "cpu") -> None:
        self.program = program
        self.device = device
        self._outputs = sum(port.kind != "residual" for port in program.forward.outputs)
        if "backward" in program.graphs:
            places = {port.ref: index for index, port in enumerate(program.forward.inputs)}
            self._reads = [
                places.get(port.ref) for port in program.backward.inputs if port.kind != "residual"
            ]  # None: one of the new cotangents

    def forward(self, inputs: Tensors) -> tuple[Tensors, Any]:
        results = run_graph(self.program, self.program.forward, inputs, self.device)
        return results[: self._outputs], results[self._outputs :]

    def backward(self, residuals: Any, inputs: Tensors, cotangents: Tensors) -> Tensors:
        given = iter(cotangents)
        rest = [next(given) if place is None else inputs[place] for place in self._reads]
        return run_graph(self.program, self.program.backward, [*residuals, *rest], self.device)
