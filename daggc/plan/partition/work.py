"""What a cut is judged by, as arrays over the forward nodes in planning order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from daggc.ir.graph import Graph, Node
from daggc.passes.split import split
from daggc.plan.cost import Costs
from daggc.plan.device import Device
from daggc.plan.outline import origin_of
from daggc.plan.partition.flows import Flow, crossing, flows_of
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
        flows: values between nodes.
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
    flows: tuple[Flow, ...]
    sent: np.ndarray
    returned: np.ndarray
    spans: tuple[Span, ...]
    passes: int
    costs: Costs
    owners: np.ndarray  # position of each joint node's origin
    ahead: np.ndarray  # whether each joint node is of the forward

    def seconds(self, device: Device) -> np.ndarray:
        """Time of each node, with its VJP, on a device."""
        return np.bincount(self.owners, self.costs.seconds(device), len(self.nodes))

    def phases(self, device: Device) -> tuple[np.ndarray, np.ndarray]:
        """Time of each node, and of its VJP, on a device."""
        seconds, count = self.costs.seconds(device), len(self.nodes)
        return (
            np.bincount(self.owners, seconds * self.ahead, count),
            np.bincount(self.owners, seconds * ~self.ahead, count),
        )

    def reordered(self, order: np.ndarray) -> Work:
        """The same work in another topological order, whose p-th node is ``order[p]`` of this one."""
        place = np.argsort(order)
        flows = tuple(flow.moved(place) for flow in self.flows)
        sent, returned = crossing(flows, len(order))
        return replace(
            self,
            nodes=tuple(self.nodes[at] for at in order),
            flops=self.flops[order],
            resident=self.resident[order],
            params=self.params[order],
            residuals=self.residuals[order],
            working=self.working[order],
            flows=flows,
            sent=sent,
            returned=returned,
            spans=tuple(Span(s.ref, tuple(sorted(int(place[use]) for use in s.uses))) for s in self.spans),
            owners=place[self.owners],
        )

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
    flows = flows_of(joint, primal, order)
    sent, returned = crossing(flows, len(order))
    ahead = {node.outputs[0].name for node in forward.nodes}
    resident, params = _residents(joint, primal, order, trained)
    return Work(
        nodes=tuple(order),
        flops=np.bincount(owners, costs.flops, len(order)),
        resident=resident,
        params=params,
        residuals=residuals,
        working=working,
        flows=flows,
        sent=sent,
        returned=returned,
        spans=_spans(primal, order),
        passes=2 if backward.nodes else 1,
        costs=costs,
        owners=owners,
        ahead=np.array([node.outputs[0].name in ahead for node, _ in owned], bool),
    )


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
