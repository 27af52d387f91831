"""Batch norm, in training and in evaluation, and instance norm, which imports to others.

Training: ``y, mean, rstd, [new_mean, new_var] = batch_norm(x, [weight, bias], [running_mean, running_var])``, with
``affine`` and ``running`` telling which inputs there are. Statistics are ``[c]``, f32 where x is f16 or bf16. The
batch is needed whole. Evaluation: ``y = batch_norm_eval(x, running_mean, running_var, [weight, bias])``.

Running statistics are differentiable in these ops; importers stop the gradients that torch does not have.

Instance norm imports as group norm with one channel a group: the same function, by a kernel that is five times
faster on CPU than torch's own way, a batch norm over ``n * c`` channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import add, cast, full, mul, scale, sum_dims
from daggc.ops.moments import (
    Layout,
    check_params,
    evaluate_norm,
    evaluate_norm_backward,
    norm,
    norm_backward,
    spread,
    statistics_vjp,
    stats_type,
    sum_present,
    wide_dtype,
    widen,
)
from daggc.ops.norm import import_group_norm, norm_cost
from daggc.ops.opdef import BY_DECOMPOSITION, Arg, Axes, OpDef, Sample, register, require, t


def _layout(shape: Sequence[int]) -> Layout:
    """Over all axes but the channels'."""
    require(len(shape) >= 2, f"x [n, c, ...] is required, got {tuple(shape)}")
    dims = (0, *range(2, len(shape)))
    return Layout(tuple(shape), tuple(shape), dims, (shape[1],), (1,))


def _check_running(running: Sequence[TensorType], x: TensorType, layout: Layout) -> None:
    for statistic in running:
        fits = statistic.dtype in (x.dtype, wide_dtype(x.dtype)) and statistic.shape == layout.stats
        require(fits, f"running statistics {TensorType(x.dtype, layout.stats)} are required, got {statistic}")


def _optional(values: Sequence, attrs: Attrs) -> tuple:
    """weight, bias, running mean, running variance; None for those that are absent."""
    count = 2 * attrs["affine"] + 2 * attrs["running"]
    require(len(values) == count, f"{count} inputs beside x are required, got {len(values)}")
    params = tuple(values[:2]) if attrs["affine"] else (None, None)
    return params + (tuple(values[-2:]) if attrs["running"] else (None, None))


def _unbias(layout: Layout) -> float:
    """Running variances are of the unbiased kind."""
    return layout.count / (layout.count - 1) if layout.count > 1 else float("nan")


# --- training -----------------------------------------------------------------------------------------


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, *rest = inputs
    weight, bias, mean, variance = _optional(rest, attrs)
    layout = _layout(x.shape)
    check_params(x, () if weight is None else (weight, bias), layout)
    require(layout.count > 1, f"more than one value for each channel is required in training, got {x}")
    statistics = stats_type(x, layout)
    if mean is None:
        return x, statistics, statistics
    _check_running((mean, variance), x, layout)
    return x, statistics, statistics, mean, variance


def _evaluate(node: Node, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    x, *rest = widen(*arrays)
    attrs = node.attrs
    weight, bias, running_mean, running_var = _optional(rest, attrs)
    layout = _layout(x.shape)
    y, mean, rstd = evaluate_norm(x, weight, bias, layout, attrs["eps"], True)
    results: tuple[np.ndarray, ...] = (y, mean, rstd)
    if running_mean is not None:
        m, variance = attrs["momentum"], x.var(layout.dims, ddof=1)
        results = (*results, (1 - m) * running_mean + m * mean, (1 - m) * running_var + m * variance)
    return tuple(r.astype(o.type.numpy_dtype) for r, o in zip(results, node.outputs, strict=True))


def _decompose(b: Builder, node: Node, *inputs: Value) -> tuple[Value, ...]:
    x, *rest = inputs
    attrs = node.attrs
    weight, bias, running_mean, running_var = _optional(rest, attrs)
    layout = _layout(x.type.shape)
    y, mean, rstd = norm(b, x, weight, bias, layout, attrs["eps"], True)
    assert mean is not None
    if running_mean is None:
        return y, mean, rstd
    variance = b.emit("add_scalar", b.emit("pow_scalar", rstd, value=-2), value=-attrs["eps"])
    return (
        y,
        mean,
        rstd,
        _blend(b, running_mean, mean, attrs["momentum"]),
        _blend(b, running_var, scale(b, variance, _unbias(layout)), attrs["momentum"]),
    )


def _blend(b: Builder, old: Value, new: Value, momentum: float) -> Value:
    """``(1 - momentum) * old + momentum * new``, in the dtype of old."""
    wide = cast(b, old, new.type.dtype)
    return cast(b, add(b, scale(b, wide, 1 - momentum), scale(b, new, momentum)), old.type.dtype)


def _vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    x, *rest = node.inputs
    attrs, layout = node.attrs, _layout(x.type.shape)
    weight = _optional(rest, attrs)[0]
    mean, rstd = node.outputs[1:3]
    grads: list[Value | None] = [None] * len(node.inputs)
    if cts[0] is not None:
        own = () if weight is None else (weight,)
        backward = b.emit_many("batch_norm_backward", cts[0], x, mean, rstd, *own)
        grads[: len(backward)] = backward
    mean_ct, rstd_ct = cts[1:3]
    if attrs["running"]:
        momentum, dtype = attrs["momentum"], mean.type.dtype
        new_mean_ct, new_var_ct = cts[3:]
        if new_mean_ct is not None:
            grads[-2] = scale(b, new_mean_ct, 1 - momentum)
            mean_ct = sum_present(b, mean_ct, scale(b, cast(b, new_mean_ct, dtype), momentum))
        if new_var_ct is not None:  # var = rstd ** -2 - eps
            grads[-1] = scale(b, new_var_ct, 1 - momentum)
            slope = scale(b, b.emit("pow_scalar", rstd, value=-3), -2 * momentum * _unbias(layout))
            rstd_ct = sum_present(b, rstd_ct, mul(b, cast(b, new_var_ct, dtype), slope))
    grads[0] = sum_present(b, grads[0], statistics_vjp(b, x, mean, rstd, layout, mean_ct, rstd_ct))
    return grads


def _axes(node: Node) -> Axes:
    """Channels are independent; samples are not."""
    return Axes(
        tuple(_channel(value) for value in node.inputs),
        tuple(_channel(value) for value in node.outputs),
    )


def _channel(value: Value) -> tuple[str | None, ...]:
    return ("c",) if value.type.rank == 1 else (None, "c", *(None,) * (value.type.rank - 2))


def _names(values: Sequence[str | None]) -> str:
    return ", ".join("None" if value is None else value for value in values)


def _lower(node: Node, args: Sequence[str]) -> str:
    a = node.attrs
    return f"kernels.batch_norm({args[0]}, {_names(_optional(args[1:], a))}, {a['momentum']!r}, {a['eps']!r})"


# --- backward of training -----------------------------------------------------------------------------


def _infer_backward(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    ct, x, mean, rstd, *weight = inputs
    layout = _layout(x.shape)
    check_params(x, weight, layout)
    statistics = stats_type(x, layout)
    require(ct == x, "a cotangent of x's type is required")
    require(mean == statistics and rstd == statistics, f"statistics {statistics} are required")
    return (x, *weight, *weight)


def _evaluate_backward(node: Node, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    ct, x, mean, rstd, *weight = widen(*arrays)
    results = evaluate_norm_backward(ct, x, mean, rstd, weight[0] if weight else None, _layout(x.shape))
    return tuple(r.astype(o.type.numpy_dtype) for r, o in zip(results, node.outputs, strict=False))


def _decompose_backward(b: Builder, node: Node, *inputs: Value) -> tuple[Value, ...]:
    ct, x, mean, rstd, *weight = inputs
    layout = _layout(x.type.shape)
    return norm_backward(b, ct, x, mean, rstd, weight[0] if weight else None, layout)[: len(node.outputs)]


def _lower_backward(node: Node, args: Sequence[str]) -> str:
    call = f"kernels.batch_norm_backward({', '.join(args)})"
    return f"{call}[0]" if len(node.outputs) == 1 else call


# --- evaluation ---------------------------------------------------------------------------------------


def _infer_eval(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, mean, variance, *params = inputs
    require(len(params) in (0, 2), "weight and bias come together")
    layout = _layout(x.shape)
    check_params(x, params, layout)
    _check_running((mean, variance), x, layout)
    require(attrs["eps"] >= 0, "eps is a number")
    return (x,)


def _evaluate_eval(node: Node, *arrays: np.ndarray) -> np.ndarray:
    x, mean, variance, *params = widen(*arrays)
    view = _layout(x.shape).param_view
    y = (x - mean.reshape(view)) / np.sqrt(variance.reshape(view) + node.attrs["eps"])
    if params:
        y = y * params[0].reshape(view) + params[1].reshape(view)
    return y.astype(node.output.type.numpy_dtype)


def _inverse_deviation(b: Builder, variance: Value, eps: float, dtype: str) -> Value:
    return b.emit("rsqrt", b.emit("add_scalar", cast(b, variance, dtype), value=eps))


def _decompose_eval(b: Builder, node: Node, *inputs: Value) -> tuple[Value, ...]:
    x, mean, variance, *params = inputs
    layout = _layout(x.type.shape)
    dtype = wide_dtype(x.type.dtype)
    rstd = _inverse_deviation(b, variance, node.attrs["eps"], dtype)
    centered = b.emit("sub", cast(b, x, dtype), spread(b, cast(b, mean, dtype), layout))
    y = mul(b, centered, spread(b, rstd, layout))
    if params:
        weight, bias = (spread(b, cast(b, param, dtype), layout) for param in params)
        y = add(b, mul(b, y, weight), bias)
    return (cast(b, y, x.type.dtype),)


def _eval_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    """Cotangents of the running statistics are plain IR that nobody asks for as a rule."""
    (ct,), (x, mean, variance, *params) = cts, node.inputs
    assert ct is not None
    backward = b.emit_many("batch_norm_eval_backward", ct, x, mean, variance, *params[:1], eps=node.attrs["eps"])
    layout, dtype = _layout(x.type.shape), wide_dtype(x.type.dtype)
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
    layout = _layout(x.shape)
    check_params(x, weight, layout)
    _check_running((mean, variance), x, layout)
    require(ct == x, "a cotangent of x's type is required")
    require(attrs["eps"] >= 0, "eps is a number")
    return (x, *weight, *weight)


def _evaluate_eval_backward(node: Node, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    ct, x, mean, variance, *weight = widen(*arrays)
    layout = _layout(x.shape)
    view = layout.param_view
    rstd = 1 / np.sqrt(variance.reshape(view) + node.attrs["eps"])
    x_ct = ct * rstd if not weight else ct * rstd * weight[0].reshape(view)
    weight_ct = (ct * (x - mean.reshape(view)) * rstd).sum(layout.dims)
    results = (x_ct, weight_ct, ct.sum(layout.dims))
    return tuple(r.astype(o.type.numpy_dtype) for r, o in zip(results, node.outputs, strict=False))


def _decompose_eval_backward(b: Builder, node: Node, *inputs: Value) -> tuple[Value, ...]:
    ct, x, mean, variance, *weight = inputs
    layout, dtype = _layout(x.type.shape), wide_dtype(x.type.dtype)
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


# --- importers ----------------------------------------------------------------------------------------


def _params(b: Builder, x: Value, weight: Value | None, bias: Value | None) -> tuple[Value, ...]:
    """Weight and bias, or neither; one alone is joined by ones or zeros."""
    if weight is None and bias is None:
        return ()
    known = (weight or bias).type  # pyright: ignore[reportOptionalMemberAccess]
    return (
        full(b, 1.0, known.shape, known.dtype) if weight is None else weight,
        full(b, 0.0, known.shape, known.dtype) if bias is None else bias,
    )


def _emit_training(
    b: Builder,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running: tuple[Value, ...],
    momentum: float,
    eps: float,
) -> tuple[Value, ...]:
    params = _params(b, x, weight, bias)
    attrs: dict[str, Attr] = {"affine": bool(params), "running": bool(running)}
    outputs = b.emit_many("batch_norm", x, *params, *running, **attrs, momentum=float(momentum), eps=float(eps))
    return (*outputs[:3], *(b.emit("stop_gradient", value) for value in outputs[3:]))


def _emit_eval(
    b: Builder, x: Value, weight: Value | None, bias: Value | None, mean: Value, variance: Value, eps: float
) -> Value:
    mean, variance = (_constant(b, value) for value in (mean, variance))
    return b.emit("batch_norm_eval", x, mean, variance, *_params(b, x, weight, bias), eps=float(eps))


def _constant(b: Builder, value: Value) -> Value:
    """torch does not differentiate running statistics; those that are inputs of the graph need no saying."""
    computed = any(value in node.outputs for node in b.nodes)
    return b.emit("stop_gradient", value) if computed else value


def _import_functional(
    b: Builder,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value,
    running_var: Value,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Value | None, ...]:
    if training:
        return _emit_training(b, x, weight, bias, (running_mean, running_var), momentum, eps)
    return _emit_eval(b, x, weight, bias, running_mean, running_var, eps), None, None, running_mean, running_var


def _import_no_stats(
    b: Builder, x: Value, weight: Value | None, bias: Value | None, training: bool, momentum: float, eps: float
) -> tuple[Value, ...]:
    return _emit_training(b, x, weight, bias, (), momentum, eps)


def _import_no_training(
    b: Builder,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value,
    running_var: Value,
    momentum: float,
    eps: float,
) -> tuple[Value | None, ...]:
    return _emit_eval(b, x, weight, bias, running_mean, running_var, eps), None, None


def _import_batch_norm(
    b: Builder,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value | None,
    running_var: Value | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Value:
    """``batch_norm`` proper, which in training would change its running statistics in place."""
    if not training:
        if running_mean is None or running_var is None:
            raise TypeRuleError("batch norm in evaluation needs running statistics")
        return _emit_eval(b, x, weight, bias, running_mean, running_var, eps)
    if running_mean is not None or running_var is not None:
        raise TypeRuleError("batch norm that updates running statistics in place must be captured in functional form")
    return _emit_training(b, x, weight, bias, (), momentum, eps)[0]


def _import_instance_norm(
    b: Builder,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value | None,
    running_var: Value | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Value:
    """Statistics of each sample and channel, or, in evaluation, the running ones."""
    if not use_input_stats:
        return _import_batch_norm(b, x, weight, bias, running_mean, running_var, False, momentum, eps)
    if running_mean is not None or running_var is not None:
        raise TypeRuleError(
            "instance norm that updates running statistics cannot be captured (torch.export loses the update); "
            "call eval() or use track_running_stats=False"
        )
    return import_group_norm(b, x, x.type.shape[1], weight, bias, eps)


# --- the ops ------------------------------------------------------------------------------------------


def _vectors(x: TensorType, dtype: str, *domains: str) -> tuple[Arg, ...]:
    return tuple(Arg(TensorType(dtype, x.shape[1:2]), domain) for domain in domains)


def _training_sample(x: TensorType, dtype: str, affine: bool, running: bool) -> Sample:
    params = _vectors(x, dtype, "real", "real") if affine else ()
    statistics = _vectors(x, dtype, "real", "positive") if running else ()
    attrs = {"affine": affine, "running": running, "momentum": 0.1, "eps": 1e-5}
    return Sample((Arg(x), *params, *statistics), attrs)


_X = (t(4, 3, 5), t(2, 3, 4, 2), t(6, 3))
_HALF = t(4, 3, 5, dtype="bf16")

register(
    OpDef(
        name="batch_norm",
        infer=_infer,
        evaluate=_evaluate,
        vjp=_vjp,
        cost=norm_cost(8),
        axes=_axes,
        lower=_lower,
        aten={
            "_native_batch_norm_legit_functional.default": _import_functional,
            "_native_batch_norm_legit.no_stats": _import_no_stats,
        },
        samples=(
            *(_training_sample(x, "f64", True, True) for x in _X),
            _training_sample(_X[1], "f64", False, True),
            _training_sample(_X[1], "f64", True, False),
            _training_sample(_HALF, "f32", True, True),
        ),
        decompose=_decompose,
    )
)
register(
    OpDef(
        name="batch_norm_backward",
        infer=_infer_backward,
        evaluate=_evaluate_backward,
        vjp=BY_DECOMPOSITION,
        cost=norm_cost(14),
        axes=_axes,
        lower=_lower_backward,
        aten={},
        samples=(
            *(Sample((Arg(x), Arg(x), *_vectors(x, "f64", "real", "positive", "real"))) for x in _X),
            Sample((Arg(_X[1]), Arg(_X[1]), *_vectors(_X[1], "f64", "real", "positive"))),
            Sample((Arg(_HALF), Arg(_HALF), *_vectors(_HALF, "f32", "real", "positive", "real"))),
        ),
        decompose=_decompose_backward,
    )
)
register(
    OpDef(
        name="batch_norm_eval",
        infer=_infer_eval,
        evaluate=_evaluate_eval,
        vjp=_eval_vjp,
        cost=norm_cost(2),
        axes=_axes_eval,
        lower=_lower_eval,
        aten={
            "batch_norm.default": _import_batch_norm,
            "_native_batch_norm_legit_no_training.default": _import_no_training,
            "instance_norm.default": _import_instance_norm,
        },
        samples=(
            *(Sample((Arg(x), *_vectors(x, "f64", "real", "positive", "real", "real")), {"eps": 1e-5}) for x in _X),
            Sample((Arg(_X[1]), *_vectors(_X[1], "f64", "real", "positive")), {"eps": 1e-3}),
            Sample((Arg(_HALF), *_vectors(_HALF, "f32", "real", "positive", "real", "real")), {"eps": 1e-5}),
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
        axes=_axes,
        lower=_lower_eval_backward,
        aten={},
        samples=(
            *(Sample((Arg(x), Arg(x), *_vectors(x, "f64", "real", "positive", "real")), {"eps": 1e-5}) for x in _X),
            Sample((Arg(_X[1]), Arg(_X[1]), *_vectors(_X[1], "f64", "real", "positive")), {"eps": 1e-3}),
        ),
        decompose=_decompose_eval_backward,
    )
)
