"""What a cut is judged by, as arrays over the forward nodes in planning order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from daggc.ir.graph import Graph, Node, Value
from daggc.ops import REGISTRY
from daggc.ops.opdef import NOT_DIFFERENTIABLE
from daggc.passes.split import RECOMPUTED, split
from daggc.plan.cost import Costs
from daggc.plan.device import Device
from daggc.plan.outline import cheap_values, origin_of
from daggc.plan.partition.order import parameter_users

TRAINED = 4.0  # bytes of a parameter, its gradient and two moments, for each byte of the parameter


@dataclass(frozen=True)
class Span:
    """Something that lives in one place and is used by several nodes: a parameter, or a buffer that changes.

    Attributes:
        ref: of its port.
        uses: positions of the nodes in planning order, ascending, at least two.
    """

    ref: str
    uses: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """Forward nodes in planning order; the work of a node is its own and that of its VJP.

    Attributes:
        nodes: the n forward nodes.
        flops: of each.
        resident: bytes that live with each between runs (parameters with gradients and optimizer state,
            buffers), at their first use.
        params: bytes of parameters alone.
        residuals: bytes that the backward keeps of each node's results, for one microbatch.
        working: bytes that the largest single op of each reads and writes.
        sent: n+1 bytes of values that cross from before position p to after it.
        returned: n+1 bytes of their cotangents.
        spans: what must not be torn apart.
        passes: 2 when training (forward and backward), else 1.
    """

    nodes: tuple[Node, ...]
    flops: np.ndarray
    resident: np.ndarray
    params: np.ndarray
    residuals: np.ndarray
    working: np.ndarray
    sent: np.ndarray
    returned: np.ndarray
    spans: tuple[Span, ...]
    passes: int
    costs: Costs
    owners: np.ndarray  # position of each joint node's origin

    def seconds(self, device: Device) -> np.ndarray:
        """Time of each node, with its VJP, on a device."""
        return np.bincount(self.owners, self.costs.seconds(device), len(self.nodes))

    @property
    def opaque(self) -> bool:
        """Whether there are Python functions, whose FLOPs are not known."""
        return bool(self.costs.opaque.any())


def work_of(joint: Graph, primal: Graph, order: Sequence[Node], trained: float = TRAINED) -> Work:
    """Measure the work of ``primal``'s nodes.

    Args:
        joint: what ``differentiate`` made of ``primal``, or ``primal`` for inference.
        order: ``primal``'s nodes in planning order.
        trained: bytes that live with a trained parameter for each byte of its own.
    """
    place = {node.outputs[0].name: index for index, node in enumerate(order)}
    owned = [(node, place[origin_of(node)]) for node in joint.nodes if origin_of(node) in place]
    owners = np.array([index for _, index in owned], np.intp)
    costs = Costs.of(node for node, _ in owned)
    working = np.zeros(len(order))
    np.maximum.at(working, owners, costs.bytes)
    forward, backward = split(joint, primal)
    residuals = np.zeros(len(order))
    holders = {value.name: index for node, index in owned for value in node.outputs}
    for port in forward.outputs_of("residual"):
        residuals[holders.get(port.value.name, 0)] += port.value.type.nbytes
    sent, returned = _crossing(primal, order, _active(joint, order))
    resident, params = _residents(joint, primal, order, trained)
    return Work(
        nodes=tuple(order),
        flops=np.bincount(owners, costs.flops, len(order)),
        resident=resident,
        params=params,
        residuals=residuals,
        working=working,
        sent=sent,
        returned=returned,
        spans=_spans(primal, order),
        passes=2 if backward.nodes else 1,
        costs=costs,
        owners=owners,
    )


def _active(joint: Graph, order: Sequence[Node]) -> set[str]:
    """Names of forward values that have cotangents: they depend smoothly on what gradients are asked for."""
    targets = {port.target for port in joint.outputs_of("grad")}
    active = {port.value.name for port in joint.inputs if port.ref in targets}
    for node in order:
        if REGISTRY[node.op].vjp is not NOT_DIFFERENTIABLE and any(value.name in active for value in node.inputs):
            active.update(value.name for value in node.outputs if value.type.differentiable)
    return active


def _crossing(primal: Graph, order: Sequence[Node], active: set[str]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of values, and of the cotangents of the active ones, that cross each position.

    Views count as what they are views of, and values that are cheap to make again count nothing.
    """
    cheap = cheap_values(primal)
    roots: dict[str, Value | None] = {}
    free = {port.value.name for port in primal.inputs if port.kind in ("param", "key", "scalar", "cotangent")}
    start: dict[str, int] = {}
    last: dict[str, int] = {}
    values: dict[str, tuple[Value, bool]] = {}
    for index, node in enumerate(order):
        for value in node.inputs:
            root = roots.get(value.name, value)
            if root is not None and root.name not in free:
                start.setdefault(root.name, index)  # a graph input is where it is first read
                values.setdefault(root.name, (root, root.name in active))
                last[root.name] = index
        for value in node.outputs:
            if node.op in RECOMPUTED and node.inputs:
                roots[value.name] = roots.get(node.inputs[0].name, node.inputs[0])
            elif value.name in cheap:
                roots[value.name] = None
            else:
                start[value.name] = index
                values[value.name] = value, value.name in active
    sent, returned = np.zeros(len(order) + 2), np.zeros(len(order) + 2)
    for name, end in last.items():
        value, has_cotangent = values[name]
        for steps, counts in ((sent, True), (returned, has_cotangent)):
            if counts:
                steps[start[name] + 1] += value.type.nbytes
                steps[end + 1] -= value.type.nbytes
    return np.cumsum(sent)[:-1], np.cumsum(returned)[:-1]


def _spans(primal: Graph, order: Sequence[Node]) -> tuple[Span, ...]:
    position = {node.outputs[0].name: index for index, node in enumerate(order)}
    uses = {
        ref: {position[primal.nodes[index].outputs[0].name] for index in users}
        for ref, users in parameter_users(primal).items()
    }
    # A buffer that changes is made anew where it is read.
    makers = {value.name: node.outputs[0].name for node in primal.nodes for value in node.outputs}
    users = primal.users() if primal.outputs_of("buffer") else {}
    buffers = {port.ref: port.value.name for port in primal.inputs_of("buffer")}
    for port in primal.outputs_of("buffer"):
        if port.value.name in makers:
            readers = [node.outputs[0].name for node in users.get(buffers.get(port.ref, ""), ())]
            uses[port.ref] = {position[name] for name in (*readers, makers[port.value.name])}
    return tuple(Span(ref, tuple(sorted(own))) for ref, own in sorted(uses.items()) if len(own) > 1)


def _residents(joint: Graph, primal: Graph, order: Sequence[Node], trained: float) -> tuple[np.ndarray, np.ndarray]:
    """Bytes between runs of everything, and of the parameters themselves, at the first node that reads each."""
    with_gradient = {port.target for port in joint.outputs_of("grad")}
    ports = {port.value.name: port for port in primal.inputs if port.kind in ("param", "buffer", "constant")}
    resident, params = np.zeros(len(order)), np.zeros(len(order))
    seen: set[str] = set()
    for index, node in enumerate(order):
        for value in node.inputs:
            port = ports.get(value.name)
            if port is None or value.name in seen:
                continue
            seen.add(value.name)
            resident[index] += value.type.nbytes * (trained if port.ref in with_gradient else 1.0)
            params[index] += value.type.nbytes if port.kind == "param" else 0
    return resident, params
