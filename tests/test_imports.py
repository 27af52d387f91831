"""The package's layers: a part imports only from parts above it, and torch and dask stay where they belong."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "daggc"
# Highest first.
ORDER = (
    "errors",
    "ir",
    "ops",
    "interp",
    "passes",
    "plan",
    "frontend",
    "backend",
    "runtime",
    "report",
    "cli",
    "api",
)
# Beside the order: what each may import of it.
BESIDE = {
    "testing": ("errors", "ir", "ops", "interp"),
    "__init__": (*ORDER, "testing"),
    "__main__": ORDER,
}
TORCH = (
    "daggc/frontend/",
    "daggc/backend/codegen.py",
    "daggc/backend/kernels/",  # what generated code calls
    "daggc/backend/inductor.py",  # compiles generated code
    "daggc/backend/local.py",  # runs generated code in this process
    "daggc/backend/serializers.py",
    "daggc/runtime/",
)
DASK = (
    "daggc/backend/dask_graph.py",
    "daggc/backend/dask_submission.py",
    "daggc/backend/lanes.py",
    "daggc/backend/serializers.py",
    "daggc/runtime/",
)
# Imports inside functions, and why they stand there.
LATE = {
    "daggc/__init__.py": "names are resolved when first used",
    "daggc/cli.py": "only the command that trains needs torch and dask",
    "daggc/plan/__init__.py": "the package is also a function, which runs once its modules exist",
    "daggc/report/running.py": "programs run in NumPy where torch is not installed",
    "daggc/report/stages.py": "programs are read where torch is not installed",
    "daggc/report/tasks.py": "plans are explained where dask is not installed",
}
DASK_PACKAGES = ("dask", "distributed")
TORCH_PACKAGES = ("torch", "transformers", "torchvision")
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """``ir`` for ``daggc/ir/graph.py``, ``interp`` for ``daggc/interp.py``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every import of a module, wherever it stands, as absolute dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            assert node.module is not None
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def type_checking(tree: ast.AST) -> set[ast.stmt]:
    """Imports that only type checkers see."""
    return {
        statement
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
    }


def daggc_part(name: str) -> str | None:
    """The part of daggc that a dotted name is in, or None."""
    package, _, rest = name.partition(".")
    return (rest.partition(".")[0] or "__init__") if package == "daggc" else None


every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())


@every_module
def test_a_part_imports_only_from_parts_above_it(path: Path):
    tree = ast.parse(path.read_text())
    part = part_of(path)
    allowed = BESIDE.get(part) or ORDER[: ORDER.index(part)] if part in ORDER or part in BESIDE else None
    assert allowed is not None, f"{part} has no place in the order of the package's parts"
    for statement, name in imports(tree):
        target = daggc_part(name)
        if target is None or target == part:
            continue
        if target in ("__version__", "__init__") and part in ("runtime", "report", "cli", "api", "backend"):
            continue
        assert target in allowed, f"{path.name}:{statement.lineno}: {part} imports {name}, which is not above it"


@every_module
def test_torch_and_dask_stay_where_they_belong(path: Path):
    name = path.relative_to(ROOT).as_posix()
    tree = ast.parse(path.read_text())
    for statement, module in imports(tree):
        package = module.partition(".")[0]
        where = f"{path.name}:{statement.lineno} imports {module}"
        if name in LATE and statement not in tree.body:
            continue
        if package in TORCH_PACKAGES:
            assert name.startswith(TORCH), where
        if package in DASK_PACKAGES:
            assert name.startswith(DASK), where


@every_module
def test_daggc_is_imported_at_the_top(path: Path):
    """An import inside a function hides a cycle; the few that do not are listed."""
    if path.relative_to(ROOT).as_posix() in LATE:
        return
    tree = ast.parse(path.read_text())
    top = set(tree.body) | type_checking(tree)
    for statement, name in imports(tree):
        assert daggc_part(name) is None or statement in top, f"{path.name}:{statement.lineno} imports {name} late"


_WITHOUT_TORCH = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "dask", "distributed", "transformers"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Block())

import pkgutil, importlib
import numpy as np
import daggc
for part in ("ir", "ops", "passes", "plan"):
    package = importlib.import_module(f"daggc.{part}")
    for module in pkgutil.walk_packages(package.__path__, f"daggc.{part}."):
        importlib.import_module(module.name)
import daggc.errors, daggc.testing
from daggc.interp import interpret
from daggc.ir.parser import parse
from daggc.ir.printer import print_program
from daggc.ir.verifier import verify
from daggc.ops import REGISTRY
from daggc.passes.manager import pipeline, run

program = parse(sys.stdin.read())
verify(program, REGISTRY)
program = run(program, pipeline("canonicalize,fold,cse,dce,vjp,canonicalize,fold,cse,dce"))
assert parse(print_program(program)) == program
rng = np.random.default_rng(0)
inputs = {port.ref: rng.normal(size=port.value.type.shape) for port in program.forward.inputs}
w, x = inputs["param:fc.weight"], inputs["input:0"]
results = interpret(program, {**inputs, "cotangent:output:0": np.ones((2, 4))})
y = np.tanh(x @ w.T)
np.testing.assert_allclose(results["output:0"], y)
np.testing.assert_allclose(results["grad:param:fc.weight"], (1 - y**2).T @ x)
assert not {"torch", "dask", "distributed"} & set(sys.modules)
print("works")
"""

_TEXT = """daggc 1
graph @forward(
  %w: f64[4,3] param "fc.weight",
  %x: f64[2,3] input "0"
) -> (
  %y output "0"
) {
  %h: f64[2,4] = linear(%x, %w)
  %y: f64[2,4] = tanh(%h)
}
"""


def python(*args: str, text: str = "") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *args], input=text, env=env, cwd=ROOT, capture_output=True, text=True)


def test_programs_are_read_transformed_and_run_without_torch():
    done = python("-c", _WITHOUT_TORCH, text=_TEXT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "works\n"


def test_importing_daggc_alone_loads_little():
    code = "import sys, daggc; print(sorted({'torch', 'dask', 'distributed', 'networkx'} & set(sys.modules)))"
    done = python("-c", code)
    assert done.stdout == "[]\n", done.stderr
