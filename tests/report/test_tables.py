"""Tables and counts."""

from __future__ import annotations

from pathlib import Path

import pytest

import daggc
from daggc.report.text import counts, doors, quantity, render, summary, tasks_table

EXAMPLES = Path(__file__).parent.parent.parent / "ir_examples"

DOORS = """daggc 1

graph @forward(
  %x: f32[2] input "0"
) -> (
  %z output "0"
) {
  %y: f32[2] = torch.call(%x) {args=[["%0"], []], dtypes=["f32"], shapes=[[2]], target="aten.sinh.default"}
  %z: f32[2] = python.call(%y) {args=[["%0"], []], dtypes=["f32"], shapes=[[2]], target="mine:f"}
}
"""


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (0, "", "0"),
        (1, "B", "1 B"),
        (999, "B", "999 B"),
        (12345, "", "12.3 k"),
        (1e6, "B", "1 MB"),
        (2.5e20, "", "2.5e+05 P"),
    ],
)
def test_quantity(number: float, unit: str, text: str) -> None:
    assert quantity(number, unit) == text


def test_summary_counts_every_node_and_byte() -> None:
    program = daggc.load(EXAMPLES / "mlp" / "simplified.dag")
    text = render(summary(program))
    linear = next(line for line in text.splitlines() if line.strip().startswith("linear"))
    flops = 2 * (4 * 8 * 16 + 4 * 16 * 16 + 4 * 16 * 4)
    assert linear.split()[1:4] == ["3", *quantity(flops).split()]
    total = next(line for line in text.splitlines() if line.strip().startswith("total"))
    assert total.split()[1] == str(len(program.forward.nodes))


def test_doors_are_named() -> None:
    program = daggc.parse(DOORS)
    assert doors(program) == {("torch.call", "aten.sinh.default"): 1, ("python.call", "mine:f"): 1}
    assert counts(program) == "1 graph, 2 nodes, not portable (python.call mine:f, torch.call aten.sinh.default)"
    assert "aten.sinh.default" in render(summary(program))


def test_tasks_of_a_plan() -> None:
    program = daggc.load(EXAMPLES / "gpt_block" / "plan.dag")
    text = render(tasks_table(program.forward, program))
    calls = [node for node in program.forward.nodes if node.op == "call"]
    assert all(str(node.attrs["callee"]) in text for node in calls)
    assert sum(line.strip().startswith("stage") for line in text.splitlines()) == len(calls)
