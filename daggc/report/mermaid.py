"""Mermaid flowcharts: GitHub and most Markdown viewers draw them from a fenced block."""

from __future__ import annotations

from collections.abc import Iterator

from daggc.report.picture import COLOURS, Box, Cluster, Picture

# Mermaid reads HTML entities written with # in labels; everything else that its grammar knows is escaped.
_ENTITIES = {
    "&": "#amp;",
    '"': "#quot;",
    "<": "#lt;",
    ">": "#gt;",
    "[": "#91;",
    "]": "#93;",
    "{": "#123;",
    "}": "#125;",
    "|": "#124;",
    "`": "#96;",
    "\\": "#92;",
}


def to_mermaid(drawn: Picture) -> str:
    """A flowchart with nested subgraphs: modules of a program, devices of a plan."""
    lines = ["flowchart TB"]
    for cluster in drawn.clusters:
        lines += _cluster(cluster, "  ")
    for arrow in drawn.arrows:
        label = f'|"{escape(arrow.label)}"|' if arrow.label else ""
        lines.append(f"  {arrow.source} -->{label} {arrow.target}")
    roles = sorted({box.role for box in drawn.boxes()})
    for role in roles:
        fill = COLOURS.get(role, COLOURS["op"])
        lines.append(f"  classDef {role} fill:{fill},stroke:#8a94a6,color:#1f2733")
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """A text as it may stand in a quoted label."""
    return "".join(_ENTITIES.get(char, "#35;" if char == "#" else char) for char in text.replace("\n", " "))


def _cluster(cluster: Cluster, indent: str) -> Iterator[str]:
    yield f'{indent}subgraph {cluster.id}["{escape(cluster.title)}"]'
    for box in cluster.boxes:
        yield f"{indent}  {_box(box)}"
    for child in cluster.inner.values():
        yield from _cluster(child, indent + "  ")
    yield f"{indent}end"


def _box(box: Box) -> str:
    label = "<br/>".join(escape(line) for line in box.lines)
    opening, closing = ("([", "])") if box.role in ("input", "output") else ("[", "]")
    return f'{box.id}{opening}"{label}"{closing}:::{box.role}'
