"""A model by its name on the command line, and its program at each stage of compilation.

A model is named ``path/to/file.py:factory`` or ``package.module:factory``: a callable without arguments that
gives ``(model, args)`` or ``(model, args, kwargs)``. A ``.dag`` or ``.json`` file is a program already.
Only naming a Python model runs code of the user's and imports torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from daggc.errors import CaptureError, DaggcError, IRError, PlanError
from daggc.ir.graph import Program
from daggc.ir.serialize import load, load_weights, weights_path
from daggc.ir.verifier import verify
from daggc.ops import REGISTRY
from daggc.passes.manager import pipeline, run
from daggc.passes.vjp import vjp
from daggc.plan.cluster_file import load_cluster
from daggc.plan.device import Cluster, cluster_of, cpu_device, gpu_device
from daggc.plan.plan import Plan, plan_model
from daggc.plan.request import plan_on
from daggc.report.running import to_array

STAGES = ("captured", "simplified", "vjp", "plan")
SIMPLIFY = "fold,canonicalize,cse,dce"
SUFFIXES = (".dag", ".json")


@dataclass(frozen=True)
class Source:
    """A program as it was captured or read, and its weights by the model's own names, where there are any."""

    program: Program
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)


def open_source(name: str) -> Source:
    """Capture or read what the name stands for.

    Raises:
        CaptureError: there is no such model, or it cannot be captured.
        IRError: the file is no program.
    """
    if not name.endswith(SUFFIXES):
        return capture_source(call_factory(name), name)
    program = load(name)
    verify(program, REGISTRY)
    beside = weights_path(name)
    return Source(program, load_weights(beside) if beside.exists() else {})


def capture_source(made: Sequence[Any], name: str = "the model") -> Source:
    """Capture what a factory gave: ``(model, args)`` or ``(model, args, kwargs)``."""
    from daggc.frontend.export import capture, weights_of  # torch is loaded only where a model is named

    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise CaptureError(f"{name} must give (model, args) or (model, args, kwargs), it gave a {type(made).__name__}")
    model, args = made[:2]
    kwargs = made[2] if len(made) == 3 else {}
    if not isinstance(args, tuple | list) or not isinstance(kwargs, Mapping):
        raise CaptureError(f"{name}: args are a tuple and kwargs a dict, got {type(args)} and {type(kwargs)}")
    captured = capture(model, args, kwargs)
    refs = weights_of(model, captured)
    targets = [ref.partition(":")[2] for ref in refs]
    weights = {
        ref if targets.count(target) > 1 else target: to_array(tensor)
        for (ref, tensor), target in zip(refs.items(), targets, strict=True)
    }
    return Source(captured.program, weights)


def model_and_batch(made: Any, name: str = "the model") -> tuple[Any, Any]:
    """What a factory gave as the model and a batch: a tuple of arguments, or a dict of keywords."""
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise CaptureError(f"{name} must give (model, args) or (model, args, kwargs), it gave a {type(made).__name__}")
    model, args, kwargs = (*made, {})[:3]
    if args and kwargs:
        raise CaptureError(f"{name}: a batch is a tuple of arguments or a dict of keywords, not both; give --batches")
    return model, dict(kwargs) if kwargs else tuple(args)


def call_factory(name: str) -> Any:
    """Import the module that ``where:factory`` names and call the factory.

    Raises CaptureError if there is no such thing, or naming the user's line where it failed.
    """
    factory = find_callable(name)
    with _naming(name):
        return factory()


def find_callable(name: str) -> Callable[..., Any]:
    """The callable that ``where:attribute`` names, its module imported. Raises CaptureError as call_factory does."""
    where, colon, attribute = name.rpartition(":")
    if not colon or not where:
        raise CaptureError(
            "a model is named path/to/file.py:factory or package.module:factory, or is a .dag or .json file; "
            f"got {name!r}"
        )
    with _naming(name):
        module = _import(where)
    found = getattr(module, attribute, None)
    if not callable(found):
        known = ", ".join(key for key, value in vars(module).items() if callable(value) and key[0] != "_")
        raise CaptureError(f"{where} has no callable {attribute!r}; it has {known or 'none'}")
    return found


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn what the user's code raises into a CaptureError that names their line."""
    try:
        yield
    except DaggcError:
        raise
    except Exception as wrong:
        last = traceback.extract_tb(wrong.__traceback__)[-1]
        raise CaptureError(
            f"{name} failed: {type(wrong).__name__}: {wrong} (at {last.filename}:{last.lineno})"
        ) from wrong


def _import(where: str) -> Any:
    if not where.endswith(".py"):
        if "" not in sys.path:
            sys.path.insert(0, "")  # as ``python -m`` does
        return importlib.import_module(where)
    path = Path(where)
    if not path.is_file():
        raise CaptureError(f"there is no file {where}")
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as Python does for a script: its neighbours are importable
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def at_stage(program: Program, stage: str, cluster: Cluster | None = None) -> Program:
    """The program at a stage of compilation: captured, simplified, vjp or plan.

    Raises PlanError if a plan is asked for without devices, or none fits them.
    """
    if stage == "captured":
        return program
    if stage not in STAGES:
        raise IRError(f"a stage is one of {', '.join(STAGES)}, got {stage!r}")
    if stage == "plan":
        return make_plan(program, cluster).program
    simplified = run(program, pipeline(SIMPLIFY))
    if stage == "simplified" or "backward" in simplified.graphs:
        return simplified
    return vjp(simplified)


def make_plan(program: Program, cluster: Cluster | None, **options: Any) -> Plan:
    """The plan of a program: for training, where there is a gradient to be had, else for inference."""
    if cluster is None:
        raise PlanError("a plan is made for devices; name them")
    simplified = at_stage(program, "simplified")
    if "backward" in simplified.graphs:
        return plan_on(simplified, cluster, **options)
    return plan_model(simplified, cluster, **{"training": _has_gradient(simplified), **options})


def _has_gradient(program: Program) -> bool:
    """Whether an output and an input to differentiate with respect to are of a differentiable dtype."""
    ports = program.forward.inputs_of("param", "input"), program.forward.outputs_of("output")
    return all(any(port.value.type.differentiable for port in side) for side in ports)


def parse_devices(text: str) -> Cluster:
    """Devices from ``2`` (two CPU workers), ``cpu:0,cpu:1,gpu:0``, or a cluster file. Raises PlanError for others."""
    if text.endswith((".toml", ".json")):
        return load_cluster(text)
    if text.isdigit():
        return cluster_of([cpu_device(index) for index in range(int(text))])
    makers = {"cpu": cpu_device, "gpu": gpu_device}
    devices = []
    for name in text.split(","):
        kind, _, index = name.strip().partition(":")
        if kind not in makers or not index.isdigit():
            raise PlanError(f"devices are a number of CPU workers or names such as cpu:0,gpu:1; got {name!r}")
        devices.append(makers[kind](int(index)))
    return cluster_of(devices)
