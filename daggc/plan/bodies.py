"""Bodies of the tasks of a training step that outlining does not make: accumulation, sums, clipping, updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from daggc.errors import PlanError
from daggc.ir.attrs import Attr
from daggc.ir.builder import Builder
from daggc.ir.graph import Graph, Port, Value
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.build import broadcast, cast, full
from daggc.ops.loss_scale import FLAG, GROWTH, LOSS_SCALE, inverse_scale, next_scale
from daggc.ops.optim import (
    SCALAR,
    adamw_states,
    adamw_update,
    clip_coefficient,
    sgd_states,
    sgd_update,
    sum_scalars,
)


@dataclass(frozen=True)
class Group:
    """A parameter group of an optimizer.

    Attributes:
        name: its learning rate is the scalar input ``lr:<name>`` of the step.
        params: names of its parameters.
        kind: ``sgd`` or ``adamw`` (which is Adam with the option ``decoupled=False``).
        options: of :func:`daggc.ops.optim.sgd_update` or ``adamw_update``; fixed for the compiled step.
    """

    name: str
    params: tuple[str, ...]
    kind: str
    options: Mapping[str, Attr] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in ("sgd", "adamw"):
            raise PlanError(f"group {self.name!r}: an update is sgd or adamw, got {self.kind!r}")

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state tensors of each parameter."""
        if self.kind == "sgd":
            return sgd_states(self.options.get("momentum", 0.0))
        return adamw_states(self.options.get("amsgrad", False))


@dataclass(frozen=True)
class Scaling:
    """How the loss is scaled: the options of ``torch.amp.GradScaler``, fixed for the compiled step."""

    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000


# What a step that scales its loss keeps beside optimizer state: the scale, the steps since it last changed, and how
# many of the steps that ``step`` counts were skipped.
SCALING_STATE: Mapping[str, TensorType] = {"loss_scale": LOSS_SCALE, "growth": GROWTH, "skipped": SCALAR}


def state_target(state: str, param: str) -> str:
    """The target of a state's port: ``exp_avg:wte.weight``."""
    return f"{state}:{param}"


def seeded(body: Graph, name: str, loss: str, batches: int, scaled: bool) -> tuple[Graph, bool]:
    """The body under a new name, cotangents of the loss (``1 / batches``) and of other results (0) made inside.

    With ``scaled`` the loss's is ``scale / batches``, and the scale a further input, if the body has this cotangent.

    Returns:
        The body, and whether it has that input.
    """
    if not body.inputs_of("cotangent"):
        return Graph(name, body.inputs, body.nodes, body.outputs), False
    b = REGISTRY.builder(name)
    b.reserve(value.name for value in body.values())
    values: dict[str, Value] = {port.value.name: b.adopt(port) for port in body.inputs if port.kind != "cotangent"}
    ports = {port.target: port for port in body.inputs_of("cotangent")}
    reads_scale = scaled and f"output:{loss}" in ports
    scale = b.input(LOSS_SCALE, "value", "loss_scale", name="loss_scale") if reads_scale else None
    for target, port in ports.items():
        seed = 1.0 / batches if target == f"output:{loss}" else 0.0
        values[port.value.name] = full(b, seed, port.value.type.shape, port.value.type.dtype)
    if scale is not None:
        port = ports[f"output:{loss}"]
        seed, parts = cast(b, scale, port.value.type.dtype), full(b, float(batches), (), port.value.type.dtype)
        values[port.value.name] = b.emit("div", seed, parts) if batches > 1 else seed
    for node in body.nodes:
        outputs = b.append(node, [values[value.name] for value in node.inputs])
        values.update(zip((value.name for value in node.outputs), outputs, strict=True))
    for port in body.outputs:
        b.output(values[port.value.name], port.kind, port.target)
    return b.build(), reads_scale


def accumulating(body: Graph, name: str, gradients: Sequence[int], kept: Sequence[int]) -> Graph:
    """The body with gradients added to those of earlier microbatches.

    Args:
        gradients: positions of outputs that are gradients; for each there is a further input, and an output at
            the end, in this order.
        kept: positions of the outputs that are still given as they are.
    """
    b = REGISTRY.builder(name)
    b.reserve(value.name for value in body.values())
    values = {port.value.name: b.adopt(port) for port in body.inputs}
    added = [body.outputs[at] for at in gradients]
    sums = [b.input(p.value.type, "accumulated", p.target, f"sum_{p.value.name}") for p in added]
    for node in body.nodes:
        outputs = b.append(node, [values[value.name] for value in node.inputs])
        values.update(zip((value.name for value in node.outputs), outputs, strict=True))
    for at in kept:
        port = body.outputs[at]
        b.output(values[port.value.name], port.kind, port.target)
    for port, total in zip(added, sums, strict=True):
        b.output(b.emit("add", total, values[port.value.name]), port.kind, port.target)
    return b.build()


def sums(name: str, types: Sequence[TensorType], count: int, over: int = 1) -> Graph:
    """``count`` groups of inputs of these types, one after the other, added in order: an output for each type.

    Args:
        over: what each sum is divided by.
    """
    b = REGISTRY.builder(name)
    groups = [[b.input(t, "value", f"{at}#{index}") for at, t in enumerate(types)] for index in range(count)]
    for at, type_ in enumerate(types):
        total = sum_scalars(b, [group[at] for group in groups])
        total = total if over == 1 else b.emit("div", total, full(b, float(over), type_.shape, type_.dtype))
        b.output(total, "value", str(at))
    return b.build()


def measures(name: str, types: Sequence[TensorType], clip: bool, scaled: bool) -> Graph:
    """What is to be known of gradients of these types before any is used.

    Inputs are the gradients and, if both are asked for, the loss scale. Outputs are, with ``clip``, the sum of the
    squares of all elements, f64[], the scale taken out; with ``scaled``, whether all are finite, bool[].
    """
    b = REGISTRY.builder(name)
    gradients = [b.input(type_, "value", str(index)) for index, type_ in enumerate(types)]
    if clip:
        inverse = inverse_scale(b, b.input(LOSS_SCALE, "value", "loss_scale", name="loss_scale")) if scaled else None
        norms = [
            b.emit("squared_norm", gradient if inverse is None else _scaled(b, gradient, inverse))
            for gradient in gradients
        ]
        b.output(sum_scalars(b, norms), "value", "0")
    if scaled:
        b.output(_all(b, [b.emit("all_finite", gradient) for gradient in gradients]), "value", "finite")
    return b.build()


def verdict(name: str, count: int, clip: bool, scaled: bool) -> Graph:
    """From what is known of ``count`` sets of gradients to what all updates must know. Scalars, f64[] but for two.

    Inputs in order: with ``clip``, squared norms and the largest norm allowed; with ``scaled``, whether each set is
    finite (bool[]), the loss scale (f32[]), the number of the step and how many before it were skipped.
    Outputs in order: what gradients are multiplied by; with ``clip``, their norm; with ``scaled``, whether all are
    finite (bool[]) and the number of the step, skipped ones not counted.
    """
    b = REGISTRY.builder(name)
    factor = norm = None
    if clip:
        parts = [b.input(SCALAR, "value", str(index)) for index in range(count)]
        factor, norm = clip_coefficient(b, parts, b.input(SCALAR, "scalar", "clip"))
    if not scaled:
        assert factor is not None and norm is not None, "something is asked for"
        b.output(factor, "value", "coefficient")
        b.output(norm, "value", "norm")
        return b.build()
    flags = [b.input(FLAG, "value", f"finite#{index}") for index in range(count)]
    inverse = cast(b, inverse_scale(b, b.input(LOSS_SCALE, "value", "loss_scale", name="loss_scale")), "f64")
    step, skipped = b.input(SCALAR, "scalar", "step"), b.input(SCALAR, "value", "skipped", name="skipped")
    b.output(inverse if factor is None else b.emit("mul", factor, inverse), "value", "coefficient")
    if norm is not None:
        b.output(norm, "value", "norm")
    b.output(_all(b, flags), "value", "finite")
    b.output(b.emit("sub", step, skipped), "value", "step")
    return b.build()


def scale_update(name: str, scaling: Scaling) -> Graph:
    """From whether the gradients are finite, and :data:`SCALING_STATE`, to that state after the step."""
    b = REGISTRY.builder(name)
    finite = b.input(FLAG, "value", "finite", name="finite")
    scale, growth, skipped = (b.input(type_, "state", key, name=key) for key, type_ in SCALING_STATE.items())
    new = next_scale(
        b, scale, growth, finite,
        growth_factor=scaling.growth_factor, backoff_factor=scaling.backoff_factor,
        growth_interval=scaling.growth_interval,
    )  # fmt: skip
    one_more = b.emit("add", skipped, cast(b, b.emit("logical_not", finite), "f64"))
    for key, value in zip(SCALING_STATE, (*new, one_more), strict=True):
        b.output(value, "state", key)
    return b.build()


def _all(b: Builder, flags: Sequence[Value]) -> Value:
    result = flags[0]
    for flag in flags[1:]:
        result = b.emit("logical_and", result, flag)
    return result


def updates(
    name: str, params: Sequence[tuple[Port, Group]], factor: bool, donate: bool, scaled: bool = False
) -> tuple[Graph, tuple[tuple[str, str], ...]]:
    """The update of a stage's parameters.

    Returns:
        The body, whose inputs are, in order, for each parameter its value, gradient and states; then ``lr`` of
        each group that occurs, ``step``, with ``factor`` what gradients are multiplied by and, with ``scaled``,
        whether they are finite; and kind and target of each output.
    """
    b = REGISTRY.builder(name)
    given: list[tuple[Value, Value, list[Value]]] = []
    for port, group in params:
        type_ = port.value.type.with_(device=None)
        value = b.input(type_, "param", port.target, name=port.value.name)
        gradient = b.input(type_, "value", f"grad:{port.target}", name=f"grad_{port.value.name}")
        states = [b.input(type_, "state", state_target(s, port.target), f"{s}_{port.value.name}") for s in group.states]
        given.append((value, gradient, states))
    rates = {group: b.input(SCALAR, "scalar", f"lr:{group}") for group in groups_of(params)}
    step = b.input(SCALAR, "scalar", "step")
    coefficient = b.input(SCALAR, "value", "coefficient") if factor else None
    finite = b.input(FLAG, "value", "finite", name="finite") if scaled else None
    for (port, group), (value, gradient, states) in zip(params, given, strict=True):
        if coefficient is not None:
            gradient = _scaled(b, gradient, coefficient)
        update = sgd_update if group.kind == "sgd" else adamw_update
        options: dict[str, Attr] = {**group.options, "donate": donate}
        results = update(b, value, gradient, states, rates[group.name], step, finite, **options)
        b.output(results[0], "param", port.target)
        for state, result in zip(group.states, results[1:], strict=True):
            b.output(result, "state", state_target(state, port.target))
    body = b.build()
    return body, tuple((port.kind, port.target) for port in body.outputs)


def groups_of(params: Sequence[tuple[Port, Group]]) -> tuple[str, ...]:
    """Names of the groups that occur, in order."""
    return tuple(dict.fromkeys(group.name for _, group in params))


def _scaled(b: Builder, gradient: Value, coefficient: Value) -> Value:
    factor = cast(b, coefficient, gradient.type.dtype)
    return b.emit("mul", gradient, broadcast(b, factor, gradient.type.shape))
