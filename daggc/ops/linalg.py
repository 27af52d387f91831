"""Matrix products. ``matmul`` takes equal batch axes, ``linear`` keeps the layer's one fused kernel.

Importers make operands fit as torch does: vectors get an axis of size 1, a batch of matrices times one matrix
is folded into one product of matrices, other batch axes are broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import (
    add,
    broadcast,
    broadcast_shapes,
    broadcast_together,
    cast,
    conj,
    mul,
    norm_dim,
    permute,
    promote_dtypes,
    reshape,
    scale,
    sum_dims,
    transpose,
)
from daggc.ops.distance import import_cosine_similarity, import_renorm
from daggc.ops.einsum import import_einsum
from daggc.ops.opdef import (
    HOLOMORPHIC,
    Axes,
    Cost,
    OpDef,
    letters,
    node_bytes,
    register,
    require,
    sample,
    upcast,
)
from daggc.ops.products import (
    import_bilinear,
    import_block_diag,
    import_chain,
    import_cross,
    import_kron,
    import_linalg_cross,
    import_trace,
    import_triangle_indices,
    import_vander,
)
from daggc.ops.shape import Cotangents

# --- matmul -------------------------------------------------------------------------------------------


def _infer_matmul(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, y = inputs
    require(x.dtype == y.dtype != "bool", f"numbers of one dtype are required, got {x} and {y}")
    require(x.rank == y.rank >= 2, f"matrices of equal rank, at least 2, are required, got {x} and {y}")
    require(x.shape[:-2] == y.shape[:-2], f"equal batch axes are required, got {x.shape[:-2]} and {y.shape[:-2]}")
    require(
        x.shape[-1] == y.shape[-2],
        f"x.shape={x.shape} needs an innermost axis of the size of the last but one axis of y.shape={y.shape}",
    )
    return (x.with_(shape=(*x.shape[:-1], y.shape[-1])),)


def _matmul_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    (ct,), (x, y) = cts, node.inputs
    assert ct is not None
    return matmul(b, ct, transpose(b, y)), matmul(b, transpose(b, x), ct)


def gemm_cost(node: Node) -> Cost:
    """``2 m n k`` FLOPs: one multiplication and one addition for each output and element of the inner axis."""
    return Cost(2 * node.output.type.numel * node.inputs[0].type.shape[-1], node_bytes(node), "gemm")


def _matmul_cost(node: Node) -> Cost:
    """Of a product that makes much of little: it writes more than it reads, which is slow."""
    left, right = (value.type.shape for value in node.inputs)
    outer = 4 * left[-1] < min(left[-2], right[-1])
    return replace(gemm_cost(node), kernel="outer") if outer else gemm_cost(node)


def _matmul_axes(node: Node) -> Axes:
    batch = letters(node.output.type.rank - 2)
    return Axes(((*batch, "m", "k"), (*batch, "k", "n")), ((*batch, "m", "n"),), {"k": "sum"})


def matmul(b: Builder, x: Value, y: Value) -> Value:
    """The product of matrices with equal batch axes."""
    return b.emit("matmul", x, y)


def _import_matmul(b: Builder, x: Value, y: Value) -> Value:
    """torch.matmul: vectors are rows on the left and columns on the right."""
    first, second = x.type, y.type
    require(first.rank > 0 < second.rank, f"operands of at least 1 axis are required, got {first} and {second}")
    if first.rank == 1 or second.rank == 1:
        left = reshape(b, x, (1, first.numel)) if first.rank == 1 else x
        right = reshape(b, y, (second.numel, 1)) if second.rank == 1 else y
        product = _import_matmul(b, left, right)
        rows = () if first.rank == 1 else product.type.shape[-2:-1]
        columns = () if second.rank == 1 else product.type.shape[-1:]
        return reshape(b, product, (*product.type.shape[:-2], *rows, *columns))
    if second.rank == 2:
        return _fold(b, x, y)
    if first.rank == 2:  # torch folds the transposed product, so that the gradient of x is one product too
        return transpose(b, _fold(b, transpose(b, y), transpose(b, x)))
    batch = broadcast_shapes(first.shape[:-2], second.shape[:-2])
    return matmul(b, broadcast(b, x, (*batch, *first.shape[-2:])), broadcast(b, y, (*batch, *second.shape[-2:])))


def _fold(b: Builder, x: Value, y: Value) -> Value:
    """A batch of matrices times one matrix, as one product of matrices."""
    *lead, inner = x.type.shape
    product = matmul(b, reshape(b, x, (math.prod(lead), inner)), y)
    return reshape(b, product, (*lead, y.type.shape[-1]))


def _import_vdot(b: Builder, x: Value, y: Value) -> Value:
    return _import_matmul(b, conj(b, x), y)


def _import_vecdot(b: Builder, x: Value, y: Value, *, dim: int = -1) -> Value:
    x, y = broadcast_together(b, *_promoted(b, x, y))
    product = mul(b, conj(b, x), y)
    return sum_dims(b, product, (norm_dim(dim, product.type.rank),))


def _promoted(b: Builder, x: Value, y: Value) -> tuple[Value, Value]:
    dtype = promote_dtypes(x.type.dtype, y.type.dtype)
    return cast(b, x, dtype), cast(b, y, dtype)


def _import_outer(b: Builder, x: Value, y: Value) -> Value:
    x, y = _promoted(b, x, y)
    return mul(b, *broadcast_together(b, reshape(b, x, (x.type.numel, 1)), reshape(b, y, (1, y.type.numel))))


def _import_inner(b: Builder, x: Value, y: Value) -> Value:
    if not x.type.rank or not y.type.rank:
        return mul(b, *broadcast_together(b, x, y))
    rank = x.type.rank
    return _import_tensordot(b, x, y, (rank - 1,), (y.type.rank - 1,))


def _import_tensordot(b: Builder, x: Value, y: Value, dims_x: Sequence[int], dims_y: Sequence[int]) -> Value:
    """Axes of x multiplied with and summed over axes of y."""
    inner_x = [norm_dim(dim, x.type.rank) for dim in dims_x]
    inner_y = [norm_dim(dim, y.type.rank) for dim in dims_y]
    for i, j in zip(inner_x, inner_y, strict=True):
        if 1 in (x.type.shape[i], y.type.shape[j]):  # torch sums the other, as if the one were broadcast
            x, y = _summed_to(b, x, i, y.type.shape[j]), _summed_to(b, y, j, x.type.shape[i])
        require(
            x.type.shape[i] == y.type.shape[j], f"equal sizes are required, got axis {i} of {x.type}, {j} of {y.type}"
        )
    outer_x = [axis for axis in range(x.type.rank) if axis not in inner_x]
    outer_y = [axis for axis in range(y.type.rank) if axis not in inner_y]
    shape_x, shape_y = ([v.type.shape[axis] for axis in axes] for v, axes in ((x, outer_x), (y, outer_y)))
    size = math.prod(x.type.shape[axis] for axis in inner_x)
    left = reshape(b, permute(b, x, [*outer_x, *inner_x]), (math.prod(shape_x), size))
    right = reshape(b, permute(b, y, [*inner_y, *outer_y]), (size, math.prod(shape_y)))
    return reshape(b, matmul(b, left, right), (*shape_x, *shape_y))


def _summed_to(b: Builder, x: Value, dim: int, size: int) -> Value:
    return sum_dims(b, x, (dim,), keepdim=True) if size == 1 != x.type.shape[dim] else x


def _add_product(b: Builder, bias: Value, product: Value, beta: float, alpha: float) -> Value:
    """``beta * bias + alpha * product``; a beta of 0 ignores even a NaN in the bias, as in torch."""
    product = scale(b, product, alpha)
    return product if beta == 0 else add(b, product, scale(b, broadcast(b, bias, product.type.shape), beta))


def _import_add_product(
    b: Builder, bias: Value, x: Value, y: Value, *, beta: float = 1, alpha: float = 1, **_: Any
) -> Value:
    return _add_product(b, bias, _import_matmul(b, x, y), beta, alpha)


def _import_addr(b: Builder, bias: Value, x: Value, y: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    return _add_product(b, bias, _import_outer(b, x, y), beta, alpha)


def _import_addbmm(b: Builder, bias: Value, x: Value, y: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    """The sum over the batch is one product, with batch and inner axis merged."""
    return _add_product(b, bias, _import_tensordot(b, x, y, (0, 2), (0, 1)), beta, alpha)


register(
    OpDef(
        name="matmul",
        infer=_infer_matmul,
        evaluate=upcast(lambda node, x, y: np.matmul(x, y)),
        vjp=_matmul_vjp,
        complex=HOLOMORPHIC,
        cost=_matmul_cost,
        axes=_matmul_axes,
        lower=lambda node, args: f"torch.matmul({args[0]}, {args[1]})",
        aten={
            **dict.fromkeys(
                ("matmul.default", "mm.default", "bmm.default", "mv.default", "dot.default", "linalg_matmul.default"),
                _import_matmul,
            ),
            "vdot.default": _import_vdot,
            "linalg_vecdot.default": _import_vecdot,
            "outer.default": _import_outer,
            "ger.default": _import_outer,
            "inner.default": _import_inner,
            "tensordot.default": _import_tensordot,
            "baddbmm.default": _import_add_product,
            "addmv.default": _import_add_product,
            "addr.default": _import_addr,
            "addbmm.default": _import_addbmm,
            **dict.fromkeys(("chain_matmul.default", "linalg_multi_dot.default"), import_chain),
            "einsum.default": import_einsum,
            "kron.default": import_kron,
            "block_diag.default": import_block_diag,
            "trace.default": import_trace,
            "bilinear.default": import_bilinear,
            "cross.default": import_cross,
            "linalg_cross.default": import_linalg_cross,
            "linalg_vander.default": import_vander,
            "tril_indices.default": import_triangle_indices(upper=False),
            "triu_indices.default": import_triangle_indices(upper=True),
            "cosine_similarity.default": import_cosine_similarity,
            "renorm.default": import_renorm,
        },
        samples=(
            sample((3, 4), (4, 5)),
            sample((2, 3, 4), (2, 4, 1)),
            sample((2, 2, 1, 3), (2, 2, 3, 4)),
        ),
    )
)

# --- linear -------------------------------------------------------------------------------------------


def _infer_linear(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, weight, *bias = inputs
    require(len({value.dtype for value in inputs}) == 1, "inputs of one dtype are required")
    require(x.dtype != "bool", "numbers are required: torch has no product of bools")
    require(weight.rank == 2, f"a weight of 2 axes is required, got {weight}")
    require(
        x.rank > 0 and x.shape[-1] == weight.shape[1],
        f"x.shape={x.shape} needs an innermost axis of the size of the last axis of weight.shape={weight.shape}",
    )
    fits = not bias or (len(bias) == 1 and bias[0].shape == weight.shape[:1])
    require(fits, f"a bias of shape {weight.shape[:1]} is required, got {', '.join(map(str, bias))}")
    return (x.with_(shape=(*x.shape[:-1], weight.shape[0])),)


def _linear_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """The weight's gradient is one product over all rows; each gradient is the one kernel that torch uses."""
    (ct,), (x, weight, *bias) = cts, node.inputs
    assert ct is not None
    rows = math.prod(x.type.shape[:-1])
    flat_ct = reshape(b, ct, (rows, ct.type.shape[-1]))
    flat_x = reshape(b, x, (rows, x.type.shape[-1]))
    x_ct = reshape(b, matmul(b, flat_ct, weight), x.type.shape)
    return x_ct, matmul(b, transpose(b, flat_ct), flat_x), *(sum_dims(b, flat_ct, (0,)) for _ in bias)


def _evaluate_linear(node: Node, x: np.ndarray, weight: np.ndarray, *bias: np.ndarray) -> np.ndarray:
    product = np.matmul(x, weight.T)
    return product + bias[0] if bias else product


def _linear_axes(node: Node) -> Axes:
    """The inner axis is needed whole where there is a bias: slices would add it several times."""
    lead = letters(node.output.type.rank - 1)
    bias = len(node.inputs) == 3
    inner = None if bias else "k"
    inputs = ((*lead, inner), ("n", inner), *([("n",)] if bias else []))
    return Axes(inputs, ((*lead, "n"),), {} if bias else {"k": "sum"})


def _import_linear(b: Builder, x: Value, weight: Value, bias: Value | None = None) -> Value:
    if weight.type.rank == 1:
        product = _import_matmul(b, x, weight)
        return product if bias is None else add(b, product, broadcast(b, bias, product.type.shape))
    return b.emit("linear", x, weight, *([] if bias is None else [bias]))


def _import_addmm(b: Builder, bias: Value, x: Value, y: Value, *, beta: float = 1, alpha: float = 1, **_: Any) -> Value:
    """A row added to each row of a product is a ``linear`` with the weight transposed: one fused kernel."""
    if beta == alpha == 1 and bias.type.shape == y.type.shape[-1:] and not x.type.is_integer:
        return b.emit("linear", x, transpose(b, y), bias)
    return _add_product(b, bias, matmul(b, x, y), beta, alpha)


register(
    OpDef(
        name="linear",
        infer=_infer_linear,
        evaluate=upcast(_evaluate_linear),
        vjp=_linear_vjp,
        complex=HOLOMORPHIC,
        cost=gemm_cost,
        axes=_linear_axes,
        lower=lambda node, args: f"torch.nn.functional.linear({', '.join(args)})",
        aten={"linear.default": _import_linear, "addmm.default": _import_addmm},
        samples=(
            sample((3, 4), (5, 4)),
            sample((2, 3, 4), (5, 4), (5,)),
            sample((4,), (2, 4), (2,)),
        ),
    )
)
