"""What importers make of arguments that no sample has, against the ATen operator itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close, to_numpy, to_torch

from daggc.interp import interpret_graph
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY

RNG = np.random.default_rng(0)
WIDE, DEEP = RNG.normal(size=(3, 4)), RNG.normal(size=(2, 5, 3))
MATRICES = np.stack([np.diag(values) for values in ((3.0, 1.0, 0.2), (3.0, 1e-3, 1e-20), (0.4, 0.1, 0.0))])
TOLERANCES = np.array([0.5, 0.0, -1.0])

CASES: list[tuple[str, tuple[np.ndarray, ...], tuple[Any, ...], dict[str, Any]]] = [
    *(("diagonal.default", (WIDE,), (offset,), {}) for offset in (0, 1, 3, 4, 5, -1, -2, -3, -4)),
    *(("diagonal.default", (DEEP,), (offset, 2, 1), {}) for offset in (1, -2)),
    *(("diagonal_scatter.default", (WIDE, RNG.normal(size=(2,))), (offset,), {}) for offset in (2, -1)),
    *(("diag_embed.default", (DEEP,), (offset,), {}) for offset in (1, -2)),
    ("linalg_matrix_rank.atol_rtol_tensor", (MATRICES,), (), {"atol": TOLERANCES}),
    ("linalg_matrix_rank.atol_rtol_float", (MATRICES,), (), {"atol": 0.5}),
    ("linalg_matrix_rank.atol_rtol_float", (MATRICES,), (), {"rtol": 0.2}),
    ("linalg_matrix_rank.atol_rtol_float", (MATRICES,), (), {}),
    ("linalg_pinv.atol_rtol_tensor", (MATRICES,), (), {"atol": TOLERANCES}),
]


@pytest.mark.parametrize(("overload", "arrays", "args", "kwargs"), CASES)
def test_imported_as_aten_has_it(overload: str, arrays: tuple[np.ndarray, ...], args: tuple, kwargs: dict[str, Any]):
    b = REGISTRY.builder("one")
    feeds: list[np.ndarray] = []

    def given(array: np.ndarray) -> Any:
        feeds.append(array)
        return b.input(TensorType("f64", array.shape), "input", str(len(feeds)))

    tensors = [given(array) for array in arrays]
    named = {name: given(value) if isinstance(value, np.ndarray) else value for name, value in kwargs.items()}
    b.output(REGISTRY.importers[overload](b, *tensors, *args, **named), "output", "0")
    (got,) = interpret_graph(b.build(), feeds)
    name, _, variant = overload.partition(".")
    kernel = getattr(getattr(torch.ops.aten, name), variant)
    own = {name: to_torch(value) if isinstance(value, np.ndarray) else value for name, value in kwargs.items()}
    assert_close(got, to_numpy(kernel(*map(to_torch, arrays), *args, **own)))


@pytest.mark.parametrize("driver", ["gels", "gelsy", "gelsd", "gelss"])
@pytest.mark.parametrize(("rows", "columns"), [(4, 2), (2, 3)])
def test_least_squares_tell_what_their_driver_knows(driver: str, rows: int, columns: int):
    a, right = RNG.normal(size=(2, rows, columns)), RNG.normal(size=(2, rows, 1))
    b = REGISTRY.builder("one")
    values = [b.input(TensorType("f64", array.shape), "input", str(index)) for index, array in enumerate((a, right))]
    for index, value in enumerate(REGISTRY.importers["lstsq.default"](b, *values, driver=driver)):
        b.output(value, "output", str(index))
    wanted = torch.linalg.lstsq(to_torch(a), to_torch(right), driver=driver)
    for got, tensor in zip(interpret_graph(b.build(), [a, right]), wanted, strict=True):
        assert_close(got, to_numpy(tensor))
