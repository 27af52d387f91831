"""Where ops are at the edge of what is defined: the interpreter gives what the generated code gives."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_close, run_torch

from daggc.interp import interpret_graph
from daggc.ir.graph import Graph
from daggc.ir.types import TensorType, dtype_of
from daggc.ops import REGISTRY


def one_op(op: str, *arrays: np.ndarray, **attrs) -> Graph:
    b = REGISTRY.builder("forward")
    types = [TensorType(dtype_of(array), array.shape) for array in arrays]
    inputs = [b.input(type_, "input", str(index)) for index, type_ in enumerate(types)]
    for index, value in enumerate(b.emit_many(op, *inputs, **attrs)):
        b.output(value, "output", str(index))
    return b.build()


def agree(op: str, *arrays: np.ndarray, **attrs) -> None:
    graph = one_op(op, *arrays, **attrs)
    with np.errstate(all="ignore"):
        found = interpret_graph(graph, arrays)
    for got, want in zip(found, run_torch(graph, arrays), strict=True):
        assert_close(got, want, op)


EXPONENTS = np.array([0, -0.0, 1, -1, 1j, 2 + 1j, -2 + 1j, 2.5])


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_powers_of_zero(dtype: type):
    """0 ** 0 is nan between tensors, and 1 where the exponent is a number of the program."""
    y = EXPONENTS.astype(dtype)
    agree("pow", np.zeros_like(y), y)
    agree("rpow_scalar", y, value=0.0)
    agree("rpow_scalar", y, value=2.0)
    for exponent in (0, 0.0, -1, -0.5, -3, 2, 1j, -1 + 1j):
        agree("pow_scalar", np.array([0, 1 + 2j], dtype), value=exponent)


def test_complex_powers_of_what_is_infinite():
    y = EXPONENTS
    for x in (np.inf, -np.inf, complex(0, np.inf), complex(1, -np.inf)):
        agree("pow", np.full_like(y, x), y)


@pytest.mark.parametrize("zero_infinity", [False, True])
def test_a_ctc_gradient_is_zero_after_the_end_of_the_input(zero_infinity: bool):
    """Also where its cotangent is nan, and of targets that no alignment gives."""
    scores = np.random.default_rng(0).normal(size=(4, 3, 3))
    targets, lengths = np.ones((3, 2), np.int64), np.array([[0, 3, 1], [1, 1, 2]])
    for ct in (np.nan, 1.0):
        operands = (np.full(3, ct), scores, targets, *lengths)
        agree("ctc_loss_backward", *operands, blank=2, zero_infinity=zero_infinity)


@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_ctc_of_scores_that_are_not_finite(score: float, zero_infinity: bool):
    """No probability at all, such as a masked class has, gives a gradient of nan, as in torch."""
    for place in ((0, 0, 0), (2, 0, 2)):
        scores = np.random.default_rng(0).normal(size=(4, 2, 3))
        scores[place] = score
        operands = scores, np.array([[0, 1], [1, 1]]), np.array([4, 3]), np.array([2, 1])
        agree("ctc_loss", *operands, blank=2, zero_infinity=zero_infinity)
        agree("ctc_loss_backward", np.ones(2), *operands, blank=2, zero_infinity=zero_infinity)


def test_the_exponential_of_matrices_that_are_almost_constant():
    """SciPy's is off by thousands of roundings there."""
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 4):
        x = 2 + 0.02 * rng.normal(size=(8, size, size))
        graph = one_op("matrix_exp", x)
        (got,), (want,) = interpret_graph(graph, [x]), run_torch(graph, [x])
        np.testing.assert_allclose(got, want, rtol=200 * 2.0**-52)


@pytest.mark.parametrize("entry", [np.inf, -np.inf, np.nan, 1e200])
def test_the_exponential_of_matrices_that_are_not_finite(entry: float):
    for size in (1, 2, 3):
        x = np.eye(size)
        x[0, -1] = entry
        agree("matrix_exp", x)
        if not np.isfinite(entry):
            agree("matrix_exp", np.full((size, size), entry))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, np.inf])
def test_distances_of_what_is_not_finite(p: float):
    """The largest difference passes over nan, but not its derivative; the other distances do not."""
    for number in (np.nan, np.inf):
        x = np.arange(15.0).reshape(1, 3, 5) ** 1.3
        x[0, 1, 2] = number
        y = np.ones((1, 2, 5))
        (distances,) = run_torch(one_op("cdist", x, y, p=p), [x, y])
        agree("cdist", x, y, p=p)
        agree("cdist_backward", np.arange(1.0, 7.0).reshape(1, 3, 2), x, y, distances, p=p)
