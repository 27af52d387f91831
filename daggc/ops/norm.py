"""Layer norm, RMS norm and group norm, each with a backward op of the same grain.

``y, mean, rstd = layer_norm(x, [weight, [bias]])``; ``rms_norm`` has no mean and no bias. Statistics are f32 where
x is f16 or bf16, and keep the averaged axes of layer and RMS norm with size 1; those of group norm are ``[n, groups]``.
``x_ct, [weight_ct, [bias_ct]] = layer_norm_backward(ct, x, mean, rstd, [weight])``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import full, reshape
from daggc.ops.moments import (
    Layout,
    check_params,
    evaluate_norm,
    evaluate_norm_backward,
    norm,
    norm_backward,
    statistics_vjp,
    stats_type,
    sum_present,
    wide_dtype,
    widen,
)
from daggc.ops.opdef import (
    BY_DECOMPOSITION,
    Arg,
    Axes,
    Cost,
    Importer,
    OpDef,
    Sample,
    letters,
    node_bytes,
    register,
    require,
    t,
)


def trailing_layout(shape: Sequence[int], attrs: Attrs) -> Layout:
    """Over the last axes, which have ``normalized_shape``."""
    normalized = attrs["normalized_shape"]
    lead = len(shape) - len(normalized)
    require(
        0 < len(normalized) <= len(shape) and tuple(shape[lead:]) == normalized,
        f"normalized_shape is the end of x's shape, got {normalized} and {tuple(shape)}",
    )
    dims = tuple(range(lead, len(shape)))
    return Layout(tuple(shape), tuple(shape), dims, (*shape[:lead], *(1 for _ in dims)), dims)


def group_layout(shape: Sequence[int], attrs: Attrs) -> Layout:
    """Over the channels of a group and all positions."""
    groups = attrs["groups"]
    require(
        len(shape) >= 2 and shape[1] % groups == 0, f"channels of {tuple(shape)} do not divide into {groups} groups"
    )
    size = int(np.prod(shape[1:])) // groups
    # Of a group of nothing torch's gradient of the weight is NaN, though no element has a part in it.
    require(size > 0, f"elements in each of {groups} groups are required, got {tuple(shape)}")
    return Layout(tuple(shape), (shape[0], groups, size), (2,), (shape[0], groups), (1,))


@dataclass(frozen=True, slots=True)
class _Norm:
    """The rules of one norm and of its backward."""

    name: str
    layout: Callable[[Sequence[int], Attrs], Layout]
    centered: bool
    own_attr: str

    def layout_of(self, x: TensorType, attrs: Attrs) -> Layout:
        return self.layout(x.shape, attrs)

    # forward ------------------------------------------------------------------------------------------

    def infer(self, inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        x, *params = inputs
        require(len(params) <= (2 if self.centered else 1), "x, weight and bias are the inputs")
        layout = self.layout_of(x, attrs)
        check_params(x, params, layout)
        require(isinstance(attrs["eps"], float), "eps is a number")
        statistics = stats_type(x, layout)
        return (x, statistics, statistics) if self.centered else (x, statistics)

    def evaluate(self, node: Node, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        x, *params = widen(*arrays)
        weight, bias = (*params, None, None)[:2]
        layout = self.layout_of(node.inputs[0].type, node.attrs)
        y, mean, rstd = evaluate_norm(x, weight, bias, layout, node.attrs["eps"], self.centered)
        y = y.astype(node.outputs[0].type.numpy_dtype)
        return (y, mean, rstd) if self.centered else (y, rstd)

    def decompose(self, b: Builder, node: Node, *inputs: Value) -> tuple[Value, ...]:
        x, *params = inputs
        weight, bias = (*params, None, None)[:2]
        layout = self.layout_of(x.type, node.attrs)
        y, mean, rstd = norm(b, x, weight, bias, layout, node.attrs["eps"], self.centered)
        return (y, rstd) if mean is None else (y, mean, rstd)

    def vjp(self, b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
        x, *params = node.inputs
        mean = node.outputs[1] if self.centered else None
        rstd = node.outputs[-1]
        grads: list[Value | None] = [None] * len(node.inputs)
        if cts[0] is not None:
            attrs = {self.own_attr: node.attrs[self.own_attr], "bias": len(params) == 2}
            grads = [*b.emit_many(f"{self.name}_backward", cts[0], x, *node.outputs[1:], *params[:1], **attrs)]
        layout = self.layout_of(x.type, node.attrs)
        mean_ct = cts[1] if self.centered else None
        grads[0] = sum_present(b, grads[0], statistics_vjp(b, x, mean, rstd, layout, mean_ct, cts[-1]))
        return grads

    # backward -----------------------------------------------------------------------------------------

    def _split(self, inputs: Sequence) -> tuple:
        """ct, x, mean or None, rstd, weight or None."""
        ct, x, *rest = inputs
        mean = rest.pop(0) if self.centered else None
        rstd, *weight = rest
        require(len(weight) <= 1, "cotangent, x, statistics and weight are the inputs")
        return ct, x, mean, rstd, weight[0] if weight else None

    def infer_backward(self, inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        ct, x, mean, rstd, weight = self._split(inputs)
        layout = self.layout_of(x, attrs)
        check_params(x, () if weight is None else (weight,), layout)
        statistics = stats_type(x, layout)
        require(ct == x, "a cotangent of x's type is required")
        require(mean in (None, statistics) and rstd == statistics, f"statistics {statistics} are required")
        require(isinstance(attrs["bias"], bool), "bias says whether the bias has a cotangent")
        possible = self.centered and weight is not None
        require(possible or not attrs["bias"], "a bias needs a weight, and a norm that takes the mean away")
        return (x,) if weight is None else (x, weight, weight) if attrs["bias"] else (x, weight)

    def evaluate_backward(self, node: Node, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        ct, x, mean, rstd, weight = self._split(widen(*arrays))
        layout = self.layout_of(node.inputs[1].type, node.attrs)
        results = evaluate_norm_backward(ct, x, mean, rstd, weight, layout)
        return tuple(r.astype(o.type.numpy_dtype) for r, o in zip(results, node.outputs, strict=False))

    def decompose_backward(self, b: Builder, node: Node, *inputs: Value) -> tuple[Value, ...]:
        ct, x, mean, rstd, weight = self._split(inputs)
        layout = self.layout_of(x.type, node.attrs)
        return norm_backward(b, ct, x, mean, rstd, weight, layout)[: len(node.outputs)]

    # what the planner and the backend ask ---------------------------------------------------------------

    def _labels(self, value: TensorType, layout: Layout) -> tuple[str | None, ...]:
        """Leading axes that are not averaged over; of group norm, only the batch axis."""
        lead = layout.dims[0] if layout.view == layout.shape else 1
        return (*letters(lead), *(None,) * (value.rank - lead))

    def _axes(self, node: Node, params: slice) -> Axes:
        layout = self.layout_of(node.inputs[0].type, node.attrs)
        whole = node.inputs[params]
        inputs = tuple(
            (None,) * value.type.rank if value in whole else self._labels(value.type, layout) for value in node.inputs
        )
        return Axes(inputs, tuple(self._labels(value.type, layout) for value in node.outputs))

    def axes(self, node: Node) -> Axes:
        return self._axes(node, slice(1, None))

    def axes_backward(self, node: Node) -> Axes | None:
        """Cotangents of parameters are sums over everything else."""
        return self._axes(node, slice(len(node.inputs), None)) if len(node.outputs) == 1 else None

    def lower(self, node: Node, args: Sequence[str]) -> str:
        names = (*args, "None", "None")[: 3 if self.centered else 2]
        return f"kernels.{self.name}({', '.join(names)}, {node.attrs[self.own_attr]}, {node.attrs['eps']!r})"

    def lower_backward(self, node: Node, args: Sequence[str]) -> str:
        names = (*args, "None")[: 5 if self.centered else 4]
        own = node.attrs[self.own_attr]
        call = f"kernels.{self.name}_backward({', '.join(names)}, {own}, {len(node.outputs)})"
        return f"{call}[0]" if len(node.outputs) == 1 else call

    def register(self, aten: Mapping[str, Importer], cases: Sequence[tuple[TensorType, str, Attr, int]]) -> None:
        """Register the op and its backward. A case: x's type, the parameters' dtype, the attribute, their number."""
        register(
            OpDef(
                name=self.name,
                infer=self.infer,
                evaluate=self.evaluate,
                vjp=self.vjp,
                cost=norm_cost(8),
                axes=self.axes,
                lower=self.lower,
                aten=aten,
                samples=[self._sample(*case) for case in cases],
                decompose=self.decompose,
            )
        )
        register(
            OpDef(
                name=f"{self.name}_backward",
                infer=self.infer_backward,
                evaluate=self.evaluate_backward,
                vjp=BY_DECOMPOSITION,
                cost=norm_cost(14),
                axes=self.axes_backward,
                lower=self.lower_backward,
                aten={},
                samples=[self._backward_sample(*case) for case in cases],
                decompose=self.decompose_backward,
            )
        )

    def _sample(self, x: TensorType, dtype: str, own: Attr, params: int) -> Sample:
        layout = self.layout_of(x, Attrs({self.own_attr: own}))
        param = Arg(TensorType(dtype, layout.param_shape))
        return Sample((Arg(x), *(param,) * params), {self.own_attr: own, "eps": 1e-5})

    def _backward_sample(self, x: TensorType, dtype: str, own: Attr, params: int) -> Sample:
        layout = self.layout_of(x, Attrs({self.own_attr: own}))
        statistics = stats_type(x, layout)
        means = (Arg(statistics),) if self.centered else ()
        weight = (Arg(TensorType(dtype, layout.param_shape)),) if params else ()
        attrs = {self.own_attr: own, "bias": params == 2}
        return Sample((Arg(x), Arg(x), *means, Arg(statistics, "positive"), *weight), attrs)


def norm_cost(flops_per_element: float) -> Callable[[Node], Cost]:
    return lambda node: Cost(flops_per_element * node.inputs[0].type.numel, node_bytes(node), "reduction")


LAYER = _Norm("layer_norm", trailing_layout, True, "normalized_shape")
RMS = _Norm("rms_norm", trailing_layout, False, "normalized_shape")
GROUP = _Norm("group_norm", group_layout, True, "groups")


# --- importers ----------------------------------------------------------------------------------------


def affine(b: Builder, weight: Value | None, bias: Value | None) -> tuple[Value, ...]:
    """Weight and bias as inputs; a bias alone gets a weight of ones."""
    if bias is not None and weight is None:
        weight = full(b, 1.0, bias.type.shape, bias.type.dtype)
    return tuple(param for param in (weight, bias) if param is not None)


def aten_outputs(x: Value, outputs: Sequence[Value]) -> tuple[Value | None, ...]:
    """y and statistics; no statistics of 16-bit inputs: their dtype in torch depends on the device."""
    y, *statistics = outputs
    return y, *(statistics if wide_dtype(x.type.dtype) == x.type.dtype else (None for _ in statistics))


def _native_layer_norm(
    b: Builder, x: Value, normalized_shape: Sequence[int], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value | None, ...]:
    shape = tuple(normalized_shape)
    outputs = b.emit_many("layer_norm", x, *affine(b, weight, bias), normalized_shape=shape, eps=float(eps))
    return aten_outputs(x, outputs)


def _import_layer_norm(
    b: Builder,
    x: Value,
    normalized_shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Value | None:
    return _native_layer_norm(b, x, normalized_shape, weight, bias, eps)[0]


_EPSILON = {"f64": float(np.finfo(np.float64).eps)}  # torch's default eps is that of the dtype it computes in


def _fused_rms_norm(
    b: Builder, x: Value, normalized_shape: Sequence[int], weight: Value | None = None, eps: float | None = None
) -> tuple[Value | None, ...]:
    eps = _EPSILON.get(x.type.dtype, float(np.finfo(np.float32).eps)) if eps is None else float(eps)
    shape = tuple(normalized_shape)
    return aten_outputs(x, b.emit_many("rms_norm", x, *affine(b, weight, None), normalized_shape=shape, eps=eps))


def _import_rms_norm(
    b: Builder, x: Value, normalized_shape: Sequence[int], weight: Value | None = None, eps: float | None = None
) -> Value | None:
    return _fused_rms_norm(b, x, normalized_shape, weight, eps)[0]


def import_group_norm(
    b: Builder,
    x: Value,
    num_groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Value:
    return b.emit_many("group_norm", x, *affine(b, weight, bias), groups=num_groups, eps=float(eps))[0]


def _native_group_norm(
    b: Builder,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    n: int,
    channels: int,
    positions: int,
    groups: int,
    eps: float,
) -> tuple[Value | None, ...]:
    y, *statistics = b.emit_many(
        "group_norm",
        reshape(b, x, (n, channels, positions)),
        *affine(b, weight, bias),
        groups=groups,
        eps=float(eps),
    )
    return aten_outputs(x, (reshape(b, y, x.type.shape), *statistics))


# --- the ops ------------------------------------------------------------------------------------------

LAYER.register(
    {"layer_norm.default": _import_layer_norm, "native_layer_norm.default": _native_layer_norm},
    (
        (t(4, 6), "f64", (6,), 2),
        (t(2, 3, 4, 5), "f64", (4, 5), 1),
        (t(3, 5), "f64", (5,), 0),
        (t(4, 16, dtype="f32"), "f32", (16,), 2),
        (t(4, 16, dtype="bf16"), "bf16", (16,), 2),
        (t(4, 16, dtype="bf16"), "f32", (16,), 2),
    ),
)
RMS.register(
    {"rms_norm.default": _import_rms_norm, "_fused_rms_norm.default": _fused_rms_norm},
    (
        (t(4, 6), "f64", (6,), 1),
        (t(2, 3, 4, 5), "f64", (4, 5), 0),
        (t(4, 16, dtype="bf16"), "bf16", (16,), 1),
    ),
)
GROUP.register(
    {
        "group_norm.default": import_group_norm,
        "native_group_norm.default": _native_group_norm,
    },
    (
        (t(2, 6, 3, 4), "f64", 3, 2),
        (t(3, 4, 5), "f64", 4, 0),
        (t(2, 4), "f64", 2, 1),
        (t(2, 4, 8, dtype="bf16"), "bf16", 2, 2),
    ),
)
