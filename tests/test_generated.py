"""The tools that test at scale: a few generated programs through every property, and the mutator itself."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from daggc.errors import PlanError
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.testing import rounded_otherwise
from daggc.testing.choices import Seeded

TOOLS = Path(__file__).resolve().parents[1] / "tools" / "coverage"


@pytest.fixture(scope="module", autouse=True)
def _tools():
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))


def test_generated_programs_keep_every_property():
    """Forty of what ``tools/generated`` checks by the thousand: each mix of dtypes, and long ones."""
    import generated

    counts: Counter[str] = Counter()
    for number in (*range(36), 98, 99, 198, 199):
        counts += generated.judge(Seeded(number), number)
    assert counts["verify"] == counts["plan"] + sum(n for name, n in counts.items() if name.startswith("skipped: plan"))
    assert counts["gradient against differences"] >= 15


def test_a_broken_pass_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch):
    """A canonicalization that adds nothing where something is to be added."""
    import generated

    from daggc.passes import canonicalize

    monkeypatch.setitem(canonicalize.RULES, "add_scalar", lambda b, node, inputs, maker: inputs[0])
    for number in (number for number in range(1, 400, 2) if number % 10 < 8):
        try:
            generated.judge(Seeded(number), number)
        except generated.Broken as wrong:
            if wrong.property.startswith("pass"):
                break
    else:
        pytest.fail("no program noticed")
    found = generated.failure(0, number, small=True)
    assert found["property"].startswith("pass")
    assert len(found["program"].splitlines()) < 30


def test_rounding_that_matters_is_told_from_a_defect():
    from properties import disagreement

    b = REGISTRY.builder("forward")
    x = b.input(TensorType("f64", (3,)), "input", "0")
    b.output(b.emit("sub", b.emit("add_scalar", x, value=1e12), b.emit("add_scalar", x, value=1e12 - 1)), "output", "0")
    b.output(b.emit("mul_scalar", x, value=3.0), "output", "1")
    graph, numbers = b.build(), [np.array([0.1, 0.2, 0.3])]
    otherwise = [rounded_otherwise(graph, numbers, seed) for seed in range(4)]
    assert max(disagreement(lost, np.ones(3)) for lost, _ in otherwise) > 1e-6
    assert max(disagreement(kept, 3 * numbers[0]) for _, kept in otherwise) < 1e-14
    assert disagreement(np.array([np.nan]), np.array([1.0])) == np.inf
    assert disagreement(np.array([np.nan, 1.0]), np.array([np.nan, 1.0])) == 0


SOURCE = '''
"""Doc."""
TABLE = 1 + 2

def _infer(inputs, attrs):
    x, y = inputs
    require(x.rank == 2 and y.rank > 1, f"a message {x.rank + 1}")
    return x.shape[-1] - y.shape[0]

def _cost(node):
    return 1 + 2

register(vjp=lambda b, n, ct: neg(b, b.emit("sub", ct, n.output)), lower=lambda n, a: a + a, cost=_cost)
'''


def test_mutants_change_what_is_computed_and_nothing_else():
    from mutations import mutants

    found = mutants("daggc/ops/x.py", SOURCE)
    assert len({mutant.key for mutant in found}) == len(found)
    changes = {(mutant.role, mutant.kind, mutant.old, mutant.new) for mutant in found}
    assert ("infer", "swapped comparison", "x.rank == 2", "(x.rank != 2)") in changes
    assert ("infer", "dropped term", "x.rank == 2 and y.rank > 1", "((x.rank == 2))") in changes
    assert ("infer", "wrong axis", "-1", "-1 - 1") in changes
    assert ("vjp", "sign", '"sub"', '"add"') in changes
    assert {mutant.role for mutant in found} == {"infer", "vjp"}
    assert not any("1 + 2" in mutant.old or "message" in mutant.old for mutant in found)
    for mutant in found:
        compile(mutant.apply(SOURCE), "x.py", "exec")


JUDGE = """
import mutate
path, text = "daggc/ops/unary.py", "lambda b, n, ct: neg(b, ct)"
start = (mutate.ROOT / path).read_bytes().index(text.encode())
for new in ("lambda b, n, ct: ct", f"({text})"):
    mutant = mutate.Mutant(path, "f", "vjp", "sign", 1, (1,), start, start + len(text), text, new)
    print(mutate.judge(mutant, ["neg"])["status"])
"""


def test_a_mutant_is_caught_and_an_equal_one_survives():
    """In processes of their own: the mutated module takes the place of the real one."""
    result = subprocess.run([sys.executable, "-c", JUDGE], cwd=TOOLS, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["caught", "survived"]


def test_an_output_that_is_an_input_is_not_planned():
    """What ``tools/generated`` counts as skipped."""
    from daggc.ir.graph import Program
    from daggc.plan.device import cluster_of, cpu_device
    from daggc.plan.plan import plan_model

    b = REGISTRY.builder("forward")
    w = b.input(TensorType("f64", (3,)), "param", "w")
    b.emit("exp", w)
    b.output(w, "output", "0")
    with pytest.raises(PlanError, match="has no call"):
        plan_model(Program({"forward": b.build()}), cluster_of([cpu_device(0)]))
