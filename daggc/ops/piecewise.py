"""Activations that are linear or exponential in pieces, and what torch composes of such pieces: clamp, prelu."""

from __future__ import annotations

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ops.activation import mask, ones, plus, register_pair
from daggc.ops.build import Operand, broadcast, broadcast_together, cast, mul, reshape, result_dtype, scale
from daggc.ops.elementwise import where_zero

_SIXTH = float(np.float32(1 / 6))  # hardsigmoid_backward of torch has this constant in f32, for f64 too


def _within(b: Builder, x: Value, low: float, high: float) -> Value:
    """1 strictly between the bounds, else 0."""
    return mul(b, mask(b, "gt", x, low), mask(b, "lt", x, high))


def _import_prelu(b: Builder, x: Value, weight: Value) -> Value:
    """One slope for all elements, or one for each channel (axis 1)."""
    if weight.type.rank != x.type.rank:
        shape = [1] * x.type.rank
        if weight.type.numel > 1:
            shape[1] = weight.type.numel
        weight = reshape(b, weight, shape)
    weight = broadcast(b, weight, x.type.shape)
    return b.emit("where", b.emit("gt_scalar", x, value=0.0), x, mul(b, weight, x))


def _import_clamp(b: Builder, x: Value, low: Operand | None = None, high: Operand | None = None) -> Value:
    """Bounds that are numbers or tensors; the cotangent at a bound goes to x, as in torch.

    A lower bound that is not below the upper one has no cotangent, nor has what is nan.
    """
    bounds = [bound for bound in (low, high) if bound is not None]
    x = cast(b, x, result_dtype(x, *bounds))
    if isinstance(low, Value) and isinstance(high, Value):
        x, low, high = broadcast_together(b, x, cast(b, low, x.type.dtype), cast(b, high, x.type.dtype))
        if x.type.is_float:
            low = b.emit("where", b.emit("lt", low, high), low, b.emit("stop_gradient", low))
    for bound, relation, scalar_op in ((low, "lt", "maximum_scalar"), (high, "gt", "minimum_scalar")):
        if isinstance(bound, Value):
            # maximum and minimum would share the cotangent of ties in halves, which clamp does not.
            bound, x = broadcast_together(b, cast(b, bound, x.type.dtype), x)
            chosen = b.emit("where", b.emit(relation, x, bound), bound, x)
            if x.type.is_float:
                nan = b.emit("logical_or", b.emit("isnan", x), b.emit("isnan", bound))
                chosen = b.emit("where_scalar", b.emit("logical_not", nan), chosen, value=float("nan"))
            x = chosen
        elif bound is not None:
            x = b.emit(scalar_op, x, value=bound)
    return x


def _import_hardtanh(b: Builder, x: Value, low: float = -1.0, high: float = 1.0) -> Value:
    if x.type.is_float:
        return b.emit("hardtanh", x, min_val=float(low), max_val=float(high))
    return _import_clamp(b, x, int(low), int(high))


def _import_clamp_max(b: Builder, x: Value, high: Operand) -> Value:
    return _import_clamp(b, x, None, high)


def _elu(x: np.ndarray, attrs: Attrs) -> np.ndarray:
    negative = np.expm1(np.minimum(x, 0) * attrs["input_scale"]) * (attrs["alpha"] * attrs["scale"])
    return np.where(x < 0, negative, x * attrs["scale"])


def _elu_slope(x: np.ndarray, attrs: Attrs) -> np.ndarray:
    factor = attrs["alpha"] * attrs["scale"] * attrs["input_scale"]
    return np.where(x <= 0, np.exp(np.minimum(x, 0) * attrs["input_scale"]) * factor, attrs["scale"])


def _elu_slope_ir(b: Builder, node: Node, x: Value) -> Value:
    alpha, outer, inner = (node.attrs[name] for name in ("alpha", "scale", "input_scale"))
    # The exponential of large positive numbers, which are not chosen below, would be inf and its slope nan.
    exponential = b.emit("exp", scale(b, b.emit("minimum_scalar", x, value=0.0), inner))
    negative = scale(b, exponential, alpha * outer * inner)
    return b.emit("where", b.emit("le_scalar", x, value=0.0), negative, scale(b, ones(b, x), outer))


def _inverse(attrs: Attrs) -> float:
    """``1 / alpha`` as torch's gradient of celu has it: of alpha in f32."""
    return 1.0 / float(np.float32(attrs["alpha"]))


def _celu_slope_ir(b: Builder, node: Node, x: Value) -> Value:
    alpha, inverse = node.attrs["alpha"], _inverse(node.attrs)
    exponential = b.emit("exp", scale(b, b.emit("minimum_scalar", x, value=0.0), inverse))
    return b.emit("where", b.emit("le_scalar", x, value=0.0), scale(b, exponential, alpha * inverse), ones(b, x))


def _exponential_curvature(b: Builder, x: Value, inner: float, factor: float) -> Value:
    """``factor * exp(inner x)`` below zero; at zero the slope is that from below, its slope that from above."""
    exponential = b.emit("exp", scale(b, b.emit("minimum_scalar", x, value=0.0), inner))
    return where_zero(b, b.emit("lt_scalar", x, value=0.0), scale(b, exponential, factor))


def _elu_curvature_ir(b: Builder, node: Node, x: Value) -> Value:
    alpha, outer, inner = (node.attrs[name] for name in ("alpha", "scale", "input_scale"))
    return _exponential_curvature(b, x, inner, alpha * outer * inner * inner)


def _celu_curvature_ir(b: Builder, node: Node, x: Value) -> Value:
    alpha, inverse = node.attrs["alpha"], _inverse(node.attrs)
    return _exponential_curvature(b, x, inverse, alpha * inverse * inverse)


def _leaky_slope_ir(b: Builder, node: Node, x: Value) -> Value:
    one = ones(b, x)
    return b.emit("where", b.emit("gt_scalar", x, value=0.0), one, scale(b, one, node.attrs["negative_slope"]))


def _hardswish_slope(x: np.ndarray, attrs: Attrs) -> np.ndarray:
    return np.where(x <= -3, 0, np.where(x < 3, x / 3 + 0.5, 1))


def _hardswish_slope_ir(b: Builder, node: Node, x: Value) -> Value:
    ramp = plus(b, b.emit("div_scalar", x, value=3.0), 0.5)
    return b.emit("add", mul(b, ramp, _within(b, x, -3.0, 3.0)), mask(b, "ge", x, 3.0))


register_pair(
    "elu",
    _elu,
    _elu_slope,
    "torch.ops.aten.elu({0}, {alpha}, {scale}, {input_scale})",
    "torch.ops.aten.elu_backward({0}, {alpha}, {scale}, {input_scale}, False, {1})",
    slope_ir=_elu_slope_ir,
    curvature_ir=_elu_curvature_ir,
    defaults={"alpha": 1.0, "scale": 1.0, "input_scale": 1.0},
    others=({"alpha": 0.7, "scale": 1.5, "input_scale": 2.0},),
    domain="nonzero",
    aten={
        "selu.default": lambda b, x: b.emit(
            "elu", x, alpha=1.6732632423543772848170429916717, scale=1.0507009873554804934193349852946, input_scale=1.0
        ),
    },
)
register_pair(
    "celu",
    lambda x, attrs: np.where(x < 0, np.expm1(np.minimum(x, 0) / attrs["alpha"]) * attrs["alpha"], x),
    lambda x, attrs: np.where(x <= 0, np.exp(np.minimum(x, 0) * _inverse(attrs)) * attrs["alpha"] * _inverse(attrs), 1),
    "torch.nn.functional.celu({0}, {alpha})",
    "kernels.celu_backward({0}, {1}, {alpha})",
    slope_ir=_celu_slope_ir,
    curvature_ir=_celu_curvature_ir,
    defaults={"alpha": 1.0},
    others=({"alpha": 0.7},),
    domain="nonzero",
)
register_pair(
    "leaky_relu",
    lambda x, attrs: np.where(x > 0, x, x * attrs["negative_slope"]),
    lambda x, attrs: np.where(x > 0, 1, attrs["negative_slope"]),
    "torch.nn.functional.leaky_relu({0}, {negative_slope})",
    "torch.ops.aten.leaky_relu_backward({0}, {1}, {negative_slope}, False)",
    slope_ir=_leaky_slope_ir,
    defaults={"negative_slope": 0.01},
    flops=2,
    domain="nonzero",
    aten={"prelu.default": _import_prelu, "_prelu_kernel.default": _import_prelu},
)
register_pair(
    "hardtanh",
    lambda x, attrs: np.clip(x, attrs["min_val"], attrs["max_val"]),
    lambda x, attrs: (x > attrs["min_val"]) & (x < attrs["max_val"]),
    "torch.nn.functional.hardtanh({0}, {min_val}, {max_val})",
    "torch.ops.aten.hardtanh_backward({0}, {1}, {min_val}, {max_val})",
    slope_ir=lambda b, node, x: _within(b, x, node.attrs["min_val"], node.attrs["max_val"]),
    defaults={"min_val": -1.0, "max_val": 1.0},
    flops=2,
    aten={
        "hardtanh.default": _import_hardtanh,
        "relu6.default": lambda b, x: _import_hardtanh(b, x, 0.0, 6.0),
        **dict.fromkeys(("clamp.default", "clamp.Tensor", "clamp_min.default", "clamp_min.Tensor"), _import_clamp),
        **dict.fromkeys(("clamp_max.default", "clamp_max.Tensor"), _import_clamp_max),
    },
    selects=True,
)
register_pair(
    "hardswish",
    lambda x, attrs: x * np.clip(x + 3, 0, 6) / 6,
    _hardswish_slope,
    "torch.nn.functional.hardswish({0})",
    "torch.ops.aten.hardswish_backward({0}, {1})",
    slope_ir=_hardswish_slope_ir,
    flops=4,
    selects=True,
)
register_pair(
    "hardsigmoid",
    lambda x, attrs: np.clip(x + 3, 0, 6) / 6,
    lambda x, attrs: ((x > -3) & (x < 3)) * x.dtype.type(_SIXTH),
    "torch.nn.functional.hardsigmoid({0})",
    "torch.ops.aten.hardsigmoid_backward({0}, {1})",
    slope_ir=lambda b, node, x: scale(b, _within(b, x, -3.0, 3.0), _SIXTH),
    flops=3,
    selects=True,
)
