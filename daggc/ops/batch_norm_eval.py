"""Batch norm with given statistics: ``y = batch_norm_eval(x, running_mean, running_var, [weight, bias])``.

Every element is independent of the others, so that batches can be cut. Also what both batch norms share.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import add, cast, full, mul, scale, sum_dims
from daggc.ops.moments import (
    Layout,
    check_params,
    spread,
    wide_dtype,
    widen,
)
from daggc.ops.norm import norm_cost
from daggc.ops.opdef import BY_DECOMPOSITION, Arg, Axes, OpDef, Sample, register, require, t


def channel_layout(shape: Sequence[int]) -> Layout:
    """Over all axes but the channels'."""
    require(len(shape) >= 2, f"x [n, c, ...] is required, got {tuple(shape)}")
    dims = (0, *range(2, len(shape)))
    return Layout(tuple(shape), tuple(shape), dims, (shape[1],), (1,))


def check_running(running: Sequence[TensorType], x: TensorType, layout: Layout) -> None:
    """Running statistics have a number for each channel, in x's dtype or wider."""
    for statistic in running:
        fits = statistic.dtype in (x.dtype, wide_dtype(x.dtype)) and statistic.shape == layout.stats
        require(fits, f"running statistics {TensorType(x.dtype, layout.stats)} are required, got {statistic}")


def channel_axes(node: Node) -> Axes:
    """Channels are independent; samples are not."""
    return Axes(
        tuple(_channel(value) for value in node.inputs),
        tuple(_channel(value) for value in node.outputs),
    )


def _channel(value: Value) -> tuple[str | None, ...]:
    return ("c",) if value.type.rank == 1 else (None, "c", *(None,) * (value.type.rank - 2))


def affine_params(b: Builder, weight: Value | None, bias: Value | None) -> tuple[Value, ...]:
    """Weight and bias, or neither; one alone is joined by ones or zeros."""
    if weight is None and bias is None:
        return ()
    known = (weight or bias).type  # pyright: ignore[reportOptionalMemberAccess]
    return (
        full(b, 1.0, known.shape, known.dtype) if weight is None else weight,
        full(b, 0.0, known.shape, known.dtype) if bias is None else bias,
    )


# --- evaluation ---------------------------------------------------------------------------------------


def _infer_eval(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, mean, variance, *params = inputs
    require(len(params) in (0, 2), "weight and bias come together")
    layout = channel_layout(x.shape)
    check_params(x, params, layout)
    check_running((mean, variance), x, layout)
    require(x.shape[1] > 0 or not params, f"channels for weight and bias are required, got {x}")
    require(isinstance(attrs["eps"], float), "eps is a number")
    return (x,)


def _evaluate_eval(node: Node, *arrays: np.ndarray) -> np.ndarray:
    x, mean, variance, *params = widen(*arrays)
    view = channel_layout(x.shape).param_view
    y = (x - mean.reshape(view)) / np.sqrt(variance.reshape(view) + node.attrs["eps"])
    if params:
        y = y * params[0].reshape(view) + params[1].reshape(view)
    return y.astype(node.output.type.numpy_dtype)


def _inverse_deviation(b: Builder, variance: Value, eps: float, dtype: str) -> Value:
    return b.emit("rsqrt", b.emit("add_scalar", cast(b, variance, dtype), value=eps))


def _decompose_eval(b: Builder, node: Node, *inputs: Value) -> tuple[Value, ...]:
    x, mean, variance, *params = inputs
    layout = channel_layout(x.type.shape)
    dtype = wide_dtype(x.type.dtype)
    rstd = _inverse_deviation(b, variance, node.attrs["eps"], dtype)
    centered = b.emit("sub", cast(b, x, dtype), spread(b, cast(b, mean, dtype), layout))
    y = mul(b, centered, spread(b, rstd, layout))
    if params:
        weight, bias = (spread(b, cast(b, param, dtype), layout) for param in params)
        y = add(b, mul(b, y, weight), bias)
    return (cast(b, y, x.type.dtype),)


def _eval_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    """Cotangents of the running statistics are plain IR, dead unless somebody asks for them."""
    (ct,), (x, mean, variance, *params) = cts, node.inputs
    assert ct is not None
    operands = (ct, x, mean, variance, *params[:1])
    if x.type.numel:
        backward = b.emit_many("batch_norm_eval_backward", *operands, eps=node.attrs["eps"])
    else:
        backward = _decompose_eval_backward(b, node, *operands)
    layout, dtype = channel_layout(x.type.shape), wide_dtype(x.type.dtype)
    rstd = _inverse_deviation(b, variance, node.attrs["eps"], dtype)
    wide, centered = cast(b, ct, dtype), cast(b, x, dtype)
    centered = b.emit("sub", centered, spread(b, cast(b, mean, dtype), layout))
    slope = rstd if not params else mul(b, rstd, cast(b, params[0], dtype))
    mean_ct = b.emit("neg", mul(b, sum_dims(b, wide, layout.dims), slope))
    moment = sum_dims(b, mul(b, wide, centered), layout.dims)
    variance_ct = scale(b, mul(b, mul(b, moment, slope), mul(b, rstd, rstd)), -0.5)
    x_ct, *params_ct = backward
    return x_ct, cast(b, mean_ct, mean.type.dtype), cast(b, variance_ct, variance.type.dtype), *params_ct


def _axes_eval(node: Node) -> Axes:
    """Everything is independent."""
    x = ("n", "c", *(f"s{axis}" for axis in range(node.output.type.rank - 2)))
    return Axes((x, *(("c",) for _ in node.inputs[1:])), (x,))


def _lower_eval(node: Node, args: Sequence[str]) -> str:
    x, mean, variance, *params = args
    weight, bias = params or ("None", "None")
    return f"torch.batch_norm({x}, {weight}, {bias}, {mean}, {variance}, False, 0.0, {node.attrs['eps']!r}, True)"


# --- backward of evaluation ---------------------------------------------------------------------------


def _infer_eval_backward(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    ct, x, mean, variance, *weight = inputs
    layout = channel_layout(x.shape)
    check_params(x, weight, layout)
    check_running((mean, variance), x, layout)
    require(len(weight) <= 1, "cotangent, x, mean, variance and weight are the inputs")
    require(ct == x, "a cotangent of x's type is required")
    require(x.numel > 0, f"elements are required, of none torch's kernel divides by 0; got {x}")
    require(isinstance(attrs["eps"], float), "eps is a number")
    return (x, *weight, *weight)


def _evaluate_eval_backward(node: Node, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    ct, x, mean, variance, *weight = widen(*arrays)
    layout = channel_layout(x.shape)
    view = layout.param_view
    rstd = 1 / np.sqrt(variance.reshape(view) + node.attrs["eps"])
    x_ct = ct * rstd if not weight else ct * rstd * weight[0].reshape(view)
    weight_ct = (ct * (x - mean.reshape(view)) * rstd).sum(layout.dims)
    results = (x_ct, weight_ct, ct.sum(layout.dims))
    return tuple(r.astype(o.type.numpy_dtype) for r, o in zip(results, node.outputs, strict=False))


def _decompose_eval_backward(b: Builder, node: Node, *inputs: Value) -> tuple[Value, ...]:
    ct, x, mean, variance, *weight = inputs
    layout, dtype = channel_layout(x.type.shape), wide_dtype(x.type.dtype)
    rstd = _inverse_deviation(b, variance, node.attrs["eps"], dtype)
    wide = cast(b, ct, dtype)
    if not weight:
        return (cast(b, mul(b, wide, spread(b, rstd, layout)), x.type.dtype),)
    slope = mul(b, rstd, cast(b, weight[0], dtype))
    centered = b.emit("sub", cast(b, x, dtype), spread(b, cast(b, mean, dtype), layout))
    weight_ct = mul(b, sum_dims(b, mul(b, wide, centered), layout.dims), rstd)
    return (
        cast(b, mul(b, wide, spread(b, slope, layout)), x.type.dtype),
        cast(b, weight_ct, weight[0].type.dtype),
        cast(b, sum_dims(b, wide, layout.dims), weight[0].type.dtype),
    )


def _lower_eval_backward(node: Node, args: Sequence[str]) -> str:
    names = (*args, "None")[:5]
    call = f"kernels.batch_norm_eval_backward({', '.join(names)}, {node.attrs['eps']!r})"
    return f"{call}[0]" if len(node.outputs) == 1 else call


def emit_eval(
    b: Builder, x: Value, weight: Value | None, bias: Value | None, mean: Value, variance: Value, eps: float
) -> Value:
    """``batch_norm_eval`` of optional weight and bias."""
    mean, variance = (_constant(b, value) for value in (mean, variance))
    return b.emit("batch_norm_eval", x, mean, variance, *affine_params(b, weight, bias), eps=float(eps))


def _constant(b: Builder, value: Value) -> Value:
    """torch does not differentiate running statistics; those that are inputs of the graph need no saying."""
    computed = any(value in node.outputs for node in b.nodes)
    return b.emit("stop_gradient", value) if computed else value


def vectors(x: TensorType, dtype: str, *domains: str) -> tuple[Arg, ...]:
    """Sample inputs of one number a channel."""
    return tuple(Arg(TensorType(dtype, x.shape[1:2]), domain) for domain in domains)


SAMPLE_TYPES = (t(4, 3, 5), t(2, 3, 4, 2), t(6, 3))
HALF_TYPE = t(4, 3, 5, dtype="bf16")

register(
    OpDef(
        name="batch_norm_eval",
        infer=_infer_eval,
        evaluate=_evaluate_eval,
        vjp=_eval_vjp,
        cost=norm_cost(2),
        axes=_axes_eval,
        lower=_lower_eval,
        aten={},
        samples=(
            *(
                Sample((Arg(x), *vectors(x, "f64", "real", "positive", "real", "real")), {"eps": 1e-5})
                for x in SAMPLE_TYPES
            ),
            Sample((Arg(SAMPLE_TYPES[1]), *vectors(SAMPLE_TYPES[1], "f64", "real", "positive")), {"eps": 1e-3}),
            Sample((Arg(HALF_TYPE), *vectors(HALF_TYPE, "f32", "real", "positive", "real", "real")), {"eps": 1e-5}),
        ),
        decompose=_decompose_eval,
    )
)
register(
    OpDef(
        name="batch_norm_eval_backward",
        infer=_infer_eval_backward,
        evaluate=_evaluate_eval_backward,
        vjp=BY_DECOMPOSITION,
        cost=norm_cost(6),
        axes=channel_axes,
        lower=_lower_eval_backward,
        aten={},
        samples=(
            *(
                Sample((Arg(x), Arg(x), *vectors(x, "f64", "real", "positive", "real")), {"eps": 1e-5})
                for x in SAMPLE_TYPES
            ),
            Sample(
                (Arg(SAMPLE_TYPES[1]), Arg(SAMPLE_TYPES[1]), *vectors(SAMPLE_TYPES[1], "f64", "real", "positive")),
                {"eps": 1e-3},
            ),
        ),
        decompose=_decompose_eval_backward,
    )
)
