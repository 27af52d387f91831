"""Placement: every value of a graph of calls gets a device, and ``transfer`` nodes where it must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from daggc.errors import PlanError, located
from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Graph, Node, Port, Value
from daggc.ops import REGISTRY


def _anywhere(port: Port) -> str | None:
    return None


def place(
    main: Graph, device_of: Callable[[Node], str], input_device: Callable[[Port], str | None] = _anywhere
) -> Graph:
    """Put each call on its device.

    A value is made where its call runs. An input lives where ``input_device`` says or, where that says
    nothing, with its first reader: parameters, buffers and states with the call that uses them (a parameter that
    no call uses, with its gradient; a buffer that is only written, where its new value is made). A call that
    reads a value of another device reads the result of a ``transfer``, of which there is one for each value
    and destination. Outputs stay where they are made.

    Args:
        main: a graph of ``call`` nodes without devices.
        device_of: the device of a call.

    Raises:
        PlanError: a node is not a call, or there is no call to tell where inputs are.
    """
    devices = [_device(node, device_of) for node in main.nodes]
    homes: dict[str, str] = {}
    for node, device in zip(main.nodes, devices, strict=True):
        for value in node.inputs:
            homes.setdefault(value.name, device)
    made = {value.name: device for node, device in zip(main.nodes, devices, strict=True) for value in node.outputs}
    results = [(port, made[port.value.name]) for port in main.outputs if port.value.name in made]
    writers = {port.target if port.kind == "grad" else port.ref: device for port, device in results}
    b = Builder(REGISTRY, main.name)
    b.reserve(value.name for value in main.values())
    placed: dict[str, Value] = {}
    for port in main.inputs:
        device = input_device(port) or homes.get(port.value.name) or writers.get(port.ref)
        device = device or (devices[0] if devices else None)
        if device is None:
            raise PlanError(f"@{main.name} has no call, so nothing tells where its input {port.ref!r} is")
        placed[port.value.name] = b.adopt(replace(port, value=_on(port.value, device)))
    moved: dict[tuple[str, str], Value] = {}
    makers = {value.name: node for node in main.nodes for value in node.outputs}

    def bring(value: Value, device: str) -> Value:
        here = placed[value.name]
        if here.type.device == device:
            return here
        if (value.name, device) not in moved:
            maker = makers.get(value.name)
            with b.at(maker.path if maker else "", "", maker.origin if maker else ""):
                moved[value.name, device] = b.emit("transfer", here, name=f"{value.name}_on_{device}", device=device)
        return moved[value.name, device]

    for node, device in zip(main.nodes, devices, strict=True):
        inputs = [bring(value, device) for value in node.inputs]
        outputs = tuple(_on(value, device) for value in node.outputs)
        call = replace(node, outputs=outputs, attrs=Attrs({**node.attrs, "device": device}))
        placed.update(zip((value.name for value in node.outputs), b.append(call, inputs), strict=True))
    for port in main.outputs:
        b.output(placed[port.value.name], port.kind, port.target)
    return b.build()


def _device(node: Node, device_of: Callable[[Node], str]) -> str:
    if node.op != "call":
        raise PlanError(located(f"only calls are placed, got {node.op}; outline first", node.path, node.source))
    return device_of(node)


def _on(value: Value, device: str) -> Value:
    return Value(value.name, value.type.with_(device=device))
