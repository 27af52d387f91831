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

from daggc.errors import IRError
from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.batch_norm_eval import (
    HALF_TYPE,
    SAMPLE_TYPES,
    affine_params,
    channel_axes,
    channel_layout,
    check_running,
    emit_eval,
    vectors,
)
from daggc.ops.build import add, cast, full, mul, scale
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
    widen,
)
from daggc.ops.norm import aten_outputs, import_group_norm, norm_cost
from daggc.ops.opdef import BY_DECOMPOSITION, Arg, OpDef, Sample, register, require


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
    layout = channel_layout(x.shape)
    check_params(x, () if weight is None else (weight, bias), layout)
    require(x.numel > 0, f"elements are required, got {x}")
    require(layout.count > 1, f"more than one value for each channel is required in training, got {x}")
    require(attrs["eps"] is not None, "eps is a number")
    statistics = stats_type(x, layout)
    if mean is None:
        return x, statistics, statistics
    check_running((mean, variance), x, layout)
    return x, statistics, statistics, mean, variance


def _evaluate(node: Node, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    x, *rest = widen(*arrays)
    attrs = node.attrs
    weight, bias, running_mean, running_var = _optional(rest, attrs)
    layout = channel_layout(x.shape)
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
    layout = channel_layout(x.type.shape)
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
    attrs, layout = node.attrs, channel_layout(x.type.shape)
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


def _names(values: Sequence[str | None]) -> str:
    return ", ".join("None" if value is None else value for value in values)


def _lower(node: Node, args: Sequence[str]) -> str:
    a = node.attrs
    return f"kernels.batch_norm({args[0]}, {_names(_optional(args[1:], a))}, {a['momentum']!r}, {a['eps']!r})"


# --- backward of training -----------------------------------------------------------------------------


def _infer_backward(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    ct, x, mean, rstd, *weight = inputs
    layout = channel_layout(x.shape)
    check_params(x, weight, layout)
    statistics = stats_type(x, layout)
    require(len(weight) <= 1, "cotangent, x, mean, rstd and weight are the inputs")
    require(ct == x, "a cotangent of x's type is required")
    require(x.numel > 0, f"elements are required, of none torch's kernel divides by 0; got {x}")
    require(mean == statistics and rstd == statistics, f"statistics {statistics} are required")
    return (x, *weight, *weight)


def _evaluate_backward(node: Node, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    ct, x, mean, rstd, *weight = widen(*arrays)
    results = evaluate_norm_backward(ct, x, mean, rstd, weight[0] if weight else None, channel_layout(x.shape))
    return tuple(r.astype(o.type.numpy_dtype) for r, o in zip(results, node.outputs, strict=False))


def _decompose_backward(b: Builder, node: Node, *inputs: Value) -> tuple[Value, ...]:
    ct, x, mean, rstd, *weight = inputs
    layout = channel_layout(x.type.shape)
    return norm_backward(b, ct, x, mean, rstd, weight[0] if weight else None, layout)[: len(node.outputs)]


def _lower_backward(node: Node, args: Sequence[str]) -> str:
    call = f"kernels.batch_norm_backward({', '.join(args)})"
    return f"{call}[0]" if len(node.outputs) == 1 else call


# --- importers ----------------------------------------------------------------------------------------


def _emit_training(
    b: Builder,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running: tuple[Value, ...],
    momentum: float,
    eps: float,
) -> tuple[Value | None, ...]:
    params = affine_params(b, weight, bias)
    attrs: dict[str, Attr] = {"affine": bool(params), "running": bool(running)}
    outputs = b.emit_many("batch_norm", x, *params, *running, **attrs, momentum=float(momentum), eps=float(eps))
    return (*aten_outputs(x, outputs[:3]), *(b.emit("stop_gradient", value) for value in outputs[3:]))


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
    y = emit_eval(b, x, weight, bias, running_mean, running_var, eps)
    return *_without_statistics(b, y), running_mean, running_var


def _without_statistics(b: Builder, y: Value) -> tuple[Value | None, ...]:
    """What torch gives in evaluation, when there are no statistics of the batch."""
    empty = full(b, 0.0, (0,), y.type.dtype)
    return aten_outputs(y, (y, empty, empty))


def _import_with_update(
    b: Builder,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value,
    running_var: Value,
    momentum: float,
    eps: float,
) -> tuple[Value | None, ...]:
    """``_batch_norm_with_update``; what it reserves is for cuDNN."""
    y, mean, rstd, *new = _emit_training(b, x, weight, bias, (running_mean, running_var), momentum, eps)
    return y, mean, rstd, full(b, 0, (0,), "u8"), *new


def _import_no_update(
    b: Builder,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value,
    running_var: Value,
    momentum: float,
    eps: float,
) -> tuple[Value | None, ...]:
    y = emit_eval(b, x, weight, bias, running_mean, running_var, eps)
    return *_without_statistics(b, y), full(b, 0, (0,), "u8")


def _import_no_stats(
    b: Builder, x: Value, weight: Value | None, bias: Value | None, training: bool, momentum: float, eps: float
) -> tuple[Value | None, ...]:
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
    return _without_statistics(b, emit_eval(b, x, weight, bias, running_mean, running_var, eps))


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
) -> Value | None:
    """``batch_norm`` proper, which in training would change its running statistics in place."""
    if not training:
        if running_mean is None or running_var is None:
            raise IRError("batch norm in evaluation needs running statistics")
        return emit_eval(b, x, weight, bias, running_mean, running_var, eps)
    if running_mean is not None or running_var is not None:
        raise IRError("batch norm that updates running statistics in place must be captured in functional form")
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
) -> Value | None:
    """Statistics of each sample and channel, or, in evaluation, the running ones."""
    if not use_input_stats:
        return _import_batch_norm(b, x, weight, bias, running_mean, running_var, False, momentum, eps)
    if running_mean is not None or running_var is not None:
        raise IRError(
            "instance norm that updates running statistics cannot be captured (torch.export loses the update); "
            "call eval() or use track_running_stats=False"
        )
    return import_group_norm(b, x, x.type.shape[1], weight, bias, eps)


# --- the ops ------------------------------------------------------------------------------------------


def _training_sample(x: TensorType, dtype: str, affine: bool, running: bool) -> Sample:
    params = vectors(x, dtype, "real", "real") if affine else ()
    statistics = vectors(x, dtype, "real", "positive") if running else ()
    attrs = {"affine": affine, "running": running, "momentum": 0.1, "eps": 1e-5}
    return Sample((Arg(x), *params, *statistics), attrs)


register(
    OpDef(
        name="batch_norm",
        infer=_infer,
        evaluate=_evaluate,
        vjp=_vjp,
        cost=norm_cost(8),
        axes=channel_axes,
        lower=_lower,
        aten={
            "_native_batch_norm_legit_functional.default": _import_functional,
            "_native_batch_norm_legit.no_stats": _import_no_stats,
            "_batch_norm_with_update_functional.default": _import_with_update,
            "_batch_norm_no_update.default": _import_no_update,
            "batch_norm.default": _import_batch_norm,
            "_native_batch_norm_legit_no_training.default": _import_no_training,
            "instance_norm.default": _import_instance_norm,
        },
        samples=(
            *(_training_sample(x, "f64", True, True) for x in SAMPLE_TYPES),
            _training_sample(SAMPLE_TYPES[1], "f64", False, True),
            _training_sample(SAMPLE_TYPES[1], "f64", True, False),
            _training_sample(HALF_TYPE, "f32", True, True),
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
        axes=channel_axes,
        lower=_lower_backward,
        aten={},
        samples=(
            *(Sample((Arg(x), Arg(x), *vectors(x, "f64", "real", "positive", "real"))) for x in SAMPLE_TYPES),
            Sample((Arg(SAMPLE_TYPES[1]), Arg(SAMPLE_TYPES[1]), *vectors(SAMPLE_TYPES[1], "f64", "real", "positive"))),
            Sample((Arg(HALF_TYPE), Arg(HALF_TYPE), *vectors(HALF_TYPE, "f32", "real", "positive", "real"))),
        ),
        decompose=_decompose_backward,
    )
)
