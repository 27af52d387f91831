"""Updates of an optimizer: one op for one parameter, and what clipping by the global norm needs.

Numbers that may change from step to step (the learning rate, the number of the step, a clipping coefficient)
are f64 scalars among the inputs, so a schedule of learning rates recompiles nothing; what is fixed for a group of
parameters (momentum, betas, weight decay) is attributes. The meaning is that of ``torch.optim``'s single-tensor
algorithms. ``donate=True`` allows generated code to write new optimizer state into the old state's memory; a
parameter is always new, since forward tasks may still read the old one. An update may have a last input, ``finite``:
where it is false, the step is skipped, and parameter and state stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.loss_scale import FLAG
from daggc.ops.opdef import (
    NOT_DIFFERENTIABLE,
    Arg,
    Cost,
    OpDef,
    Sample,
    node_bytes,
    register,
    require,
    t,
    whole,
)

SCALAR = TensorType("f64", ())


def sgd_states(momentum: float) -> tuple[str, ...]:
    """The names of ``sgd_update``'s state tensors, in order, as torch's state dict has them."""
    return ("momentum_buffer",) if momentum else ()


def adamw_states(amsgrad: bool) -> tuple[str, ...]:
    """The names of ``adamw_update``'s state tensors, in order, as torch's state dict has them."""
    return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ()))


def _infer_update(states: Callable[[Attrs], Sequence[str]], options: Sequence[str]):
    """``(param, grad, *states, lr, step) -> (param, *states)``, all but the scalars of one type; then ``finite``."""

    def infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        for name in options:
            require(isinstance(attrs[name], bool | int | float), f"{name} is a number, got {attrs[name]!r}")
        names = states(attrs)
        wanted = f"param, grad, {', '.join((*names, 'lr', 'step'))}"
        tensors, scalars = inputs[: 2 + len(names)], inputs[2 + len(names) :]
        require(
            len(scalars) in (2, 3),
            f"{4 + len(names)} inputs ({wanted}), or one more (finite), are required, got {len(inputs)}",
        )
        lr, step, *finite = scalars
        require(tensors[0].is_float, f"a parameter of real numbers is required, got {tensors[0]}")
        require(len(set(tensors)) == 1, "param, grad and states are of one type")
        require(lr == step == SCALAR, f"lr and step are {SCALAR}")
        require(not finite or finite[0] == FLAG, f"finite is {FLAG}")
        return (tensors[0],) * (1 + len(names))

    return infer


def _update_cost(flops_per_element: float) -> Callable[[Node], Cost]:
    return lambda node: Cost(flops_per_element * node.inputs[0].type.numel, node_bytes(node), "elementwise")


def _wide(array: np.ndarray) -> np.ndarray:
    """f16 and bf16 are computed in f32 and rounded once."""
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def _rounded(node: Node, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    pairs = zip(arrays, node.outputs, strict=True)
    return tuple(np.asarray(array).astype(value.type.numpy_dtype) for array, value in pairs)


def _decayed(param: np.ndarray, grad: np.ndarray, attrs: Attrs) -> np.ndarray:
    """The gradient of what is minimised, with the L2 penalty's."""
    grad = -grad if attrs["maximize"] else grad
    return grad + attrs["weight_decay"] * param if attrs["weight_decay"] else grad


_Arrays = tuple[np.ndarray, ...]


def _conditional(node: Node) -> bool:
    """Whether the update has the input ``finite``."""
    return len(node.inputs) == len(node.outputs) + 4


def _unless_skipped(update: Callable[..., _Arrays]) -> Callable[..., _Arrays]:
    """An update's meaning, with that of ``finite``."""

    def evaluate(node: Node, *arrays: np.ndarray) -> _Arrays:
        if not _conditional(node):
            return update(node, *arrays)
        *given, finite = arrays
        param, _, *states = given[:-2]
        return update(node, *given) if finite else (param, *states)

    return evaluate


# --- SGD ----------------------------------------------------------------------------------------------

SGD_OPTIONS = ("momentum", "dampening", "nesterov", "weight_decay", "maximize", "donate")


@_unless_skipped
def _evaluate_sgd(node: Node, *arrays: np.ndarray) -> _Arrays:
    attrs = node.attrs
    param, grad, *state = map(_wide, arrays[:-2])
    lr, step = float(arrays[-2]), float(arrays[-1])
    grad = _decayed(param, grad, attrs)
    if attrs["momentum"]:
        buffer = grad if step == 1 else state[0] * attrs["momentum"] + (1 - attrs["dampening"]) * grad
        grad = grad + attrs["momentum"] * buffer if attrs["nesterov"] else buffer
        state = [buffer]
    return _rounded(node, (param - lr * grad, *state))


def sgd_update(
    b: Builder,
    param: Value,
    grad: Value,
    states: Sequence[Value],
    lr: Value,
    step: Value,
    finite: Value | None = None,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    donate: bool = False,
) -> tuple[Value, ...]:
    """The new parameter and momentum buffer, as ``torch.optim.SGD``. On step 1 the buffer becomes the gradient.

    ``finite``: a bool[] that is false where the step is skipped.
    """
    return b.emit_many(
        "sgd_update", param, grad, *states, lr, step, *([] if finite is None else [finite]),
        momentum=float(momentum), dampening=float(dampening), nesterov=nesterov, weight_decay=float(weight_decay),
        maximize=maximize, donate=donate,
    )  # fmt: skip


def _lower(function: str, options: Sequence[str]) -> Callable[[Node, Sequence[str]], str]:
    def lower(node: Node, args: Sequence[str]) -> str:
        given = ", ".join(f"{name}={node.attrs[name]!r}" for name in options)
        finite = args[-1] if _conditional(node) else ""
        args = args[:-1] if finite else args
        call = f"kernels.{function}({', '.join(args)}, {given})"
        param, _, *states = args[:-2]
        call, kept = (call, f"({param}, {', '.join(states)})") if states else (f"{call}[0]", param)
        return f"({call} if {finite} else {kept})" if finite else call

    return lower


_SCALAR = Arg(SCALAR, "positive")
_STEP = Arg(SCALAR, "count")
_FINITE = Arg(FLAG, "bool")
_PLAIN = dict.fromkeys(SGD_OPTIONS, 0.0) | {"nesterov": False, "maximize": False, "donate": False}

register(
    OpDef(
        name="sgd_update",
        infer=_infer_update(lambda attrs: sgd_states(attrs["momentum"]), SGD_OPTIONS),
        evaluate=_evaluate_sgd,
        vjp=NOT_DIFFERENTIABLE,
        cost=_update_cost(6),
        axes=whole,
        lower=_lower("sgd_update", SGD_OPTIONS),
        aten={},
        samples=(
            Sample((Arg(t(3, 4)), Arg(t(3, 4)), _SCALAR, _STEP), _PLAIN),
            Sample(
                (*(Arg(t(3, 4)),) * 3, _SCALAR, _STEP),
                {**_PLAIN, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "maximize": True},
            ),
            Sample((*(Arg(t(5)),) * 3, _SCALAR, _STEP, _FINITE), {**_PLAIN, "momentum": 0.9, "nesterov": True}),
        ),
    )
)

# --- Adam and AdamW -----------------------------------------------------------------------------------

ADAMW_OPTIONS = ("beta1", "beta2", "eps", "weight_decay", "decoupled", "amsgrad", "maximize", "donate")


def _lerp(start: np.ndarray, end: np.ndarray, weight: float) -> np.ndarray:
    """torch.lerp: exact at both ends."""
    return start + weight * (end - start) if weight < 0.5 else end - (end - start) * (1 - weight)


@_unless_skipped
def _evaluate_adamw(node: Node, *arrays: np.ndarray) -> _Arrays:
    attrs = node.attrs
    param, grad, exp_avg, exp_avg_sq, *largest = map(_wide, arrays[:-2])
    lr, step = float(arrays[-2]), float(arrays[-1])
    if attrs["decoupled"]:
        grad = -grad if attrs["maximize"] else grad
        param = param * (1 - lr * attrs["weight_decay"])
    else:
        grad = _decayed(param, grad, attrs)
    exp_avg = _lerp(exp_avg, grad, 1 - attrs["beta1"])
    exp_avg_sq = exp_avg_sq * attrs["beta2"] + (1 - attrs["beta2"]) * grad * grad
    if attrs["amsgrad"]:
        largest = [np.maximum(largest[0], exp_avg_sq)]
    second = largest[0] if attrs["amsgrad"] else exp_avg_sq
    denominator = np.sqrt(second) / (1 - attrs["beta2"] ** step) ** 0.5 + attrs["eps"]
    param = param - (lr / (1 - attrs["beta1"] ** step)) * exp_avg / denominator
    return _rounded(node, (param, exp_avg, exp_avg_sq, *largest))


def adamw_update(
    b: Builder,
    param: Value,
    grad: Value,
    states: Sequence[Value],
    lr: Value,
    step: Value,
    finite: Value | None = None,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    amsgrad: bool = False,
    maximize: bool = False,
    donate: bool = False,
) -> tuple[Value, ...]:
    """The new parameter and moments, as ``torch.optim.AdamW``, or ``Adam`` with ``decoupled=False``.

    ``states`` are those of :func:`adamw_states`; ``step`` is 1 on the first step; ``finite`` as for :func:`sgd_update`.
    """
    return b.emit_many(
        "adamw_update", param, grad, *states, lr, step, *([] if finite is None else [finite]),
        beta1=float(beta1), beta2=float(beta2), eps=float(eps), weight_decay=float(weight_decay),
        decoupled=decoupled, amsgrad=amsgrad, maximize=maximize, donate=donate,
    )  # fmt: skip


_ADAMW = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01, "decoupled": True}
_FLAGS = {"amsgrad": False, "maximize": False, "donate": False}
_MOMENTS = (Arg(t(3, 4)), Arg(t(3, 4)), Arg(t(3, 4)), Arg(t(3, 4), "positive"))

register(
    OpDef(
        name="adamw_update",
        infer=_infer_update(lambda attrs: adamw_states(attrs["amsgrad"]), ADAMW_OPTIONS),
        evaluate=_evaluate_adamw,
        vjp=NOT_DIFFERENTIABLE,
        cost=_update_cost(15),
        axes=whole,
        lower=_lower("adamw_update", ADAMW_OPTIONS),
        aten={},
        samples=(
            Sample((*_MOMENTS, _SCALAR, _STEP), {**_ADAMW, **_FLAGS}),
            Sample((*_MOMENTS, _SCALAR, _STEP), {**_ADAMW, **_FLAGS, "decoupled": False, "maximize": True}),
            Sample(
                (*_MOMENTS, Arg(t(3, 4), "positive"), _SCALAR, _STEP, _FINITE), {**_ADAMW, **_FLAGS, "amsgrad": True}
            ),
        ),
    )
)

# --- clipping by the global norm ----------------------------------------------------------------------


def _infer_squared_norm(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require(x.is_float, f"real numbers are required, got {x}")
    return (SCALAR,)


def _evaluate_squared_norm(node: Node, x: np.ndarray) -> np.ndarray:
    """The norm in the tensor's dtype (f32 for 16 bits), as ``torch.linalg.vector_norm``; squared in f64."""
    wide = _wide(x)
    return np.square(np.float64(np.sqrt(np.sum(wide * wide))))


register(
    OpDef(
        name="squared_norm",
        infer=_infer_squared_norm,
        evaluate=_evaluate_squared_norm,
        vjp=NOT_DIFFERENTIABLE,
        cost=lambda node: Cost(2.0 * node.inputs[0].type.numel, node_bytes(node), "reduction"),
        axes=whole,
        lower=lambda node, args: f"kernels.squared_norm({args[0]})",
        aten={},
        samples=(Sample((Arg(t(3, 4)),)), Sample((Arg(t()),)), Sample((Arg(t(7, dtype="f32")),))),
    )
)


def sum_scalars(b: Builder, values: Sequence[Value]) -> Value:
    """The sum, from left to right."""
    total = values[0]
    for value in values[1:]:
        total = b.emit("add", total, value)
    return total


def clip_coefficient(b: Builder, squared_norms: Sequence[Value], max_norm: Value) -> tuple[Value, Value]:
    """What gradients are multiplied by to clip their global norm, and that norm; all are f64 scalars.

    ``min(max_norm / (norm + 1e-6), 1)``, as ``torch.nn.utils.clip_grad_norm_``.
    """
    norm = b.emit("sqrt", sum_scalars(b, squared_norms))
    coefficient = b.emit("div", max_norm, b.emit("add_scalar", norm, value=1e-6))
    return b.emit("minimum_scalar", coefficient, value=1.0), norm
