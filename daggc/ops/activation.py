"""Activations that have a fast torch kernel of their own, each with its backward op of the same grain.

Most are one line of a table: what the function and its derivative are in NumPy, and the derivative as IR,
from which higher derivatives follow. Those that torch itself composes (``selu``, ``glu``, ``clamp``, ...)
are composed by importers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import (
    cast,
    conj,
    kind,
    mul,
    neg,
    norm_dim,
    scale,
)
from daggc.ops.elementwise import unary
from daggc.ops.opdef import (
    AS_IT_IS,
    BY_DECOMPOSITION,
    Arg,
    Importer,
    OpDef,
    Sample,
    elementwise_cost,
    register,
    require,
    same_axes,
    scalar,
    t,
    upcast,
)


def _infer(
    count: int, names: Sequence[str], kinds: str = "f"
) -> Callable[[Sequence[TensorType], Attrs], tuple[TensorType, ...]]:
    def infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        require(len(inputs) == count, f"{count} inputs are required, got {len(inputs)}")
        require(len(set(inputs)) == 1, "inputs of one type are required")
        require(kind(inputs[0].dtype) in kinds, f"a tensor of a dtype of kind {', '.join(kinds)} is required")
        for name in names:
            require(attrs[name] is not None, f"{name} is required")
        known = "approximate" not in names or attrs["approximate"] in ("none", "tanh")
        require(known, f"approximate is none or tanh, got {attrs.get('approximate')!r}")
        return (inputs[0],)

    return infer


def _importer(name: str, defaults: Mapping[str, Attr]) -> Importer:
    """Attributes are given in the order of ATen's arguments, which is that of ``defaults``, or by name."""

    def importer(b: Builder, x: Value, *given: Attr, **named: Any) -> Value:
        attrs: dict[str, Any] = dict(defaults)
        attrs.update(zip(defaults, given, strict=False))
        attrs.update((key, value) for key, value in named.items() if key in defaults)
        for key, value in attrs.items():
            attrs[key] = value if isinstance(value, str) else float(value)
        return b.emit(name, x, **attrs)

    return importer


def register_pair(
    name: str,
    forward: Callable[..., np.ndarray],
    slope: Callable[..., np.ndarray],
    lower: str,
    lower_backward: str,
    *,
    slope_ir: Callable[[Builder, Node, Value], Value],
    curvature_ir: Callable[[Builder, Node, Value], Value] | None = None,
    defaults: Mapping[str, Attr] | None = None,
    others: Sequence[Mapping[str, Attr]] = (),
    flops: float = 8,
    domain: str = "real",
    from_output: bool = False,
    selects: bool = False,
    kinds: str = "f",
    aten: Mapping[str, Importer] | None = None,
) -> None:
    """Register ``name(x) {attrs}`` and ``name_backward(ct, x) {attrs}``, or ``(ct, y)`` if ``from_output``.

    Args:
        forward, slope: ``(array, attrs) -> array``; the slope is taken at x, or at y if ``from_output``.
        lower, lower_backward: format strings of the arguments ``{0}``, ``{1}`` and the attributes.
        slope_ir: the slope as differentiable IR; ``node`` has the attributes.
        kinds: of dtypes, see :func:`daggc.ops.elementwise.of_kinds`; for complex numbers the backward's kernel
            multiplies by the conjugate of the slope.
        curvature_ir: the slope's slope as IR, where that of ``slope_ir`` would lose digits.
        selects: where the slope is zero, the backward gives zero even if the cotangent is infinite or NaN.
        defaults: the attributes in the order of ATen's arguments; ``others``: more attributes to sample.
        aten: importers beside ``{name}.default``.
    """
    defaults = defaults or {}

    def vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
        assert cts[0] is not None
        kept = node.output if from_output else node.inputs[0]
        return (b.emit(f"{name}_backward", cts[0], kept, **node.attrs),)

    def backward_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
        (given,), (ct, kept) = cts, node.inputs
        assert given is not None and curvature_ir is not None
        again = b.emit(f"{name}_backward", given, kept, **node.attrs)
        return again, mul(b, mul(b, given, ct), curvature_ir(b, node, kept))

    def pull_back(ct: np.ndarray, factor: np.ndarray) -> np.ndarray:
        return np.where(factor == 0, 0, ct * factor) if selects else ct * np.conj(factor)

    def fill(template: str) -> Callable[[Node, Sequence[str]], str]:
        return lambda node, args: template.format(*args, **{k: _text(v) for k, v in node.attrs.items()})

    samples = [Sample((Arg(t(*shape), domain),), attrs) for attrs in (defaults, *others) for shape in ((3, 4), ())]
    register(
        OpDef(
            name=name,
            infer=_infer(1, tuple(defaults), kinds),
            evaluate=upcast(lambda node, x: forward(x, node.attrs)),
            vjp=vjp,
            cost=elementwise_cost(flops),
            axes=same_axes,
            lower=fill(lower),
            aten={f"{name}.default": _importer(name, defaults), **(aten or {})},
            samples=tuple(samples),
            complex=AS_IT_IS,
        )
    )
    register(
        OpDef(
            name=f"{name}_backward",
            infer=_infer(2, tuple(defaults), kinds),
            evaluate=upcast(lambda node, ct, kept: pull_back(ct, slope(kept, node.attrs))),
            vjp=BY_DECOMPOSITION if curvature_ir is None else backward_vjp,
            cost=elementwise_cost(flops + 2),
            axes=same_axes,
            lower=fill(lower_backward),
            aten={},
            samples=tuple(Sample((Arg(one.inputs[0].type), *one.inputs), one.attrs) for one in samples),
            decompose=lambda b, node, ct, kept: (mul(b, ct, conj(b, slope_ir(b, node, kept))),),
        )
    )


def _to_float(b: Builder, x: Value) -> Value:
    return x if x.type.differentiable else cast(b, x, "f32")


def _text(value: Attr) -> str:
    return repr(value) if isinstance(value, str) else scalar(value)


# --- helpers of slopes as IR --------------------------------------------------------------------------


def plus(b: Builder, x: Value, value: float) -> Value:
    return b.emit("add_scalar", x, value=value)


def _one_minus(b: Builder, x: Value) -> Value:
    return plus(b, neg(b, x), 1.0)


def mask(b: Builder, relation: str, x: Value, value: float) -> Value:
    """1 where ``x relation value``, else 0, in x's dtype."""
    return cast(b, b.emit(f"{relation}_scalar", x, value=value), x.type.dtype)


def ones(b: Builder, x: Value) -> Value:
    return b.emit("full", value=1.0, shape=x.type.shape, dtype=x.type.dtype)


# --- what torch composes ------------------------------------------------------------------------------


def _import_relu(b: Builder, x: Value) -> Value:
    return b.emit("relu", x) if x.type.is_float else b.emit("maximum_scalar", x, value=0)


def _import_threshold(b: Builder, x: Value, threshold: float, value: float) -> Value:
    """The value where x is not above the threshold; nan stays."""
    kept = b.emit("logical_not", b.emit("le_scalar", x, value=threshold))
    return b.emit("where_scalar", kept, x, value=value)


def _import_glu(b: Builder, x: Value, dim: int = -1) -> Value:
    axis = norm_dim(dim, x.type.rank)
    half = x.type.shape[axis] // 2
    require(x.type.shape[axis] % 2 == 0, f"glu halves an axis of even size, got {x.type} and axis {axis}")
    first = b.emit("slice", x, dim=axis, start=0, end=half, step=1)
    second = b.emit("slice", x, dim=axis, start=half, end=2 * half, step=1)
    return mul(b, first, b.emit("sigmoid", second))


unary("square", np.square, lambda b, node, ct: mul(b, ct, scale(b, node.inputs[0], 2.0)), to_float=False)

# --- relu, sigmoid, tanh: slopes from the result ------------------------------------------------------

register_pair(
    "relu",
    lambda x, attrs: np.maximum(x, 0),
    lambda y, attrs: (~(y <= 0)).astype(y.dtype),  # NaN passes, as in torch
    "torch.relu({0})",
    "torch.ops.aten.threshold_backward({0}, {1}, 0)",
    slope_ir=lambda b, node, y: mask(b, "gt", y, 0.0),
    flops=1,
    domain="nonzero",
    from_output=True,
    aten={"relu.default": _import_relu, "threshold.default": _import_threshold},
    selects=True,
)
register_pair(
    "sigmoid",
    lambda x, attrs: 1 / (1 + np.exp(-x)) if np.iscomplexobj(x) else special.expit(x),
    lambda y, attrs: (1 - y) * y,
    "torch.sigmoid({0})",
    "torch.ops.aten.sigmoid_backward({0}, {1})",
    slope_ir=lambda b, node, y: mul(b, _one_minus(b, y), y),
    from_output=True,
    kinds="fc",
    aten={
        "sigmoid.default": lambda b, x: b.emit("sigmoid", _to_float(b, x)),
        "glu.default": _import_glu,
    },
)
register_pair(
    "tanh",
    lambda x, attrs: np.tanh(x),
    lambda y, attrs: 1 - y * y,
    "torch.tanh({0})",
    "torch.ops.aten.tanh_backward({0}, {1})",
    slope_ir=lambda b, node, y: _one_minus(b, mul(b, y, y)),
    from_output=True,
    kinds="fc",
    aten={"tanh.default": lambda b, x: b.emit("tanh", _to_float(b, x))},
)

# --- gelu, silu, mish, softplus, log_sigmoid ----------------------------------------------------------

_CUBIC = 0.044715
_ROOT = math.sqrt(2 / math.pi)


def _gelu(x: np.ndarray, attrs: Attrs) -> np.ndarray:
    if attrs["approximate"] == "tanh":
        return 0.5 * x * (1 + np.tanh(_ROOT * (x + _CUBIC * x**3)))
    return x * 0.5 * (1 + special.erf(x / math.sqrt(2)))


def _gelu_slope(x: np.ndarray, attrs: Attrs) -> np.ndarray:
    if attrs["approximate"] == "tanh":
        tanh = np.tanh(_ROOT * (x + _CUBIC * x**3))
        return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * _ROOT * (1 + 3 * _CUBIC * x * x)
    return 0.5 * (1 + special.erf(x / math.sqrt(2))) + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_slope_ir(b: Builder, node: Node, x: Value) -> Value:
    square = mul(b, x, x)
    if node.attrs["approximate"] == "tanh":
        inner = mul(b, x, plus(b, scale(b, square, _CUBIC), 1.0))
        tanh = b.emit("tanh", scale(b, inner, _ROOT))
        inner_slope = scale(b, plus(b, scale(b, square, 3 * _CUBIC), 1.0), _ROOT)
        right = mul(b, scale(b, x, 0.5), mul(b, _one_minus(b, mul(b, tanh, tanh)), inner_slope))
        return b.emit("add", scale(b, plus(b, tanh, 1.0), 0.5), right)
    distribution = scale(b, plus(b, b.emit("erf", scale(b, x, 1 / math.sqrt(2))), 1.0), 0.5)
    density = scale(b, b.emit("exp", scale(b, square, -0.5)), 1 / math.sqrt(2 * math.pi))
    return b.emit("add", distribution, mul(b, x, density))


def _silu_slope(x: np.ndarray, attrs: Attrs) -> np.ndarray:
    sigmoid = special.expit(x)
    return sigmoid * (1 + x * (1 - sigmoid))


def _silu_slope_ir(b: Builder, node: Node, x: Value) -> Value:
    sigmoid = b.emit("sigmoid", x)
    return mul(b, sigmoid, plus(b, mul(b, x, _one_minus(b, sigmoid)), 1.0))


def _mish_slope(x: np.ndarray, attrs: Attrs) -> np.ndarray:
    tanh = np.tanh(np.logaddexp(0, x))
    return tanh + x * special.expit(x) * (1 - tanh * tanh)


def _mish_slope_ir(b: Builder, node: Node, x: Value) -> Value:
    tanh = b.emit("tanh", b.emit("softplus", x, beta=1.0, threshold=20.0))
    return b.emit("add", tanh, mul(b, mul(b, x, b.emit("sigmoid", x)), _one_minus(b, mul(b, tanh, tanh))))


def _softplus(x: np.ndarray, attrs: Attrs) -> np.ndarray:
    beta, threshold = attrs["beta"], attrs["threshold"]
    return np.where(x * beta > threshold, x, np.logaddexp(0, x * beta) / beta)


def _softplus_slope(x: np.ndarray, attrs: Attrs) -> np.ndarray:
    return np.where(x * attrs["beta"] > attrs["threshold"], 1, special.expit(x * attrs["beta"]))


def _softplus_slope_ir(b: Builder, node: Node, x: Value) -> Value:
    scaled = scale(b, x, node.attrs["beta"])
    return b.emit("where", b.emit("gt_scalar", scaled, value=node.attrs["threshold"]), ones(b, x),
                  b.emit("sigmoid", scaled))  # fmt: skip


def _log_sigmoid_curvature(b: Builder, node: Node, x: Value) -> Value:
    sigmoid = b.emit("sigmoid", x)
    return mul(b, plus(b, sigmoid, -1.0), sigmoid)


register_pair(
    "gelu",
    _gelu,
    _gelu_slope,
    "torch.nn.functional.gelu({0}, approximate={approximate})",
    "torch.ops.aten.gelu_backward({0}, {1}, approximate={approximate})",
    slope_ir=_gelu_slope_ir,
    defaults={"approximate": "none"},
    others=({"approximate": "tanh"},),
    flops=20,
)
register_pair(
    "silu",
    lambda x, attrs: x * special.expit(x),
    _silu_slope,
    "torch.nn.functional.silu({0})",
    "torch.ops.aten.silu_backward({0}, {1})",
    slope_ir=_silu_slope_ir,
    flops=10,
)
register_pair(
    "mish",
    lambda x, attrs: x * np.tanh(np.logaddexp(0, x)),
    _mish_slope,
    "torch.nn.functional.mish({0})",
    "torch.ops.aten.mish_backward({0}, {1})",
    slope_ir=_mish_slope_ir,
    flops=25,
)
register_pair(
    "softplus",
    _softplus,
    _softplus_slope,
    "torch.nn.functional.softplus({0}, {beta}, {threshold})",
    "torch.ops.aten.softplus_backward({0}, {1}, {beta}, {threshold})",
    slope_ir=_softplus_slope_ir,
    defaults={"beta": 1.0, "threshold": 20.0},
    others=({"beta": 2.5, "threshold": 1.0},),
    flops=16,
)
register_pair(
    "log_sigmoid",
    lambda x, attrs: -np.logaddexp(0, -x),
    lambda x, attrs: special.expit(-x),
    "torch.nn.functional.logsigmoid({0})",
    "kernels.log_sigmoid_backward({0}, {1})",
    slope_ir=lambda b, node, x: b.emit("sigmoid", neg(b, x)),
    curvature_ir=_log_sigmoid_curvature,
    flops=16,
    aten={"log_sigmoid_forward.default": lambda b, x: (b.emit("log_sigmoid", x), None)},
)
