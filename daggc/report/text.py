"""Tables for a terminal: what a program is made of, what its tasks are, and which doors out of the IR it uses."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from daggc.ir.graph import Graph, Node, Program
from daggc.plan.cost import node_cost

DOORS = ("torch.call", "python.call")
_STEP = 1000.0


def render(renderable: RenderableType, width: int = 120) -> str:
    """The plain text of a table, without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def quantity(number: float, unit: str = "") -> str:
    """A number of three digits with a decimal prefix: ``12.3 M``."""
    prefixes = ("", "k", "M", "G", "T", "P")
    index = 0
    while abs(number) >= _STEP * 0.9995 and index < len(prefixes) - 1:
        number /= _STEP
        index += 1
    digits = f"{number:.0f}" if number == int(number) and index == 0 else f"{number:.3g}"
    return f"{digits} {prefixes[index]}{unit}".rstrip()


def plural(count: int, noun: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def counts(program: Program) -> str:
    """One line: graphs, nodes, weights, and whether the program is portable."""
    nodes = sum(1 for graph in program.graphs.values() for _ in graph.walk())
    ports = {port.ref: port for graph in program.graphs.values() for port in graph.inputs}.values()
    parts = [plural(len(program.graphs), "graph"), plural(nodes, "node")]
    for kind, noun in (("param", "parameter"), ("buffer", "buffer"), ("constant", "constant")):
        chosen = [port for port in ports if port.kind == kind]
        if chosen:
            elements = sum(port.value.type.numel for port in chosen)
            parts.append(f"{plural(len(chosen), noun)} of {plural(elements, 'element')}")
    return ", ".join(parts) + (", portable" if program.portable else f", not portable ({doors_line(program)})")


def doors(program: Program) -> Counter[tuple[str, str]]:
    """How often each target goes through each door: (op, target) -> count."""
    nodes = (node for graph in program.graphs.values() for node in graph.walk() if node.op in DOORS)
    return Counter((node.op, str(node.attrs["target"])) for node in nodes)


def doors_line(program: Program) -> str:
    return ", ".join(
        f"{op} {target}" + (f" x{count}" if count > 1 else "") for (op, target), count in sorted(doors(program).items())
    )


def ops_table(graph: Graph, program: Program) -> Table:
    """Nodes, FLOPs and bytes of a graph by op, most FLOPs first."""
    nodes: dict[str, list[Node]] = {}
    for node in graph.nodes:
        nodes.setdefault(node.op, []).append(node)
    rows: list[tuple[str, int, float, float]] = []
    for op, members in nodes.items():
        costs = [node_cost(node, program) for node in members]
        rows.append((op, len(members), sum(c.flops for c in costs), sum(c.bytes for c in costs)))
    rows.sort(key=lambda row: (-row[2], -row[3], row[0]))
    table = _table(f"@{graph.name}", ("op", "nodes", "FLOPs", "bytes"))
    for op, count, flops, nbytes in rows:
        table.add_row(op, str(count), quantity(flops), quantity(nbytes, "B"))
    total_flops, total_bytes = sum(row[2] for row in rows), sum(row[3] for row in rows)
    table.add_section()
    table.add_row("total", str(len(graph.nodes)), quantity(total_flops), quantity(total_bytes, "B"))
    return table


def summary(program: Program) -> Group:
    """A table for each graph, and the doors."""
    tables: list[RenderableType] = [ops_table(graph, program) for graph in program.graphs.values()]
    used = doors(program)
    if used:
        table = _table("what leaves the portable ops", ("op", "target", "nodes"), left=2)
        for (op, target), count in sorted(used.items()):
            table.add_row(op, target, str(count))
        tables.append(table)
    return Group(*tables)


def tasks_table(graph: Graph, program: Program) -> Table:
    """The calls and transfers of a placed graph: device, phase, modules, FLOPs, bytes that arrive."""
    table = _table(
        f"tasks of @{graph.name}", ("task", "device", "modules", "ops", "FLOPs", "weights", "arrives"), left=3
    )
    kinds = {port.value.name: port.kind for port in graph.inputs}
    moved = {value.name for node in graph.nodes if node.op == "transfer" for value in node.outputs}
    for node in graph.nodes:
        if node.op != "call":
            continue
        body = program[str(node.attrs["callee"])]
        resident = sum(v.type.nbytes for v in node.inputs if kinds.get(v.name) in ("param", "buffer", "constant"))
        arrives = sum(value.type.nbytes for value in node.inputs if value.name in moved)
        table.add_row(
            body.name,
            str(node.attrs.get("device", "")),
            node.path,
            str(len(body.nodes)),
            quantity(node_cost(node, program).flops),
            quantity(resident, "B"),
            quantity(arrives, "B"),
        )
    return table


def placed_graphs(program: Program) -> list[Graph]:
    """The graphs that are made of calls: those of a plan."""
    return [graph for graph in program.graphs.values() if any(node.op == "call" for node in graph.nodes)]


def _table(title: str, columns: Sequence[str], left: int = 1) -> Table:
    """A table whose first ``left`` columns are text and the others numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right")
    return table
