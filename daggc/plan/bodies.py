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


def state_target(state: str, param: str) -> str:
    """The target of a state's port: ``exp_avg:wte.weight``."""
    return f"{state}:{param}"


def with_loss_cotangent(body: Graph, name: str, loss: str) -> Graph:
    """The body under a new name, the loss's cotangent made a constant 1 inside, those of other results 0."""
    if not body.inputs_of("cotangent"):
        return Graph(name, body.inputs, body.nodes, body.outputs)
    b = REGISTRY.builder(name)
    b.reserve(value.name for value in body.values())
    values: dict[str, Value] = {port.value.name: b.adopt(port) for port in body.inputs if port.kind != "cotangent"}
    for port in body.inputs_of("cotangent"):
        seed = 1.0 if port.target == f"output:{loss}" else 0.0
        values[port.value.name] = full(b, seed, port.value.type.shape, port.value.type.dtype)
    for node in body.nodes:
        outputs = b.append(node, [values[value.name] for value in node.inputs])
        values.update(zip((value.name for value in node.outputs), outputs, strict=True))
    for port in body.outputs:
        b.output(values[port.value.name], port.kind, port.target)
    return b.build()


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


def sums(name: str, types: Sequence[TensorType], count: int) -> Graph:
    """``count`` groups of inputs of these types, one after the other, added in order: an output for each type."""
    b = REGISTRY.builder(name)
    groups = [[b.input(t, "value", f"{at}#{index}") for at, t in enumerate(types)] for index in range(count)]
    for at in range(len(types)):
        b.output(sum_scalars(b, [group[at] for group in groups]), "value", str(at))
    return b.build()


def squared_norms(name: str, types: Sequence[TensorType]) -> Graph:
    """The sum of the squares of all elements of gradients of these types, f64[]."""
    b = REGISTRY.builder(name)
    gradients = [b.input(type_, "value", str(index)) for index, type_ in enumerate(types)]
    b.output(sum_scalars(b, [b.emit("squared_norm", gradient) for gradient in gradients]), "value", "0")
    return b.build()


def clipping(name: str, count: int) -> Graph:
    """From ``count`` squared norms and the largest norm allowed to the coefficient and the norm, f64[] all."""
    b = REGISTRY.builder(name)
    parts = [b.input(SCALAR, "value", str(index)) for index in range(count)]
    coefficient, norm = clip_coefficient(b, parts, b.input(SCALAR, "scalar", "clip"))
    b.output(coefficient, "value", "coefficient")
    b.output(norm, "value", "norm")
    return b.build()


def updates(
    name: str, params: Sequence[tuple[Port, Group]], clip: bool, donate: bool
) -> tuple[Graph, tuple[tuple[str, str], ...]]:
    """The update of a stage's parameters.

    Returns:
        The body, whose inputs are, in order, for each parameter its value, gradient and states; then ``lr`` of
        each group that occurs, ``step`` and, with ``clip``, the coefficient; and kind and target of each output.
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
    coefficient = b.input(SCALAR, "value", "coefficient") if clip else None
    for (port, group), (value, gradient, states) in zip(params, given, strict=True):
        if coefficient is not None:
            gradient = _scaled(b, gradient, coefficient)
        update = sgd_update if group.kind == "sgd" else adamw_update
        options: dict[str, Attr] = {**group.options, "donate": donate}
        results = update(b, value, gradient, states, rates[group.name], step, **options)
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
