"""Running a program by the names of its ports, on NumPy or on torch: what ``daggc run`` does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from daggc.errors import RunError
from daggc.interp import interpret
from daggc.ir.graph import Graph, Port, Program
from daggc.ir.types import DTYPES

Arrays = Mapping[str, np.ndarray]
BACKENDS = ("torch", "numpy")


def run_program(program: Program, inputs: Arrays, backend: str = "numpy") -> dict[str, np.ndarray]:
    """Outputs and, where cotangents are given, gradients; ports are named as in :func:`daggc.interp.interpret`.

    Raises:
        RunError: an input is missing or of another type, or the program needs what is not here.
    """
    return interpret(program, inputs) if backend == "numpy" else interpret(program, inputs, run_graph=_on_torch)


def _on_torch(program: Program, graph: Graph, arrays: list[np.ndarray]) -> list[np.ndarray]:
    from daggc.backend.local import run_graph  # torch, where it is asked for

    return [to_array(tensor) for tensor in run_graph(program, graph, [to_tensor(array) for array in arrays])]


def to_array(value: Any) -> np.ndarray:
    """A NumPy array of an array or a torch tensor, without importing torch."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    tensor = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if str(tensor.dtype) == "torch.bfloat16":  # NumPy knows it by ml_dtypes only
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_tensor(array: np.ndarray) -> Any:
    """A torch tensor with memory of its own."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.array(array, np.float32)).bfloat16()
    return torch.from_numpy(np.array(array, order="C"))


def key_array(seed: int) -> np.ndarray:
    """The key of random ops for a seed: ``i64[2]`` of seed and counter."""
    return np.array([seed, 0], np.int64)


def random_array(port: Port, seed: int, index: int) -> np.ndarray:
    """Numbers for a port: normal, for parameters divided by the root of their inner size; integers are 0 or 1."""
    type_ = port.value.type
    rng = np.random.default_rng([seed, index])
    if DTYPES[type_.dtype].kind in "ib":
        return rng.integers(0, 2, type_.shape).astype(type_.numpy_dtype)
    scale = max(1, type_.numel // max(1, type_.shape[0])) ** -0.5 if port.kind == "param" and type_.rank else 1.0
    if port.kind == "buffer":  # often a variance: positive
        return rng.uniform(0.5, 1.5, type_.shape).astype(type_.numpy_dtype)
    return np.asarray(scale * rng.normal(size=type_.shape)).astype(type_.numpy_dtype)


def fill_inputs(program: Program, given: Arrays, seed: int, random: bool) -> dict[str, np.ndarray]:
    """What was given, a key from the seed, and with ``random`` numbers for every other port of the first graph."""
    graph = program["forward"] if "forward" in program.graphs else program["main"]
    filled = dict(given)
    for index, port in enumerate(graph.inputs):
        if port.ref in given or port.target in given:
            continue
        if port.kind == "key":
            filled[port.ref] = key_array(seed)
        elif random:
            filled[port.ref] = random_array(port, seed, index)
    return filled


def check_names(program: Program, given: Arrays) -> None:
    """Raises RunError if an array is named as no port is: a misspelt input must not pass unseen."""
    ports = [port for graph in program.graphs.values() for port in graph.inputs]
    known = {port.ref for port in ports} | {port.target for port in ports} | set(program.tied)
    unknown = [name for name in given if name not in known]
    if unknown:
        wanted = [port.ref for port in ports if port.kind in ("input", "cotangent")]
        raise RunError(
            f"there is no input {unknown[0]!r}; inputs are {', '.join(dict.fromkeys(wanted)) or 'none'} and the weights"
        )
