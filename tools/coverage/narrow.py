"""The tests that matter for one mutant, run in this process, which has daggc not imported yet."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import numpy as np
import pytest
from mutations import Mutant

ROOT = Path(__file__).resolve().parents[2]
OP_TESTS = ("test_op_table", "test_op_dtypes", "test_type_rules", "test_kinks", "test_refusals", "test_axes")
IMPORTED = "tests/ops/test_importers.py"
TIES = "tests/ops/test_ties_and_nan.py"
WITH_TIES = ("accumulate", "order", "reduce", "scan", "scatter", "selection")  # families of ops that meet ties
PASS_TESTS = ("tests/passes/test_meaning.py", "tests/passes/test_differentiate.py")
MOST_OPS = 8  # that a mutant is tried on
PROGRAMS = 60  # generated ones for a mutant of a pass
OF_OPS = 24  # generated ones, made of the ops that a mutant matters to


def install(mutant: Mutant | None) -> None:
    """Make ``import`` give the mutated module."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "ops"), str(ROOT / "tools" / "coverage")]
    if mutant is not None:
        sys.meta_path.insert(0, _Mutated(mutant))


class _Mutated:
    """Finds one module, with the mutant's source."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = mutant.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.path = ROOT / mutant.file
        self.source = mutant.apply(self.path.read_text())

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(
            name, self.path, loader=_Loader(name, str(self.path), self.source)
        )


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec")


def catching_test(mutant: Mutant, ops: Sequence[str]) -> str:
    """The first test that fails, or an empty text if none does."""
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    install(mutant)
    try:
        importlib.import_module("daggc.ops")
        importlib.import_module("daggc.passes")
    except Exception as wrong:
        return f"import: {type(wrong).__name__}"
    if mutant.file.startswith("daggc/passes"):
        return _tests_of_pass(mutant)
    try:
        cases = list(_op_cases(ops))
    except Exception as wrong:
        return f"collecting tests: {type(wrong).__name__}"
    for name, check in cases:
        try:
            check()
        except pytest.skip.Exception:
            continue
        except (Exception, pytest.fail.Exception):  # the second is no Exception
            return name
    stem = Path(mutant.file).stem
    own = f"tests/ops/test_{stem}.py"
    files = [own] if (ROOT / own).exists() else []
    found = _pytest([*files, IMPORTED, *([TIES] if stem in WITH_TIES else [])])
    return found or _programs(range(OF_OPS), ops)


def _op_cases(ops: Sequence[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The parametrised tests of some ops, all of the first op first."""
    cases: dict[str, list[tuple[str, Callable[[], Any]]]] = {op: [] for op in ops}
    for name in OP_TESTS:
        module = importlib.import_module(name)
        for title, test in vars(module).items():
            if title.startswith("test_"):
                for op, arguments in _arguments(test):
                    if op in cases:
                        cases[op].append((f"{title}[{op}]", partial(test, **arguments)))
    return itertools.chain.from_iterable(cases.values())


def _arguments(test: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The op and the arguments of each case of a parametrised test."""
    axes: list[list[dict[str, Any]]] = []
    for mark in getattr(test, "pytestmark", ()):
        if mark.name == "parametrize":
            names = mark.args[0].replace(" ", "").split(",") if isinstance(mark.args[0], str) else list(mark.args[0])
            values = [getattr(value, "values", (value,) if len(names) == 1 else value) for value in mark.args[1]]
            axes.append([dict(zip(names, value, strict=True)) for value in values])
    for parts in itertools.product(*axes) if axes else ():
        arguments = {name: value for part in parts for name, value in part.items()}
        given = arguments.get("op_sample") or arguments.get("op")
        if given is not None:
            yield given if isinstance(given, str) else given.op.name, arguments


def _tests_of_pass(mutant: Mutant) -> str:
    if "microbatch" in mutant.file:
        return _pytest(["tests/passes/test_microbatch.py"])
    stem = Path(mutant.file).stem
    own = [str(path) for path in (ROOT / "tests" / "passes").glob(f"test_{stem}*.py")]
    return _pytest([*own, *PASS_TESTS]) or _programs(range(PROGRAMS))


def _programs(numbers: Sequence[int], ops: Sequence[str] | None = None) -> str:
    """Check generated programs; those made of some ops only are small, and take any dtype."""
    generated = importlib.import_module("generated")
    from daggc.testing.choices import Seeded
    from daggc.testing.programs import grow_program

    if ops is not None:

        def grow(choices: Any, number: int) -> Any:
            mixed: dict[str, Any] = {"dtypes": generated.MIXES[number // 2 % len(generated.MIXES)]}
            kinds: dict[str, Any] = {"differentiable": True} if generated.is_differentiable(number) else mixed
            return grow_program(choices, ops=ops, max_ops=4, **kinds)

        vars(generated)["grow"] = grow
    for number in numbers:
        try:
            generated.judge(Seeded(number), number)
        except generated.Broken as wrong:
            return f"generated program {number}: {wrong.property}"
    return ""


class _First:
    """A pytest plugin that remembers the first failure."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = f"collecting {report.nodeid}"


def _pytest(arguments: Sequence[str]) -> str:
    first = _First()
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--tb=no", "-m", "not slow and not gpu"]
    pytest.main([*arguments, *options], plugins=[first])
    return first.name


def reached() -> dict[str, list[str]]:
    """Which ops' rules call a function: ``file:line`` of its definition -> ops, those of its own file first."""
    install(None)
    warnings.simplefilter("ignore")
    from daggc.interp import decomposition, interpret_graph
    from daggc.ir.graph import Program
    from daggc.passes.vjp import vjp
    from daggc.testing import op_samples, random_inputs, sample_graph

    folder = str(ROOT / "daggc" / "ops")
    calls: dict[CodeType, None] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            calls[frame.f_code] = None

    found: dict[str, dict[str, bool]] = {}
    for sample in op_samples():
        calls.clear()
        sys.setprofile(note)
        try:
            graph = sample_graph(sample)
            sample.op.axes(graph.nodes[0])
            interpret_graph(graph, list(random_inputs(graph).values()))
            if sample.op.decompose is not None:
                decomposition(graph.nodes[0])
            vjp(vjp(Program({"forward": graph})))
        except Exception:  # what this sample does not reach, another does; failures are the tests' business
            pass
        finally:
            sys.setprofile(None)
        home = _home(sample.op)
        for code in calls:
            if code.co_filename.startswith(folder):
                key = f"{Path(code.co_filename).relative_to(ROOT)}:{code.co_firstlineno}"
                found.setdefault(key, {})[sample.op.name] = code.co_filename in home
    return {key: sorted(ops, key=lambda op, ops=ops: (not ops[op], op)) for key, ops in found.items()}


def _home(op: Any) -> set[str]:
    """The files that define an op's rules."""
    rules = (op.infer, op.evaluate, op.vjp, op.decompose, op.axes, op.lower)
    return {rule.__code__.co_filename for rule in rules if hasattr(rule, "__code__")}


if __name__ == "__main__":
    print(json.dumps(reached()))
