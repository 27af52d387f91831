"""What a step sends: every tensor on its way from one worker to another, or to the client.

Told from the step's graph, to the byte: each ``transfer`` is sent once, but for small inputs, which the client puts
into the tasks that read them (:mod:`daggc.backend.dask_submission`); what the step gives goes to the client. Counted
where tensors become bytes (:mod:`daggc.backend.serializers`). The two are equal as long as Dask sends nothing twice:
see :mod:`daggc.runtime.replicas`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from daggc.backend.dask_submission import REPEATED
from daggc.backend.serializers import receiver
from daggc.ir.graph import Graph
from daggc.plan.outline import RESIDENT
from daggc.plan.schedule.tasks import BACKWARD, FORWARD, FORWARD_BACKWARD

CLIENT = "client"
_MADE = {FORWARD: "activation", BACKWARD: "cotangent", FORWARD_BACKWARD: "cotangent"}  # by the phase of its task


@dataclass(frozen=True)
class Sent:
    """A tensor that a step sends.

    Attributes:
        value: its name in the step's graph.
        what: ``activation``, ``cotangent``, ``gradient`` (of a replica), ``output``, the kind of an input's port
            (``param``, ``input``, ...), or the phase of the task that makes it.
        task: the name of that task; empty for an input.
        source, target: devices; ``client`` is where outputs go.
    """

    value: str
    what: str
    task: str
    source: str
    target: str
    nbytes: int


def sent(graph: Graph) -> tuple[Sent, ...]:
    """All that a step sends, in the order in which it is made; ``graph``: a step's, placed."""
    makers = {value.name: node for node in graph.nodes if node.op == "call" for value in node.outputs}
    ports = {port.value.name: port for port in graph.inputs}
    gradients = {v.name for node in graph.nodes if node.attrs.get("phase") == "reduce" for v in node.inputs}
    found: list[Sent] = []
    for node in graph.nodes:
        if node.op != "transfer":
            continue
        value, target = node.inputs[0], str(node.output.type.device)
        maker, port = makers.get(value.name), ports.get(value.name)
        if port is not None and port.kind not in RESIDENT and value.type.nbytes <= REPEATED:
            continue
        phase = str(maker.attrs.get("phase", "")) if maker else ""
        what = port.kind if port else "gradient" if node.output.name in gradients else _MADE.get(phase, phase)
        task = str(maker.attrs.get("task", "")) if maker else ""
        found.append(Sent(value.name, what, task, str(value.type.device), target, value.type.nbytes))
    for port in graph.outputs_of("output"):
        maker = makers.get(port.value.name)
        task = str(maker.attrs.get("task", "")) if maker else ""
        found.append(Sent(port.value.name, "output", task, str(port.value.type.device), CLIENT, port.value.type.nbytes))
    return tuple(found)


def total(tensors: Iterable[Sent]) -> int:
    """Bytes of all."""
    return sum(tensor.nbytes for tensor in tensors)


def tell_receivers(dask_worker: Any) -> None:
    """Have a worker count what it sends by receiver; runs there. Of the client the name is not known."""
    given = dask_worker.get_data

    @functools.wraps(given)
    async def get_data(comm: Any, keys: Any, who: str | None = None, serializers: Any = None) -> Any:
        token = receiver.set(str(who or ""))
        try:
            return await given(comm, keys=keys, who=who, serializers=serializers)
        finally:
            receiver.reset(token)

    dask_worker.handlers["get_data"] = get_data
