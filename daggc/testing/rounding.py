"""How far the results of a graph move when every operation rounds otherwise: what two implementations may be apart.

Stochastic arithmetic, after Vignes, "A stochastic arithmetic for reliable scientific computation" (1993).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from daggc.interp import evaluate_node
from daggc.ir.graph import Graph
from daggc.ir.types import dtype_of

EPS = {"f64": 2.0**-52, "f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7, "c64": 2.0**-23, "c128": 2.0**-52}
ROUNDINGS = 64  # that two ways to compute one op may differ by
MOVES = (  # round nothing
    *("where", "where_scalar", "split", "reshape", "permute", "slice", "neg", "abs", "relu", "broadcast", "concat"),
    *("pad", "slice_update", "stop_gradient", "gather", "index_select", "index", "embedding"),
    *("flip", "scatter", "im2col"),
)
# Nor do these; were what they picked rounded, it would be equal to none of what they picked it from.
PICKS = ("max", "min", "amax", "amin", "median", "nanmedian", "median_along", "nanmedian_along", "kthvalue", "mode")
# The difference of a number and a mean, which is small where all numbers are alike, times rstd, which is then large.
NORMS = ("layer_norm", "group_norm", "batch_norm")
# Linear in each operand: terms are added in one order or another, and may cancel.
SUMS = (
    *("sum", "mean", "cumsum", "linear", "matmul", "conv", "conv_input_grad", "conv_weight_grad"),
    *("avg_pool", "avg_pool_backward", "adaptive_avg_pool", "adaptive_avg_pool_backward", "max_pool_backward"),
    *("embedding_backward", "index_add", "scatter_add", "col2im", "interpolate", "interpolate_backward"),
    *("upsample_nearest_backward", "fft_c2c", "fft_c2r", "fft_r2c"),
)
NORMS_BACKWARD = ("layer_norm_backward", "group_norm_backward", "batch_norm_backward")
ROUGH = {
    "digamma": 1e6,
    "polygamma": 3e6,
    "zeta": 1e6,
    "ndtri": 100.0,
    **dict.fromkeys(("bessel_j0", "bessel_j1", "bessel_y0", "bessel_y1"), 1e5),
    "matrix_exp": 30.0,
}  # roundings that torch's series are off by


def rounded_otherwise(graph: Graph, arrays: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """Interpret a graph with every float off by a unit in the last place, one way or the other.

    How far results move by it is how far two correct implementations may be apart.
    """
    rng = np.random.default_rng(seed)

    def shaken(array: np.ndarray, times: float = 1.0) -> np.ndarray:
        dtype = dtype_of(array)
        if dtype not in EPS or not array.size:
            return array
        noise = 1 + times * EPS[dtype] * rng.choice((-1.0, 1.0), array.shape)
        if dtype in ("c64", "c128"):  # of the modulus: which side of a branch cut a number is on, rounding may decide
            noise = noise + 1j * times * EPS[dtype] * rng.choice((-1.0, 1.0), array.shape)
        with np.errstate(all="ignore"):
            return np.asarray(array * noise).astype(array.dtype)

    def shifted(array: np.ndarray, size: np.ndarray | float, eps: float) -> np.ndarray:
        noise = size * eps * rng.choice((-1.0, 1.0), array.shape)
        with np.errstate(all="ignore"):
            return np.asarray(array + noise).astype(array.dtype)

    values = {port.value.name: shaken(array) for port, array in zip(graph.inputs, arrays, strict=True)}
    for node in graph.nodes:
        operands = [values[value.name] for value in node.inputs]
        results = evaluate_node(node, operands)
        narrow = max(
            (EPS[v.type.dtype] for v in node.inputs if v.type.dtype in ("f16", "bf16", "f32", "c64")), default=0.0
        )
        cancelled = terms_of_norm(node.op, operands, results)
        terms = evaluate_node(node, [np.abs(x).astype(x.dtype) for x in operands]) if node.op in SUMS else None
        for value, result in zip(node.outputs, results, strict=True):
            # f32 statistics of bf16 numbers, or the f64 norm of f32 ones, may have been rounded on the way
            times = max(ROUGH.get(node.op, 1.0), narrow / EPS.get(value.type.dtype, 1.0))
            exact = node.op in (*MOVES, *PICKS, "cast")
            values[value.name] = result if exact else shaken(result, times)
            if cancelled and (node.op in NORMS_BACKWARD or value is node.outputs[0]):
                eps = min(EPS[value.type.dtype], EPS["f32"])
                values[value.name] = shifted(values[value.name], cancelled, eps)
            if node.attrs.graphs and value.type.dtype in EPS:  # what cancels inside, nothing out here tells
                size = np.abs(result).max(initial=0.0)
                values[value.name] = shifted(values[value.name], size, ROUNDINGS * EPS[value.type.dtype])
            if terms is not None and value.type.dtype in EPS:
                values[value.name] = shifted(values[value.name], np.abs(terms[0]), EPS[value.type.dtype])
    return [values[port.value.name] for port in graph.outputs]


def terms_of_norm(op: str, operands: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> float:
    """How large the terms of a norm are that cancel where all numbers are alike; 0 of other ops.

    Their rounding is what is left then, of results that are zero, which no relative error moves.
    """
    if op in NORMS:  # x, rstd, weight
        factors = (operands[0], results[2], *operands[1:2])
    elif op in NORMS_BACKWARD:  # ct, x, rstd, weight
        factors = (*operands[:2], *operands[3:])
    else:
        return 0.0
    with np.errstate(all="ignore"):
        size = math.prod(max(1.0, float(np.abs(x.astype(np.float64)).max(initial=0.0))) for x in factors)
    return size if math.isfinite(size) else 0.0
