"""Graphviz: ``daggc dump-ir model.py:factory --format dot | dot -Tsvg > program.svg``."""

from __future__ import annotations

import json
from collections.abc import Iterator

from daggc.report.picture import COLOURS, Box, Cluster, Picture

_SHAPES = {"input": "oval", "output": "oval", "transfer": "cds"}


def to_dot(drawn: Picture) -> str:
    """A ``digraph`` with nested clusters: modules of a program, devices of a plan."""
    lines = [
        "digraph daggc {",
        '  graph [rankdir=TB, fontname="Helvetica", fontsize=11, compound=true];',
        '  node [fontname="Helvetica", fontsize=10, style="filled,rounded", shape=box, color="#8a94a6"];',
        '  edge [fontname="Helvetica", fontsize=8, color="#5b6577", fontcolor="#5b6577"];',
    ]
    for cluster in drawn.clusters:
        lines += _cluster(cluster, "  ")
    for arrow in drawn.arrows:
        label = f" [label={quote(arrow.label)}]" if arrow.label else ""
        lines.append(f"  {arrow.source} -> {arrow.target}{label};")
    return "\n".join([*lines, "}"]) + "\n"


def quote(*lines: str) -> str:
    """A quoted string of DOT; its escapes are JSON's but for line ends, which are ``\\n``."""
    return '"' + "\\n".join(json.dumps(line, ensure_ascii=False)[1:-1] for line in lines) + '"'


def _cluster(cluster: Cluster, indent: str) -> Iterator[str]:
    yield f"{indent}subgraph cluster_{cluster.id} {{"
    inner = indent + "  "
    yield f'{inner}label={quote(cluster.title)}; style="rounded"; color="#b8c0cc"; fontcolor="#3b4454";'
    for box in cluster.boxes:
        yield inner + _box(box)
    for child in cluster.inner.values():
        yield from _cluster(child, inner)
    yield f"{indent}}}"


def _box(box: Box) -> str:
    shape = _SHAPES.get(box.role)
    options = f"label={quote(*box.lines)}, fillcolor={quote(COLOURS.get(box.role, COLOURS['op']))}"
    return f"{box.id} [{options}{f', shape={shape}' if shape else ''}];"
