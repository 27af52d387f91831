"""DOT and Mermaid: every node and edge is there, labels are escaped, groups are closed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import daggc
from daggc.report.dot import quote, to_dot
from daggc.report.mermaid import escape, to_mermaid
from daggc.report.picture import COLOURS, picture

EXAMPLES = Path(__file__).parent.parent.parent / "ir_examples"
FILES = sorted(EXAMPLES.glob("*/*.dag"))

ODD = """daggc 1

graph @forward(
  %x: f32[2] input "a\\"b<c>|{d}\\\\e#f`[g]"
) -> (
  %y output "0"
) {
  %y: f32[2] = relu(%x) !path "weird \\"path\\".0"
}
"""


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_box_is_drawn_once_and_arrows_join_boxes(path: Path) -> None:
    drawn = picture(daggc.load(path))
    ids = [box.id for box in drawn.boxes()]
    assert len(ids) == len(set(ids))
    assert all(arrow.source in ids and arrow.target in ids for arrow in drawn.arrows)
    assert {box.role for box in drawn.boxes()} <= set(COLOURS)
    dot, mermaid = to_dot(drawn), to_mermaid(drawn)
    assert len(re.findall(r"^ *g\d+_[ino]\d+ \[", dot, re.MULTILINE)) == len(ids)
    assert dot.count("->") == mermaid.count("-->") == len(drawn.arrows)
    assert dot.count("{") == dot.count("}")
    assert len(re.findall(r"^ *subgraph ", mermaid, re.MULTILINE)) == len(re.findall(r"^ *end$", mermaid, re.MULTILINE))
    assert len(re.findall(r":::\w+$", mermaid, re.MULTILINE)) == len(ids)


def test_nodes_are_grouped_by_module() -> None:
    drawn = picture(daggc.load(EXAMPLES / "gpt_block" / "captured.dag"))
    (top,) = drawn.clusters
    titles = {cluster.title: cluster for cluster in top.walk()}
    assert {"block", "feed_forward.0", "tokens"} <= set(titles)
    assert "qkv" in titles["block"].inner


def test_a_plan_is_drawn_by_device_and_phase() -> None:
    drawn = picture(daggc.load(EXAMPLES / "mlp" / "plan.dag"))
    assert [cluster.title for cluster in drawn.clusters] == ["@forward", "@backward"]
    assert set(drawn.clusters[0].inner) == {"cpu:0", "cpu:1"}
    assert {"forward", "backward", "transfer"} <= {box.role for box in drawn.boxes()}


def test_labels_are_escaped() -> None:
    drawn = picture(daggc.parse(ODD))
    label = next(line for line in to_mermaid(drawn).splitlines() if "g0_i0" in line)
    inner = label.split('(["', 1)[1].rsplit('"])', 1)[0]
    assert not set(inner.replace("<br/>", "")) & set('"<>{}|`[]\\')
    assert 'label="input a\\"b<c>|{d}\\\\e#f`[g]\\nf32[2]"' in to_dot(drawn)
    assert escape("#") == "#35;"
    assert quote("a", "b") == '"a\\nb"'
