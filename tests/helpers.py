"""What several tests share: arrays to tensors and back, comparisons, running graphs in torch."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import torch
from hypothesis import reject

from daggc.backend.codegen import compile_graph
from daggc.errors import DifferentiationError
from daggc.interp import interpret
from daggc.ir.graph import Graph, Port, Program
from daggc.ir.types import dtype_of
from daggc.passes.vjp import vjp
from daggc.testing import random_inputs

# The largest error, in proportion to the largest number: torch and NumPy round differently, not more than that.
TOLERANCES = {"f64": 1e-10, "f32": 3e-5, "f16": 4e-3, "bf16": 3e-2, "c64": 3e-5, "c128": 1e-10}


def coarsest(graph: Graph) -> float | None:
    """The tolerance of the coarsest float dtype in a graph: f32 statistics of bf16 numbers are no better."""
    return max(
        (TOLERANCES[value.type.dtype] for value in graph.values() if value.type.dtype in TOLERANCES), default=None
    )


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A copy of an array as a tensor; bf16 by its bits."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, order="C"))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def run_torch(graph: Graph, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Run a graph's generated code on arrays in the order of its inputs."""
    return [to_numpy(result) for result in compile_graph(graph)([to_torch(array) for array in arrays])]


def assert_close(got: np.ndarray, wanted: np.ndarray, what: str = "", tolerance: float | None = None) -> None:
    """Equal dtype and shape; integers and bools equal, floats within the dtype's tolerance."""
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), what
    dtype = dtype_of(wanted)
    if dtype not in TOLERANCES:
        np.testing.assert_array_equal(got, wanted, err_msg=what)
        return
    wide = np.complex128 if dtype.startswith("c") else np.float64
    got, wanted = got.astype(wide), wanted.astype(wide)
    finite = np.abs(wanted[np.isfinite(wanted)])
    scale = max(1.0, float(finite.max())) if finite.size else 1.0
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale, err_msg=what)


def assert_same_bits(got: np.ndarray, wanted: np.ndarray, what: str = "") -> None:
    """Bitwise equal, the sign of zero included; any NaN equals any other."""
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), what
    got_nan, wanted_nan = got != got, wanted != wanted
    np.testing.assert_array_equal(got_nan, wanted_nan, err_msg=what)
    assert got[~got_nan].tobytes() == wanted[~wanted_nan].tobytes(), what


def differentiated(program: Program) -> Program:
    """A generated program with its backward; the example is given up where no output depends on any input.

    What is generated does read one, but a ``checkpoint`` may only pass it on, as a result that is not asked for.
    """
    try:
        return vjp(program)
    except DifferentiationError:
        assert_unmoved(program, [p for p in program.forward.inputs_of("param", "input") if p.value.type.is_float])
        reject()


def assert_unmoved(program: Program, ports: Sequence[Port]) -> None:
    """Float outputs stay as they are when these inputs change.

    They change so little that hardly a step is crossed: hardtanh_backward has a zero derivative by its input, and
    jumps.
    """
    inputs = random_inputs(program.forward)
    moved = {**inputs, **{port.ref: inputs[port.ref] + 1e-6 for port in ports}}
    before, after = interpret(program, inputs), interpret(program, moved)
    for port in program.forward.outputs_of("output"):
        if port.value.type.is_float:
            assert_same_bits(after[port.ref], before[port.ref], port.ref)
