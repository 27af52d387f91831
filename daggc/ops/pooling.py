"""What max and average pooling have in common: geometry, adaptive windows, absent batch axes, registration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import reshape
from daggc.ops.opdef import (
    VJP,
    Axes,
    Cost,
    Evaluate,
    Importer,
    Infer,
    OpDef,
    Sample,
    leading_axes,
    node_bytes,
    register,
    require,
    t,
)
from daggc.ops.windows import output_size, span

ADAPTIVE_CASES = (((2, 3, 6, 8), (3, 4)), ((2, 3, 7, 5), (3, 2)), ((2, 3, 7), (4,)), ((1, 2, 3, 4, 5), (2, 3, 3)))


def spatial_shape(x: TensorType) -> tuple[int, ...]:
    """x's trailing axes. Raises TypeRuleError unless there are one to three, and channels and positions to pool."""
    require(3 <= x.rank <= 5, f"x [n, c, *spatial] with 1 to 3 spatial axes is required, got {x}")
    require(all(x.shape[1:]), f"only the batch axis can be of size 0, got {x}")
    return x.shape[2:]


def window_counts(x: TensorType, attrs: Attrs, dilation: Sequence[int]) -> tuple[int, ...]:
    """The spatial shape of the output. Raises TypeRuleError as torch does for windows that do not fit."""
    spatial, kernel, stride, padding = spatial_shape(x), attrs["kernel"], attrs["stride"], attrs["padding"]
    lengths = {len(kernel), len(stride), len(padding), len(dilation)}
    require(lengths == {len(spatial)}, f"{len(spatial)} numbers for each of kernel, stride and padding are required")
    require(min(*kernel, *stride, *dilation) >= 1, "kernel, stride and dilation are positive")
    half = all(0 <= p <= span(k, d) // 2 for p, k, d in zip(padding, kernel, dilation, strict=True))
    require(half, f"padding is at most half of the kernel, got {padding} and {kernel}")
    counts = tuple(
        output_size(size, k, s, p, d, attrs["ceil_mode"])
        for size, k, s, p, d in zip(spatial, kernel, stride, padding, dilation, strict=True)
    )
    require(min(counts) > 0, f"the output would have the spatial shape {counts}")
    return counts


def planes(node: Node) -> Axes:
    """Samples and channels are independent."""
    return leading_axes(node.outputs[0].type.rank - 2)(node)


def pool_cost(node: Node) -> Cost:
    """An operation for each element of each window, or for each element where windows are adaptive."""
    window = math.prod(node.attrs.get("kernel", ()))
    positions = min(node.inputs[0].type.numel, node.outputs[0].type.numel)
    return Cost(window * positions if window > 1 else node.inputs[0].type.numel, node_bytes(node), "reduction")


def numbers(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """ATen's lists may have one number for all axes."""
    items = (value,) if isinstance(value, int) else tuple(value)
    return items * rank if len(items) == 1 else items


def with_batch(b: Builder, x: Value, rank: int, emit: Callable[[Value], tuple[Value, ...]]) -> tuple[Value, ...]:
    """Apply ``emit`` to x, with a batch axis for the time of the op where x has none."""
    if x.type.rank == rank + 2:
        return emit(x)
    if x.type.rank != rank + 1:
        raise TypeRuleError(f"pooling over {rank} axes needs {rank + 1} or {rank + 2} dimensions, got {x.type}")
    outputs = emit(reshape(b, x, (1, *x.type.shape)))
    return tuple(reshape(b, y, y.type.shape[1:]) for y in outputs)


def adaptive_slices(size: int, count: int) -> list[slice]:
    """Window i of ``count`` over ``size`` positions: from floor(i * size / count) to ceil((i + 1) * size / count)."""
    return [slice(i * size // count, -((i + 1) * size // -count)) for i in range(count)]


def adaptive_windows(spatial: Sequence[int], counts: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Each output position and its window."""
    slices = [adaptive_slices(size, count) for size, count in zip(spatial, counts, strict=True)]
    return [(at, tuple(of[i] for of, i in zip(slices, at, strict=True))) for at in np.ndindex(*counts)]


def window_attrs(kernel: Sequence[int], **changes: Attr) -> dict[str, Any]:
    """Attributes of a sample: windows side by side, unless changed."""
    rank = len(kernel)
    plain = {"kernel": tuple(kernel), "stride": tuple(kernel), "padding": (0,) * rank, "ceil_mode": False}
    return {**plain, **changes}


def pooled_shape(shape: Sequence[int], attrs: dict[str, Any]) -> tuple[int, ...]:
    """The shape of a sample's output."""
    dilation = attrs.get("dilation", (1,) * len(attrs["kernel"]))
    return (*shape[:2], *window_counts(t(*shape), Attrs(attrs), dilation))


def register_pool(
    name: str,
    infer: Infer,
    evaluate: Evaluate,
    vjp: VJP,
    lower: Callable[[Node, Sequence[str]], str],
    samples: Sequence[Sample],
    aten: dict[str, Importer] | None = None,
) -> None:
    """Register an op on planes ``[n, c, ...]``."""
    register(
        OpDef(
            name=name,
            infer=infer,
            evaluate=evaluate,
            vjp=vjp,
            cost=pool_cost,
            axes=planes,
            lower=lower,
            aten=aten or {},
            samples=samples,
        )
    )
