"""The documents say what the code does: the reference is current, examples run, names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_ir_examples import ROOT, load_tool

import daggc
from daggc.cli import main

DOCS = ROOT / "docs"
REFERENCE = load_tool("ir_reference")
PAGES = [DOCS / "adding-an-op.md", DOCS / "writing-a-pass.md"]


def test_reference_is_current() -> None:
    assert (DOCS / "ir.md").read_text() == REFERENCE.reference(), "run tools/ir_reference"


def test_reference_does_not_depend_on_the_hash_seed() -> None:
    for seed in ("1", "2"):
        command = [sys.executable, str(ROOT / "tools" / "ir_reference"), "--check"]
        done = subprocess.run(command, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr


def test_reference_example_of_the_text_form() -> None:
    (text,) = re.findall(r"```\n(daggc 1\n.*?)```", REFERENCE.INTRODUCTION, re.DOTALL)
    program = daggc.parse(text)
    daggc.verify(program)
    assert daggc.to_text(program) == text


def python_blocks(page: Path) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))


def test_the_pass_of_the_guide(tmp_path: Path) -> None:
    script = tmp_path / "example.py"  # a file, so that Hypothesis finds the source of its test
    script.write_text(python_blocks(PAGES[1]))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_op_of_the_guide(tmp_path: Path) -> None:
    """Its examples run, and its rules agree with eager torch."""
    check = """
import numpy as np
from daggc.backend.codegen import compile_graph
from daggc.ir.graph import Program
from daggc.testing import op_samples, random_inputs, sample_graph

for op_sample in op_samples():
    if op_sample.op.name == "smooth_max":
        graph = sample_graph(op_sample)
        arrays = list(random_inputs(graph).values())
        tensors = [torch.from_numpy(np.array(array)).requires_grad_() for array in arrays]
        eager = torch.logaddexp(*tensors)
        gradients = torch.autograd.grad(eager.sum(), tensors)
        program = daggc.vjp(Program({"forward": graph}))
        results = daggc.interpret(program, {"0": arrays[0], "1": arrays[1], "cotangent:output:0": np.ones(eager.shape)})
        lowered = compile_graph(graph)(tensors)[0]
        np.testing.assert_array_equal(lowered.numpy(), eager.detach().numpy())
        np.testing.assert_allclose(results["output:0"], eager.detach().numpy())
        for index, gradient in enumerate(gradients):
            np.testing.assert_allclose(results[f"grad:input:{index}"], gradient.numpy())
        print("checked")
"""
    script = tmp_path / "example.py"
    script.write_text(python_blocks(PAGES[0]) + check)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checked") == 2


@pytest.mark.parametrize(
    "page", [*PAGES, DOCS / "ir.md", ROOT / "ir_examples" / "README.md"], ids=lambda page: page.stem
)
def test_files_and_names_that_are_mentioned_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"`((?:daggc|tests|tools|docs|ir_examples)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`daggc\.(\w+)", text):
        assert hasattr(daggc, name), name
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for command in re.findall(r"`daggc ([a-z-]+)", text):
        assert command in main.commands, command


def test_every_command_has_help() -> None:
    for name, command in main.commands.items():
        assert command.help, name
        assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0
