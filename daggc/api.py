"""What ``import daggc`` gives: each public name and the module it lives in.

What needs torch or dask is imported when it is first asked for; everything imported above that point runs
where neither is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from daggc.interp import interpret
from daggc.ir import verifier
from daggc.ir.graph import Graph, Node, Program, Value
from daggc.ir.parser import parse
from daggc.ir.printer import print_program as to_text
from daggc.ir.serialize import from_json, load, load_weights, to_json
from daggc.ir.serialize import save as _save
from daggc.ops import REGISTRY
from daggc.passes import manager
from daggc.passes.vjp import vjp
from daggc.plan.device import Cluster, Device, Link, cpu_device, gpu_device
from daggc.report.running import to_array

__all__ = [
    "Cluster",
    "Device",
    "Graph",
    "Link",
    "Node",
    "Program",
    "Value",
    "cpu_device",
    "from_json",
    "gpu_device",
    "interpret",
    "load",
    "load_weights",
    "parse",
    "run_pipeline",
    "save",
    "to_json",
    "to_text",
    "verify",
    "vjp",
]

_ERRORS = (
    "CaptureError",
    "DaggcError",
    "DifferentiationError",
    "IRError",
    "PlanError",
    "RunError",
    "TypeRuleError",
    "WorkerLostError",
)

# Where the names live that this module does not hold itself.
_ELSEWHERE = {
    **dict.fromkeys(_ERRORS, "daggc.errors"),
    "Capture": "daggc.frontend.export",
    "Plan": "daggc.plan.plan",
    "calibrate": "daggc.runtime.calibrate",
    "capture": "daggc.frontend.export",
    "compile": "daggc.runtime.compile",
    "doctor": "daggc.runtime.doctor",
    "opaque": "daggc.frontend.opaque",
    "trace": "daggc.frontend.export",
    "weights_of": "daggc.frontend.export",
}
_MODULES = ("plan", "testing")  # packages; calling daggc.plan makes a plan

NAMES = (*__all__, *_ELSEWHERE, *_MODULES)


def resolve(name: str) -> Any:
    """The public object of this name. Raises AttributeError if daggc has none."""
    if name in __all__:
        return globals()[name]
    if name in _ELSEWHERE:
        return getattr(import_module(_ELSEWHERE[name]), name)
    if name in _MODULES:
        return import_module(f"daggc.{name}")
    raise AttributeError(f"module 'daggc' has no attribute {name!r}")


def verify(program: Program) -> None:
    """Check every rule of the IR by inferring every type again.

    Raises:
        IRError: with the offending lines, if the program breaks one.
    """
    verifier.verify(program, REGISTRY)


def run_pipeline(program: Program, text: str, check: bool = True) -> Program:
    """Apply the passes that a text names, such as ``"fold,cse,dce"`` or ``"vjp{wrt=params},dce"``.

    Args:
        check: verify the program after each pass.

    Raises:
        IRError: a pass is unknown, or left a program that does not verify.
    """
    return manager.run(program, manager.pipeline(text), check)


def save(program: Program, path: str | Path, weights: Mapping[str, Any] | None = None) -> None:
    """Write a program as text, or as JSON if the path ends in ``.json``, and its weights beside it.

    Args:
        weights: arrays or torch tensors by name, such as ``model.state_dict()`` or what ``weights_of`` gives;
            written to the same path with the suffix ``.safetensors``.
    """
    arrays = None if weights is None else {name: to_array(value) for name, value in weights.items()}
    _save(program, path, arrays)
