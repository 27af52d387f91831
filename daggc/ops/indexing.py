"""Reading and writing along one axis by index: embedding, gather, scatter, index_select, index_add.

Indices are not negative. ``gather`` and the scatters take tensors that agree on all axes but ``dim``:
importers cut to size what torch allows to be larger.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import Scalar, broadcast, broadcast_shapes, cast, full, norm_dim, reshape, scale, zeros_like
from daggc.ops.opdef import (
    AS_IT_IS,
    Arg,
    Axes,
    Importer,
    OpDef,
    Sample,
    copy_cost,
    elementwise_cost,
    letters,
    register,
    require,
    t,
    upcast,
)
from daggc.ops.shape import Cotangents, unsqueeze, whole_along
from daggc.ops.slicing import axes_but_dim, slice_dim
from daggc.ops.strided import import_as_strided, import_as_strided_scatter


def bounded(index: np.ndarray, size: int) -> np.ndarray:
    """The index. Raises IndexError where it is outside an axis: NumPy would take -1 for the last."""
    if index.size and (index.min() < 0 or index.max() >= size):
        raise IndexError(f"indices must be in [0, {size}), got {index.min()} to {index.max()}")
    return index


def _require_index(index: TensorType, rows: int) -> None:
    require(index.dtype in ("i64", "i32"), f"indices must be i64 or i32, got {index}")
    require_room(index, rows)


def require_room(index: TensorType, size: int) -> None:
    """No index is into an axis of size 0; of some of them torch says so, some it ignores."""
    require(size > 0 or not index.numel, f"indices must be in [0, 0): there are none such for {index}")


# --- embedding ----------------------------------------------------------------------------------------


def _infer_embedding(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    weight, index = inputs
    require(weight.rank == 2, f"a weight of 2 axes is required, got {weight}")
    _require_index(index, weight.shape[0])
    _require_padding(attrs["padding_idx"], weight.shape[0])
    return (weight.with_(shape=(*index.shape, weight.shape[1])),)


def _require_padding(padding: Attr, rows: int) -> None:
    require(padding is None or 0 <= padding < rows, f"padding_idx must be None or in [0, {rows}), got {padding}")


def _infer_embedding_backward(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    ct, index = inputs
    _require_index(index, attrs["num_weights"])
    require(ct.shape[:-1] == index.shape and ct.rank > 0, f"a cotangent for each index is required, got {ct}, {index}")
    _require_padding(attrs["padding_idx"], attrs["num_weights"])
    return (ct.with_(shape=(attrs["num_weights"], ct.shape[-1])),)


def _embedding_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """The row of ``padding_idx`` gets no gradient."""
    (ct,), (weight, index) = cts, node.inputs
    assert ct is not None
    attrs = {"num_weights": weight.type.shape[0], "padding_idx": node.attrs["padding_idx"]}
    return b.emit("embedding_backward", ct, index, **attrs), None


def _embedding_backward_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    (ct,), index, padding = cts, node.inputs[1], node.attrs["padding_idx"]
    assert ct is not None
    rows = b.emit("embedding", ct, index, padding_idx=padding)
    if padding is None:
        return rows, None
    kept = unsqueeze(b, b.emit("ne_scalar", index, value=padding), -1)
    return b.emit("where_scalar", broadcast(b, kept, rows.type.shape), rows, value=0.0), None


def _evaluate_embedding_backward(node: Node, ct: np.ndarray, index: np.ndarray) -> np.ndarray:
    result = np.zeros(node.output.type.shape, ct.dtype)
    kept = index != node.attrs["padding_idx"] if node.attrs["padding_idx"] is not None else index >= 0
    np.add.at(result, bounded(index[kept], result.shape[0]), ct[kept])
    return result


def _embedding_axes(node: Node) -> Axes:
    index = letters(node.inputs[1].type.rank)
    return Axes(((None, "e"), index), ((*index, "e"),))


def _embedding_backward_axes(node: Node) -> Axes:
    index = letters(node.inputs[1].type.rank)
    return Axes(((*index, "e"), index), ((None, "e"),), dict.fromkeys(index, "sum"))


def _padding(node: Node) -> int:
    return -1 if node.attrs["padding_idx"] is None else node.attrs["padding_idx"]


def average_row_gradients(b: Builder, weight: Value, index: Value) -> Value:
    """The weight; the gradient of each row is divided by the number of times that the index has it."""
    rows, dtype = weight.type.shape[0], weight.type.dtype
    ones = full(b, 1.0, (index.type.numel,), dtype)
    counts = b.emit("index_add", full(b, 0.0, (rows,), dtype), _flat(b, index), ones, dim=0)
    counts = unsqueeze(b, b.emit("maximum_scalar", counts, value=1.0), 1)
    fixed = b.emit("stop_gradient", weight)
    nothing = b.emit("div", b.emit("sub", weight, fixed), broadcast(b, counts, weight.type.shape))
    return b.emit("add", fixed, nothing)


def _import_embedding(
    b: Builder,
    weight: Value,
    index: Value,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Value:
    if sparse:
        raise TypeRuleError("an embedding with dense gradients is required, got sparse=True")
    if scale_grad_by_freq:
        weight = average_row_gradients(b, weight, index)
    return b.emit("embedding", weight, index, padding_idx=padding_idx if padding_idx >= 0 else None)


def _import_embedding_backward(
    b: Builder, ct: Value, index: Value, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Value:
    if scale_grad_by_freq:
        raise TypeRuleError("the backward of an embedding with unscaled gradients is required")
    padding = padding_idx if padding_idx >= 0 else None
    return b.emit("embedding_backward", ct, index, num_weights=num_weights, padding_idx=padding)


def index_arg(*shape: int, below: int) -> Arg:
    return Arg(t(*shape, dtype="i64"), f"index:{below}")


register(
    OpDef(
        name="embedding",
        infer=_infer_embedding,
        evaluate=lambda node, weight, index: weight[bounded(index, weight.shape[0])],
        vjp=_embedding_vjp,
        complex=AS_IT_IS,
        cost=copy_cost,
        axes=_embedding_axes,
        lower=lambda node, args: f"torch.embedding({args[0]}, {args[1]}, {_padding(node)})",
        aten={"embedding.default": _import_embedding},
        samples=(
            Sample((Arg(t(5, 3)), index_arg(2, 4, below=5)), {"padding_idx": None}),
            Sample((Arg(t(3, 2)), index_arg(6, below=3)), {"padding_idx": 1}),
            Sample((Arg(t(3, 2)), index_arg(below=3)), {"padding_idx": None}),
        ),
    )
)
register(
    OpDef(
        name="embedding_backward",
        infer=_infer_embedding_backward,
        evaluate=upcast(_evaluate_embedding_backward),
        vjp=_embedding_backward_vjp,
        complex=AS_IT_IS,
        cost=elementwise_cost(1),
        axes=_embedding_backward_axes,
        lower=lambda node, args: (
            f"torch.ops.aten.embedding_dense_backward({args[0]}, {args[1]}, "
            f"{node.attrs['num_weights']}, {_padding(node)}, False)"
        ),
        aten={"embedding_dense_backward.default": _import_embedding_backward},
        samples=(
            Sample((Arg(t(2, 4, 3)), index_arg(2, 4, below=5)), {"num_weights": 5, "padding_idx": None}),
            Sample((Arg(t(6, 2)), index_arg(6, below=3)), {"num_weights": 3, "padding_idx": 1}),
        ),
    )
)

# --- gather and scatter -------------------------------------------------------------------------------


def _frame(x: TensorType, dim: int) -> tuple[int, ...]:
    require(0 <= dim < x.rank, f"dim must be an axis of {x}, got {dim}")
    return x.shape[:dim] + x.shape[dim + 1 :]


def _infer_gather(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x, index), dim = inputs, attrs["dim"]
    require(index.dtype == "i64", f"i64 indices are required, got {index}")
    fits = index.rank == x.rank and _frame(index, dim) == _frame(x, dim)
    require(fits, f"an index of the shape of {x}, but for axis {dim}, is required, got {index}")
    require_room(index, x.shape[dim])
    return (x.with_(shape=index.shape),)


def infer_scatter(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    base, index, source = inputs
    (wanted,) = _infer_gather((base, index), attrs)
    require(source == wanted, f"a source of type {wanted} is required, got {source}")
    return (base,)


def _gather_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    (ct,), (x, index) = cts, node.inputs
    assert ct is not None
    return b.emit("scatter_add", zeros_like(b, x), index, ct, dim=node.attrs["dim"]), None


def _scatter_add_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    assert cts[0] is not None
    return cts[0], None, b.emit("gather", cts[0], node.inputs[1], dim=node.attrs["dim"])


def _scatter_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    (ct,), (_, index, source), dim = cts, node.inputs, node.attrs["dim"]
    assert ct is not None
    outside = b.emit("scatter", ct, index, zeros_like(b, source), dim=dim)
    return outside, None, b.emit("gather", ct, index, dim=dim)


def _evaluate_gather(node: Node, x: np.ndarray, index: np.ndarray) -> np.ndarray:
    dim = node.attrs["dim"]
    return np.take_along_axis(x, bounded(index, x.shape[dim]), dim)


def _evaluate_scatter(node: Node, base: np.ndarray, index: np.ndarray, source: np.ndarray) -> np.ndarray:
    result, dim = base.copy(), node.attrs["dim"]
    np.put_along_axis(result, bounded(index, base.shape[dim]), source, dim)
    return result


def _evaluate_scatter_add(node: Node, base: np.ndarray, index: np.ndarray, source: np.ndarray) -> np.ndarray:
    result, dim = base.copy(), node.attrs["dim"]
    places = list(np.indices(index.shape, sparse=True))
    places[dim] = bounded(index, base.shape[dim])
    np.add.at(result, tuple(places), source)
    return result


def _gather_axes(node: Node) -> Axes:
    labels, dim = letters(node.output.type.rank), node.attrs["dim"]
    return Axes((whole_along((dim,), len(labels)), labels), (labels,))


def _crop(b: Builder, x: Value, shape: Sequence[int], but: int | None = None) -> Value:
    """The leading corner of x of a given shape; axis ``but`` stays as it is."""
    for dim, size in enumerate(shape):
        if dim != but:
            x = slice_dim(b, x, dim, 0, size)
    return x


def _import_gather(b: Builder, x: Value, dim: int, index: Value, **_: object) -> Value:
    index = cast(b, index, "i64")
    if not index.type.numel or not x.type.rank or not index.type.rank:  # an empty index may have any rank
        picked = b.emit("gather", _flat(b, x), _flat(b, index), dim=0)
        return reshape(b, picked, index.type.shape)
    dim = norm_dim(dim, x.type.rank)
    return b.emit("gather", _crop(b, x, index.type.shape, but=dim), index, dim=dim)


def _flat(b: Builder, x: Value) -> Value:
    return reshape(b, x, (x.type.numel,))


def emit_scatter(b: Builder, op: str, base: Value, dim: int, index: Value, source: Value, **attrs: Attr) -> Value:
    """Scatter into the corner of ``base`` that the index covers."""
    index = cast(b, index, "i64")
    if not base.type.rank:
        return reshape(b, b.emit(op, _flat(b, base), _flat(b, index), _flat(b, source), dim=0, **attrs), ())
    if not index.type.rank:
        index, source = _flat(b, index), _flat(b, source)
    if not index.type.numel:
        return base
    dim, shape = norm_dim(dim, base.type.rank), index.type.shape
    source = _crop(b, source, shape)
    axis = next((a for a, n in enumerate(shape) if a != dim and n != base.type.shape[a]), None)
    if axis is None:
        return b.emit(op, base, index, source, dim=dim, **attrs)
    corner = emit_scatter(b, op, slice_dim(b, base, axis, 0, shape[axis]), dim, index, source, **attrs)
    return b.emit("slice_update", base, corner, dim=axis, start=0, end=shape[axis], step=1)


def _import_scatter(op: str) -> Importer:
    def importer(b: Builder, base: Value, dim: int, index: Value, source: Value | Scalar) -> Value:
        if not isinstance(source, Value):
            source = full(b, source, index.type.shape, base.type.dtype)
        return emit_scatter(b, op, base, dim, index, source)

    return importer


def _import_take_along_dim(b: Builder, x: Value, index: Value, dim: int | None = None) -> Value:
    """``gather`` with shapes that broadcast, and indices that may count from the end."""
    if dim is None:
        return _import_take_along_dim(b, _flat(b, x), _flat(b, index), 0)
    dim = norm_dim(dim, x.type.rank)
    shape = broadcast_shapes(
        (*x.type.shape[:dim], 1, *x.type.shape[dim + 1 :]), (*index.type.shape[:dim], 1, *index.type.shape[dim + 1 :])
    )
    x, index = (broadcast(b, v, (*shape[:dim], v.type.shape[dim], *shape[dim + 1 :])) for v in (x, index))
    wrapped = b.emit("add_scalar", index, value=x.type.shape[dim])
    from_start = b.emit("where", b.emit("lt_scalar", index, value=0), wrapped, index)
    return b.emit("gather", x, cast(b, from_start, "i64"), dim=dim)


register(
    OpDef(
        name="gather",
        infer=_infer_gather,
        evaluate=_evaluate_gather,
        vjp=_gather_vjp,
        complex=AS_IT_IS,
        cost=copy_cost,
        axes=_gather_axes,
        lower=lambda node, args: f"torch.gather({args[0]}, {node.attrs['dim']}, {args[1]})",
        aten={"gather.default": _import_gather, "take_along_dim.default": _import_take_along_dim},
        samples=(
            Sample((Arg(t(3, 4)), index_arg(3, 2, below=4)), {"dim": 1}),
            Sample((Arg(t(3, 4)), index_arg(5, 4, below=3)), {"dim": 0}),
        ),
    )
)
register(
    OpDef(
        name="scatter",
        infer=infer_scatter,
        evaluate=_evaluate_scatter,
        vjp=_scatter_vjp,
        complex=AS_IT_IS,
        cost=copy_cost,
        axes=axes_but_dim,
        lower=lambda node, args: f"torch.scatter({args[0]}, {node.attrs['dim']}, {args[1]}, {args[2]})",
        aten={
            **dict.fromkeys(("scatter.src", "scatter.value"), _import_scatter("scatter")),
            "as_strided_scatter.default": import_as_strided_scatter,
        },
        # One index a row: where indices repeat, the result is any of the sources.
        samples=(Sample((Arg(t(3, 4)), index_arg(3, 1, below=4), Arg(t(3, 1))), {"dim": 1}),),
    )
)
register(
    OpDef(
        name="scatter_add",
        infer=infer_scatter,
        evaluate=upcast(_evaluate_scatter_add),
        vjp=_scatter_add_vjp,
        complex=AS_IT_IS,
        cost=elementwise_cost(1),
        axes=axes_but_dim,
        lower=lambda node, args: f"torch.scatter_add({args[0]}, {node.attrs['dim']}, {args[1]}, {args[2]})",
        aten={"scatter_add.default": _import_scatter("scatter_add")},
        samples=(
            Sample((Arg(t(3, 4)), index_arg(3, 2, below=4), Arg(t(3, 2))), {"dim": 1}),
            Sample((Arg(t(2, 4)), index_arg(5, 4, below=2), Arg(t(5, 4))), {"dim": 0}),
        ),
    )
)

# --- index_select and index_add -----------------------------------------------------------------------


def _infer_index_select(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x, index), dim = inputs, attrs["dim"]
    frame = _frame(x, dim)
    _require_index(index, x.shape[dim])
    require(index.rank == 1, f"an index of 1 axis is required, got {index}")
    return (x.with_(shape=(*frame[:dim], index.numel, *frame[dim:])),)


def _infer_index_add(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    base, index, source = inputs
    (wanted,) = _infer_index_select((base, index), attrs)
    require(source == wanted, f"a source of type {wanted} is required, got {source}")
    return (base,)


def _index_select_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    (ct,), (x, index) = cts, node.inputs
    assert ct is not None
    return b.emit("index_add", zeros_like(b, x), index, ct, dim=node.attrs["dim"]), None


def _index_add_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    assert cts[0] is not None
    return cts[0], None, b.emit("index_select", cts[0], node.inputs[1], dim=node.attrs["dim"])


def _evaluate_index_add(node: Node, base: np.ndarray, index: np.ndarray, source: np.ndarray) -> np.ndarray:
    result, dim = base.copy(), node.attrs["dim"]
    np.add.at(result, (slice(None),) * dim + (bounded(index, base.shape[dim]),), source)
    return result


def _index_select_axes(node: Node) -> Axes:
    dim = node.attrs["dim"]
    labels = whole_along((dim,), node.output.type.rank)
    return Axes((labels, ("i",)), ((*labels[:dim], "i", *labels[dim + 1 :]),))


def _index_add_axes(node: Node) -> Axes:
    labels = whole_along((node.attrs["dim"],), node.output.type.rank)
    return Axes((labels, (None,), labels), (labels,))


def _import_index_select(b: Builder, x: Value, dim: int, index: Value) -> Value:
    if not x.type.rank:
        return reshape(b, b.emit("index_select", _flat(b, x), _flat(b, index), dim=0), ())
    return b.emit("index_select", x, _flat(b, index), dim=norm_dim(dim, x.type.rank))


def _import_index_add(b: Builder, base: Value, dim: int, index: Value, source: Value, *, alpha: float = 1) -> Value:
    if not base.type.rank:
        parts = (_flat(b, base), _flat(b, index), scale(b, _flat(b, source), alpha))
        return reshape(b, b.emit("index_add", *parts, dim=0), ())
    dim = norm_dim(dim, base.type.rank)
    shape = (*base.type.shape[:dim], index.type.numel, *base.type.shape[dim + 1 :])
    source = scale(b, reshape(b, source, shape), alpha)
    return b.emit("index_add", base, _flat(b, index), source, dim=dim)


register(
    OpDef(
        name="index_select",
        infer=_infer_index_select,
        evaluate=lambda node, x, index: np.take(x, bounded(index, x.shape[node.attrs["dim"]]), node.attrs["dim"]),
        vjp=_index_select_vjp,
        complex=AS_IT_IS,
        cost=copy_cost,
        axes=_index_select_axes,
        lower=lambda node, args: f"torch.index_select({args[0]}, {node.attrs['dim']}, {args[1]})",
        aten={
            "index_select.default": _import_index_select,
            "as_strided.default": import_as_strided,
            "as_strided_copy.default": import_as_strided,
        },
        samples=(
            Sample((Arg(t(3, 4)), index_arg(6, below=4)), {"dim": 1}),
            Sample((Arg(t(3, 2)), index_arg(2, below=3)), {"dim": 0}),
        ),
    )
)
register(
    OpDef(
        name="index_add",
        infer=_infer_index_add,
        evaluate=upcast(_evaluate_index_add),
        vjp=_index_add_vjp,
        complex=AS_IT_IS,
        cost=elementwise_cost(1),
        axes=_index_add_axes,
        lower=lambda node, args: f"torch.index_add({args[0]}, {node.attrs['dim']}, {args[1]}, {args[2]})",
        aten={"index_add.default": _import_index_add},
        samples=(
            Sample((Arg(t(3, 4)), index_arg(6, below=4), Arg(t(3, 6))), {"dim": 1}),
            Sample((Arg(t(3, 2)), index_arg(2, below=3), Arg(t(2, 2))), {"dim": 0}),
        ),
    )
)
