"""What a picture of a program shows, before any one format: boxes in nested groups, and arrows.

A program of ops is drawn graph by graph, its nodes grouped by module path (``h.3.attn`` is a group in ``h.3``
in ``h``). A plan is drawn by its calls, grouped by device; bodies are summed up in their boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from daggc.ir.graph import Graph, Node, Port, Program
from daggc.plan.cost import node_cost
from daggc.report.text import placed_graphs, quantity


@dataclass(frozen=True)
class Box:
    """``lines``: its label; ``role``: input, output, op, door, transfer, or a phase of training."""

    id: str
    lines: tuple[str, ...]
    role: str


@dataclass(frozen=True)
class Arrow:
    """From box to box, with the type of the value that flows, where that is shown."""

    source: str
    target: str
    label: str = ""


@dataclass
class Cluster:
    """A group of boxes with a title."""

    id: str
    title: str
    boxes: list[Box] = field(default_factory=list)
    inner: dict[str, Cluster] = field(default_factory=dict)

    def child(self, title: str) -> Cluster:
        """The group of this title inside this one, made on first use."""
        if title not in self.inner:
            self.inner[title] = Cluster(f"{self.id}_{len(self.inner)}", title)
        return self.inner[title]

    def walk(self) -> Iterator[Cluster]:
        yield self
        for cluster in self.inner.values():
            yield from cluster.walk()


@dataclass
class Picture:
    """One group for each graph, and the arrows."""

    clusters: list[Cluster]
    arrows: list[Arrow]

    def boxes(self) -> Iterator[Box]:
        for top in self.clusters:
            for cluster in top.walk():
                yield from cluster.boxes


COLOURS = {
    "input": "#e8eef7",
    "param": "#f4f4f4",
    "output": "#dff0e3",
    "op": "#ffffff",
    "door": "#fde2c8",
    "transfer": "#fff3bf",
    "forward": "#d6e4fb",
    "backward": "#fbdcd8",
    "weight_grad": "#f8e7c5",
    "update": "#dff0d2",
}
"""Fill colour by role; a role that is absent is drawn as ``op``."""

_SHOWN_PORTS = ("input", "cotangent", "residual", "key")
_HIDDEN_ATTRS = ("dtypes", "shapes", "callee", "device", "stage", "phase", "value")
_LONG = 60


def picture(program: Program) -> Picture:
    """The picture of a program; of a plan, that of its placed graphs."""
    graphs = placed_graphs(program) or list(program.graphs.values())
    clusters: list[Cluster] = []
    arrows: list[Arrow] = []
    for index, graph in enumerate(graphs):
        top = Cluster(f"g{index}", f"@{graph.name}")
        _draw(graph, program, top, arrows)
        clusters.append(top)
    return Picture(clusters, arrows)


def _draw(graph: Graph, program: Program, top: Cluster, arrows: list[Arrow]) -> None:
    prefix = top.id
    makers: dict[str, str] = {}
    weights: dict[str, str] = {}  # named in the boxes that read them, rather than drawn
    for index, port in enumerate(graph.inputs):
        if port.kind not in _SHOWN_PORTS:
            weights[port.value.name] = port.target
            continue
        box = Box(f"{prefix}_i{index}", _port_lines(port), "input")
        top.boxes.append(box)
        makers[port.value.name] = box.id
    for index, node in enumerate(graph.nodes):
        box = Box(f"{prefix}_n{index}", _node_lines(node, weights, program), _role(node))
        _group(top, node).boxes.append(box)
        reads = [value for value in dict.fromkeys(node.inputs) if value.name not in weights]
        arrows += [Arrow(makers[value.name], box.id, str(value.type.with_(device=None))) for value in reads]
        makers.update((value.name, box.id) for value in node.outputs)
    for index, port in enumerate(graph.outputs):
        box = Box(f"{prefix}_o{index}", (f"{port.kind} {port.target}",), "output")
        top.boxes.append(box)
        if port.value.name in makers:
            arrows.append(Arrow(makers[port.value.name], box.id))


def _group(top: Cluster, node: Node) -> Cluster:
    """Where a node is drawn: calls and transfers by device, ops by module path."""
    device = node.attrs.get("device")
    if node.op in ("call", "transfer") and device:
        return top.child(str(device))
    cluster = top
    for part in _path_parts(node.path):
        cluster = cluster.child(part)
    return cluster


def _path_parts(path: str) -> Sequence[str]:
    """``h.3.attn`` -> ``h.3``, ``attn``: a number stays with the list it counts."""
    parts: list[str] = []
    for word in path.split(".") if path else []:
        if word.isdigit() and parts:
            parts[-1] += f".{word}"
        else:
            parts.append(word)
    return parts


def _role(node: Node) -> str:
    if node.op == "call":
        return str(node.attrs.get("phase", "op"))
    if node.op in ("torch.call", "python.call"):
        return "door"
    return "transfer" if node.op == "transfer" else "op"


def _port_lines(port: Port) -> tuple[str, ...]:
    return f"{port.kind} {port.target}", str(port.value.type)


def _node_lines(node: Node, weights: Mapping[str, str], program: Program) -> tuple[str, ...]:
    if node.op == "call":
        body = program[str(node.attrs["callee"])]
        cost = node_cost(node, program)
        lines = (body.name, node.path, f"{len(body.nodes)} ops, {quantity(cost.flops)} FLOPs")
        return tuple(line for line in lines if line)
    if node.op == "transfer":
        value = node.inputs[0]
        return f"transfer {value.name}", f"{value.type.with_(device=None)}, {quantity(value.type.nbytes, 'B')}"
    attrs = ", ".join(f"{key}={value}" for key, value in node.attrs.items() if key not in _HIDDEN_ATTRS)
    reads = ", ".join(weights[value.name] for value in node.inputs if value.name in weights)
    lines = (node.op, _short(attrs), _short(reads), " ".join(str(value.type) for value in node.outputs))
    return tuple(line for line in lines if line)


def _short(text: str) -> str:
    return text if len(text) <= _LONG else text[: _LONG - 1] + "…"
