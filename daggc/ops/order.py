"""Positions of extrema, and sorting. Where elements tie, the first of them comes first.

``stable=False`` of a sort and ``sorted=False`` of a topk leave more orders open, of which the interpreter takes this
one and generated code the one that torch takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import cast, norm_dim, reshape, zeros_like
from daggc.ops.opdef import (
    NOT_DIFFERENTIABLE,
    Axes,
    Cost,
    Importer,
    OpDef,
    letters,
    node_bytes,
    reduction_cost,
    register,
    require,
    sample,
)
from daggc.ops.quantile import import_quantile
from daggc.ops.shape import Cotangents, squeeze
from daggc.ops.slicing import axes_but_dim


def wide(x: np.ndarray) -> np.ndarray:
    """16-bit floats as f32, which NumPy can order."""
    return x.astype(np.float32) if x.dtype.itemsize == 2 and x.dtype.kind in "fV" else x


# --- argmax and argmin --------------------------------------------------------------------------------


def _infer_arg(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,), dim, keepdim = inputs, attrs["dim"], attrs["keepdim"]
    require(0 <= dim < x.rank and x.shape[dim] > 0, f"dim must be an axis of {x} that is not empty, got {dim}")
    require(x.dtype != "bool" and not x.is_complex, f"numbers that have an order are required, got {x}")
    kept = (1,) if keepdim else ()
    return (x.with_(dtype="i64", shape=(*x.shape[:dim], *kept, *x.shape[dim + 1 :])),)


def _arg_axes(node: Node) -> Axes:
    dim, labels = node.attrs["dim"], letters(node.inputs[0].type.rank)
    kept = (None,) if node.attrs["keepdim"] else ()
    return Axes(((*labels[:dim], None, *labels[dim + 1 :]),), ((*labels[:dim], *kept, *labels[dim + 1 :]),))


def _import_arg(op: str) -> Importer:
    def importer(b: Builder, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
        shape = x.type.shape
        if dim is None or not shape:
            flat = b.emit(op, reshape(b, x, (x.type.numel,)), dim=0, keepdim=False)
            return reshape(b, flat, (1,) * len(shape) if keepdim else ())
        return b.emit(op, x, dim=norm_dim(dim, len(shape)), keepdim=keepdim)

    return importer


def _import_extremum(op: str) -> Importer:
    """``max`` and ``min`` along an axis: values and their positions, which alone get the cotangent."""

    def importer(b: Builder, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
        if not x.type.rank:
            return x, b.emit("full", value=0, shape=(), dtype="i64")
        dim = norm_dim(dim, x.type.rank)
        ordered = cast(b, x, "u8") if x.type.dtype == "bool" else x
        index = b.emit(op, ordered, dim=dim, keepdim=True)
        value = b.emit("gather", x, index, dim=dim)
        return (value, index) if keepdim else (squeeze(b, value, dim), squeeze(b, index, dim))

    return importer


for _op, _function, _extremum in (("argmax", np.argmax, "max"), ("argmin", np.argmin, "min")):
    register(
        OpDef(
            name=_op,
            infer=_infer_arg,
            evaluate=lambda node, x, function=_function: np.asarray(
                function(wide(x), axis=node.attrs["dim"], keepdims=node.attrs["keepdim"]), np.int64
            ),
            vjp=NOT_DIFFERENTIABLE,
            cost=reduction_cost(),
            axes=_arg_axes,
            lower=lambda node, args, op=_op: (
                f"torch.{op}({args[0]}, dim={node.attrs['dim']}, keepdim={node.attrs['keepdim']})"
            ),
            aten={f"{_op}.default": _import_arg(_op), f"{_extremum}.dim": _import_extremum(_op)},
            samples=(
                sample((3, 4), domain="distinct", dim=1, keepdim=False),
                sample((2, 3, 4), domain="distinct", dim=1, keepdim=True),
                sample((5,), domain="distinct", dim=0, keepdim=False),
            ),
        )
    )

# --- sort and topk ------------------------------------------------------------------------------------


def _infer_sort(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,), dim = inputs, attrs["dim"]
    require(0 <= dim < x.rank, f"dim must be an axis of {x}, got {dim}")
    require(not x.is_complex, f"numbers that have an order are required, got {x}")
    for name in ("stable", "sorted"):
        require(isinstance(attrs.get(name, True), bool), f"{name} must be a bool, got {attrs.get(name)!r}")
    return x, x.with_(dtype="i64")


def _infer_topk(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x, indices), k, dim = _infer_sort(inputs, attrs), attrs["k"], attrs["dim"]
    require(x.dtype != "bool", "numbers are required: torch has no topk of bools")
    require(0 <= k <= x.shape[dim], f"k must be at most {x.shape[dim]}, got {k}")
    require(isinstance(attrs["largest"], bool), f"largest must be a bool, got {attrs['largest']!r}")
    shape = (*x.shape[:dim], k, *x.shape[dim + 1 :])
    return x.with_(shape=shape), indices.with_(shape=shape)


def _order(x: np.ndarray, dim: int, descending: bool) -> np.ndarray:
    """Stable; NaN is the largest number."""
    x = wide(x)
    if not descending:
        return np.argsort(x, axis=dim, kind="stable")
    backwards = np.argsort(np.flip(x, dim), axis=dim, kind="stable")
    return x.shape[dim] - 1 - np.flip(backwards, dim)


def _evaluate_sort(node: Node, x: np.ndarray) -> tuple[np.ndarray, ...]:
    order = _order(x, node.attrs["dim"], node.attrs["descending"])
    return np.take_along_axis(x, order, node.attrs["dim"]), order.astype(np.int64)


def _evaluate_topk(node: Node, x: np.ndarray) -> tuple[np.ndarray, ...]:
    dim = node.attrs["dim"]
    order = np.take(_order(x, dim, node.attrs["largest"]), range(node.attrs["k"]), dim)
    return np.take_along_axis(x, order, dim), order.astype(np.int64)


def selected_vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    """The cotangent of each value goes back to where the value came from."""
    ct, (x,) = cts[0], node.inputs
    if ct is None:
        return (None,)
    return (b.emit("scatter_add", zeros_like(b, x), node.outputs[1], ct, dim=node.attrs["dim"]),)


def _sort_cost(node: Node) -> Cost:
    """About n log n comparisons, as n times 10."""
    return Cost(10 * node.inputs[0].type.numel, node_bytes(node), "reduction")


def _lower_topk(node: Node, args: Sequence[str]) -> str:
    attrs = node.attrs
    options = f"largest={attrs['largest']}, sorted={attrs.get('sorted', True)}"
    return f"torch.topk({args[0]}, {attrs['k']}, dim={attrs['dim']}, {options})"


def _lower_sort(node: Node, args: Sequence[str]) -> str:
    attrs = node.attrs
    options = f"descending={attrs['descending']}, stable={attrs.get('stable', True)}"
    return f"torch.sort({args[0]}, dim={attrs['dim']}, {options})"


def _import_topk(
    b: Builder, x: Value, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Value, ...]:
    if not x.type.rank:
        require(k in (0, 1), f"k must be at most 1 for {x.type}, got {k}")
        values, indices = b.emit_many("topk", reshape(b, x, (1,)), k=k, dim=0, largest=largest)
        return (reshape(b, values, ()), reshape(b, indices, ())) if k else (values, indices)
    order: dict[str, Any] = {} if sorted else {"sorted": False}
    return b.emit_many("topk", x, k=k, dim=norm_dim(dim, x.type.rank), largest=largest, **order)


def _sort(b: Builder, x: Value, dim: int, descending: bool, stable: bool | None = False) -> tuple[Value, ...]:
    if not x.type.rank:
        return x, b.emit("full", value=0, shape=(), dtype="i64")
    order: dict[str, Any] = {} if stable else {"stable": False}
    return b.emit_many("sort", x, dim=norm_dim(dim, x.type.rank), descending=descending, **order)


def _import_sort(b: Builder, x: Value, dim: int = -1, descending: bool = False) -> tuple[Value, ...]:
    return _sort(b, x, dim, descending)


def _import_stable_sort(
    b: Builder, x: Value, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Value, ...]:
    return _sort(b, x, dim, descending, stable)


def _second(importer: Callable[..., tuple[Value, ...]]) -> Importer:
    return lambda b, *args, **kwargs: importer(b, *args, **kwargs)[1]


register(
    OpDef(
        name="sort",
        infer=_infer_sort,
        evaluate=_evaluate_sort,
        vjp=selected_vjp,
        cost=_sort_cost,
        axes=axes_but_dim,
        lower=_lower_sort,
        aten={
            "sort.default": _import_sort,
            "sort.stable": _import_stable_sort,
            "argsort.default": _second(_import_sort),
            "argsort.stable": _second(_import_stable_sort),
            "msort.default": lambda b, x: _sort(b, x, 0, False)[0],
            **{f"quantile.{form}": import_quantile(skip_nan=False) for form in ("default", "scalar")},
            **{f"nanquantile.{form}": import_quantile(skip_nan=True) for form in ("default", "scalar")},
        },
        samples=(
            sample((3, 4), domain="distinct", dim=1, descending=False),
            sample((4, 2), domain="distinct", dim=0, descending=True),
        ),
    )
)
register(
    OpDef(
        name="topk",
        infer=_infer_topk,
        evaluate=_evaluate_topk,
        vjp=selected_vjp,
        cost=_sort_cost,
        axes=axes_but_dim,
        lower=_lower_topk,
        aten={"topk.default": _import_topk},
        samples=(
            sample((3, 5), domain="distinct", k=2, dim=1, largest=True),
            sample((4, 2), domain="distinct", k=3, dim=0, largest=False),
        ),
    )
)
