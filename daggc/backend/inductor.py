"""Generated code through ``torch.compile``: the functions of graphs made faster, the code itself where that fails.

Static shapes, no CUDA graphs: a task stays a function of its inputs. Numbers are eager's to rounding, not to the bit:
inductor fuses ops and reorders sums. The same code on the same kind of machine gives the same numbers again, so a
task that runs twice does.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

from daggc.backend import kernels
from daggc.ir.graph import Graph

Function = Callable[..., tuple[torch.Tensor, ...]]

# Ops that call what the compiler should not look into: Python functions of the user's.
_OPAQUE = ("python.call",)
# Updates are fused kernels already, and write to memory that they are given.
_UPDATES = ("sgd_update", "adamw_update")
_HOST = ("bernoulli", "uniform", "normal", "randint", "randperm")  # kernels that compute with NumPy

_told: set[str] = set()


def inductor(graph: Graph, plain: Function, build: Callable[[Any], Function]) -> Function:
    """The function of a graph, compiled when it is first called.

    Args:
        plain: the function as it was generated, which runs where this one cannot be compiled: one warning says so.
        build: makes it again, over another namespace of kernels.
    """
    if any(node.holds(*_UPDATES) for node in graph.nodes):
        return plain
    if any(node.holds(*_OPAQUE) for node in graph.nodes):
        _tell(f"@{graph.name} calls a Python function of yours (daggc.opaque)")
        return plain
    return _Inductor(graph.name, plain, build)


class _Inductor:
    """Compiled code, with the generated code to fall back on."""

    def __init__(self, name: str, plain: Function, build: Callable[[Any], Function]) -> None:
        self._name = name
        self._plain = plain
        self._build = build
        self._compiled: Function | None = None
        self._given_up = False

    def __call__(self, device: torch.device, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self._given_up:
            try:
                if self._compiled is None:
                    self._compiled = torch.compile(self._build(_for_compiler()), backend="inductor", dynamic=False)
                return tuple(self._compiled(device, *(tensor.detach() for tensor in inputs)))
            except Exception as wrong:  # of whatever kind: it may be the compiler's, or the model's own
                results = self._plain(device, *inputs)  # raises what is wrong with the model
                self._given_up, self._compiled = True, None
                _tell(
                    f"@{self._name}: {type(wrong).__name__}: {str(wrong).strip().splitlines()[0] if str(wrong) else ''}"
                )
                return results
        return self._plain(device, *inputs)


def _for_compiler() -> Any:
    """The kernels, of which those that compute outside torch are not looked into."""
    names = {name: getattr(kernels, name) for name in dir(kernels) if not name.startswith("__")}
    hidden = {name: torch.compiler.disable(names[name]) for name in _HOST}
    return types.SimpleNamespace(**{**names, **hidden})


def _tell(reason: str) -> None:
    """Warn once for a reason in this process."""
    if reason not in _told:
        _told.add(reason)
        warnings.warn(
            f'codegen="inductor": {reason}; it runs as generated code, with the same results',
            RuntimeWarning,
            stacklevel=2,
        )
