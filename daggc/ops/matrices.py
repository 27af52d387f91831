"""What rules of matrix decompositions say often: type rules of batches of matrices, triangles, diagonals, adjoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.linalg import get_lapack_funcs

from daggc.ir.attrs import Attrs, Dense
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import DTYPES, TensorType
from daggc.ops.build import broadcast, broadcast_shapes, cast, conj, full, reshape, transpose
from daggc.ops.opdef import Axes, Cost, letters, node_bytes, require
from daggc.ops.slicing import diagonal, slice_dim

REAL = ("f32", "f64")
LAPACK = (*REAL, "c64", "c128")  # dtypes of torch's decompositions
EPS = {dtype: float(np.finfo(DTYPES[dtype].numpy).eps) for dtype in LAPACK}

# --- type rules ---------------------------------------------------------------------------------------


def require_matrices(x: TensorType, square: bool = False, dtypes: Sequence[str] = LAPACK) -> None:
    """Raise TypeRuleError unless x is a batch of (square) matrices of one of the dtypes."""
    require(x.dtype in dtypes, f"a dtype of {', '.join(dtypes)} is required, got {x}")
    require(x.rank >= 2, f"matrices are required, got {x}")
    require(not square or x.shape[-1] == x.shape[-2], f"square matrices are required, got {x}")


def require_system(a: TensorType, b: TensorType, left: bool = True) -> None:
    """Raise TypeRuleError unless ``a @ x = b`` (``x @ a = b`` unless ``left``) is a system with one batch of both."""
    require_matrices(a, square=True)
    require(a.dtype == b.dtype and a.rank == b.rank, f"one dtype and rank are required, got {a} and {b}")
    require(a.shape[:-2] == b.shape[:-2], f"equal batch axes are required, got {a.shape[:-2]} and {b.shape[:-2]}")
    size = b.shape[-2 if left else -1]
    require(size == a.shape[-1], f"a right-hand side of {a.shape[-1]} {'rows' if left else 'columns'} is required: {b}")


def require_flags(attrs: Attrs, *names: str) -> None:
    """Raise TypeRuleError unless these attributes, and no others, are bools."""
    require(set(attrs) == set(names), f"attributes {', '.join(names)} are required, got {', '.join(attrs)}")
    for name in names:
        require(isinstance(attrs[name], bool), f"{name} must be a bool, got {attrs[name]!r}")


def info_type(x: TensorType) -> TensorType:
    """LAPACK's verdict on each matrix of a batch."""
    return TensorType("i32", x.shape[:-2])


def cubic_cost(factor: float) -> Callable[[Node], Cost]:
    """``factor * elements * smaller side`` FLOPs of the largest input, at a rate well below a product's."""

    def cost(node: Node) -> Cost:
        flops = max((x.type.numel * min(x.type.shape[-2:]) for x in node.inputs if x.type.rank >= 2), default=0)
        return Cost(factor * flops, node_bytes(node), "opaque")

    return cost


def batch_axes(*ranks: int) -> Callable[[Node], Axes]:
    """The axes before the last ``ranks[i]`` of each input, then of each output, pass through; the others are whole."""

    def rule(node: Node) -> Axes:
        values = (*node.inputs, *node.outputs)
        labels = [
            (*letters(value.type.rank - whole), *(None,) * whole) for value, whole in zip(values, ranks, strict=True)
        ]
        return Axes(tuple(labels[: len(node.inputs)]), tuple(labels[len(node.inputs) :]))

    return rule


# --- the meaning, in NumPy ----------------------------------------------------------------------------


def widened(array: np.ndarray) -> np.ndarray:
    """f64 or c128: what a decomposition is evaluated in, so that f32 is rounded once."""
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def per_matrix(function: Callable[..., Any]) -> Callable[..., tuple[np.ndarray, ...]]:
    """A rule ``evaluate(node, *arrays)`` from ``function(node, *matrices) -> results`` of one matrix of each batch.

    Nothing is computed where an input has no elements: outputs are zeros then.
    """

    def evaluate(node: Node, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        outputs = tuple(np.zeros(value.type.shape, value.type.numpy_dtype) for value in node.outputs)
        arrays = tuple(widened(x) if x.dtype.kind in "fc" else x for x in arrays)
        for index in np.ndindex(node.inputs[0].type.shape[:-2]):
            matrices = [x[index] for x in arrays]
            if all(x.size for x in matrices):
                for output, result in zip(outputs, function(node, *matrices), strict=True):
                    output[index] = result
        return outputs

    return evaluate


def lapack(name: str, *arrays: np.ndarray, **options: Any) -> tuple[Any, ...]:
    """Call a LAPACK function of the arrays' dtype."""
    return get_lapack_funcs((name,), arrays)[0](*arrays, **options)


def check(node: Node, info: int, problem: str) -> None:
    """Raise LinAlgError if the node asks for it and LAPACK reports a problem."""
    if info and node.attrs["check_errors"]:
        raise np.linalg.LinAlgError(f"{node.op}: the input matrix is {problem} (LAPACK: {info})")


# --- parts of matrices --------------------------------------------------------------------------------


def adjoint(b: Builder, x: Value) -> Value:
    """The conjugate transpose."""
    return conj(b, transpose(b, x))


def matmul(b: Builder, *factors: Value) -> Value:
    """The product of matrices with equal batch axes, from left to right."""
    result = factors[0]
    for factor in factors[1:]:
        result = b.emit("matmul", result, factor)
    return result


def _mask(b: Builder, shape: Sequence[int], compare: str, offset: int = 0) -> Value:
    """Where ``column <compare> row + offset``, in every matrix of a batch."""
    rows, columns = shape[-2:]
    first = b.emit("iota", start=offset, step=1, size=rows, dtype="i64")
    second = b.emit("iota", start=0, step=1, size=columns, dtype="i64")
    row = broadcast(b, reshape(b, first, (rows, 1)), (rows, columns))
    return broadcast(b, b.emit(compare, broadcast(b, second, (rows, columns)), row), shape)


def triangle(b: Builder, x: Value, upper: bool, offset: int = 0) -> Value:
    """torch.triu or torch.tril."""
    return b.emit("where_scalar", _mask(b, x.type.shape, "ge" if upper else "le", offset), x, value=0.0)


def off_diagonal(b: Builder, x: Value, value: float) -> Value:
    """x, with one number all over the diagonal."""
    return b.emit("where_scalar", _mask(b, x.type.shape, "ne"), x, value=value)


def half_diagonal(b: Builder, x: Value) -> Value:
    """x, with its diagonal halved."""
    return b.emit("where", _mask(b, x.type.shape, "ne"), x, b.emit("mul_scalar", x, value=0.5))


def eye(b: Builder, like: TensorType, rows: int, columns: int | None = None) -> Value:
    """Identity matrices, of the batch axes and dtype of a type."""
    columns = rows if columns is None else columns
    mask = _mask(b, (*like.shape[:-2], rows, columns), "eq")
    return cast(b, mask, like.dtype)


def diagonal_of(b: Builder, x: Value) -> Value:
    """The main diagonals, as a last axis."""
    return diagonal(b, x, 0, -2, -1)


def diagonal_matrix(b: Builder, x: Value) -> Value:
    """Square matrices with the last axis as the main diagonal."""
    size = x.type.shape[-1]
    rows = broadcast(b, reshape(b, x, (*x.type.shape, 1)), (*x.type.shape, size))
    return b.emit("where_scalar", _mask(b, rows.type.shape, "eq"), rows, value=0.0)


def columns_times(b: Builder, x: Value, factors: Value) -> Value:
    """``x @ diag(factors)``."""
    return b.emit("mul", x, _along(b, factors, -2, x.type.shape))


def columns_over(b: Builder, x: Value, divisors: Value) -> Value:
    """``x @ diag(1 / divisors)``."""
    return b.emit("div", x, _along(b, divisors, -2, x.type.shape))


def rows_times(b: Builder, factors: Value, x: Value) -> Value:
    """``diag(factors) @ x``."""
    return b.emit("mul", x, _along(b, factors, -1, x.type.shape))


def rows_over(b: Builder, x: Value, divisors: Value) -> Value:
    """``diag(1 / divisors) @ x``."""
    return b.emit("div", x, _along(b, divisors, -1, x.type.shape))


def differences(b: Builder, x: Value) -> Value:
    """``x[j] - x[i]`` at row i and column j."""
    shape = (*x.type.shape, x.type.shape[-1])
    return b.emit("sub", _along(b, x, -2, shape), _along(b, x, -1, shape))


def _along(b: Builder, x: Value, dim: int, shape: Sequence[int]) -> Value:
    """A batch of vectors, broadcast over a new axis."""
    place = x.type.rank + 1 + dim
    return broadcast(b, reshape(b, x, (*x.type.shape[:place], 1, *x.type.shape[place:])), shape)


def left_columns(b: Builder, x: Value, count: int) -> Value:
    return slice_dim(b, x, x.type.rank - 1, 0, count)


def right_columns(b: Builder, x: Value, start: int) -> Value:
    return slice_dim(b, x, x.type.rank - 1, start, x.type.shape[-1])


def top_rows(b: Builder, x: Value, count: int) -> Value:
    return slice_dim(b, x, x.type.rank - 2, 0, count)


def bottom_rows(b: Builder, x: Value, start: int) -> Value:
    return slice_dim(b, x, x.type.rank - 2, start, x.type.shape[-2])


def total(b: Builder, terms: Sequence[Value | None]) -> Value | None:
    """The sum of the terms that there are."""
    result: Value | None = None
    for term in terms:
        if term is not None:
            result = term if result is None else b.emit("add", result, term)
    return result


def broadcast_batches(b: Builder, x: Value, y: Value) -> tuple[Value, Value]:
    """Two batches of matrices with common batch axes."""
    batch = broadcast_shapes(x.type.shape[:-2], y.type.shape[:-2])
    return broadcast(b, x, (*batch, *x.type.shape[-2:])), broadcast(b, y, (*batch, *y.type.shape[-2:]))


def zeros(b: Builder, like: TensorType, shape: Sequence[int]) -> Value:
    return full(b, 0.0, shape, like.dtype)


def constant_indices(b: Builder, indices: np.ndarray) -> Value:
    """i64 indices as part of the program's text. Raises NotImplementedError for more than a few thousand."""
    if indices.size > 2**14:
        raise NotImplementedError("indices that are part of the program's text are few")
    return b.emit("constant", value=Dense.of(indices.astype(np.int64)))
