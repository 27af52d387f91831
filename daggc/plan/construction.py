"""The graph of a step under construction: its ports, its calls, and where each is to be."""

from __future__ import annotations

import re
from collections.abc import Sequence

from daggc.errors import DaggcError
from daggc.ir.attrs import Attr, Attrs
from daggc.ir.graph import Graph, Node, Port, Program, Value
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.call import declare
from daggc.ops.optim import SCALAR
from daggc.plan.place import place


class Construction:
    """Collects ports and calls, unplaced until :meth:`build`.

    Args:
        replicas: the devices of each stage, one for each of its replicas.
    """

    def __init__(self, replicas: Sequence[tuple[str, ...]]) -> None:
        self.replicas = tuple(replicas)
        self.bodies: dict[str, Graph] = {}
        self.inputs: dict[str, Value] = {}  # by ref
        self._b = REGISTRY.builder("step")
        self._homes: dict[str, str] = {}  # ref of an input -> its device
        self._device_of: dict[str, str] = {}  # task -> device

    def input(self, type_: TensorType, kind: str, target: str, name: str, device: str = "") -> Value:
        """An input port, the one there is if there is one; at a device, or where it is read first."""
        ref = f"{kind}:{target}"
        if ref not in self.inputs:
            self.inputs[ref] = self._b.input(type_.with_(device=None), kind, target, name=name)
            if device:
                self._homes[ref] = device
        return self.inputs[ref]

    def scalar(self, target: str) -> Value:
        """A number that is given to every step, f64[]."""
        return self.input(SCALAR, "scalar", target, target)

    def call(
        self,
        body: Graph,
        inputs: Sequence[Value],
        names: Sequence[str],
        task: str,
        stage: int,
        phase: str,
        path: str = "",
        replica: int = 0,
        **more: Attr,
    ) -> tuple[Value, ...]:
        """Call a body, on the device of a stage's replica."""
        self.bodies.setdefault(body.name, body)
        self._device_of[task] = self.replicas[stage][replica]
        types = [port.value.type for port in body.outputs]
        attrs = Attrs({**declare(types), "callee": body.name, "stage": stage, "phase": phase, "task": task, **more})
        outputs = tuple(Value(name, type_) for name, type_ in zip(names, types, strict=True))
        node = Node("call", tuple(inputs), outputs, attrs, path, origin=body.name)
        return self._b.append(node, inputs)

    def output(self, value: Value, kind: str, target: str) -> None:
        """An output port; it stays where it is made."""
        self._b.output(value, kind, target)

    def build(self) -> Program:
        """The graph ``step``, placed, and the bodies of its calls."""

        def home(port: Port) -> str | None:
            return self._homes.get(port.ref)

        graph = place(self._b.build(), lambda node: self._device_of[str(node.attrs["task"])], home)
        homes = {port.ref: port.value.type.device for port in graph.inputs}
        for port in graph.outputs:
            if homes.get(port.ref, port.value.type.device) != port.value.type.device:
                raise DaggcError(f"{port.ref!r} would be replaced on another device than it is on; this is a defect")
        return Program({"step": graph, **self.bodies}, provenance=("step",))


def identifier(name: str) -> str:
    """A name that a value may have."""
    return re.sub(r"[^\w$]+", "_", name)


def numbered(name: str, owner: int, mark: str = ".") -> str:
    """The name of what one replica of a stage does for the parameters at home there."""
    return f"{name}{mark}{owner}" if owner else name
