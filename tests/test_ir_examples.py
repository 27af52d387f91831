"""The IR in ir_examples/ is what the models there lower to now: a change in lowering is seen in review."""

from __future__ import annotations

import importlib.util
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

import daggc
from daggc.report.stages import STAGES

ROOT = Path(__file__).parent.parent


def load_tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    loader = SourceFileLoader(f"tool_{name}", str(ROOT / "tools" / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None, "a spec made from a loader"
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


TOOL = load_tool("ir_examples")
TEXTS: dict[Path, str] = {}


def texts() -> dict[Path, str]:
    """Every file and its text, made once."""
    if not TEXTS:
        TEXTS.update(TOOL.example_texts())
    return TEXTS


FILES = [f"{model}/{stage}" for model in ("cnn", "gpt_block", "mlp") for stage in STAGES]


@pytest.mark.parametrize("name", FILES)
def test_snapshot(name: str) -> None:
    path = ROOT / "ir_examples" / f"{name}.dag"
    change = TOOL.difference(path, texts()[path])
    assert not change, f"run tools/ir_examples if this is meant:\n{change}"


def test_every_file_is_made_by_a_model() -> None:
    assert set((ROOT / "ir_examples").glob("*/*.dag")) == set(texts())
    assert {f"{path.parent.name}/{path.stem}" for path in texts()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_file_reads_back_and_verifies(name: str) -> None:
    path = ROOT / "ir_examples" / f"{name}.dag"
    program = daggc.load(path)
    daggc.verify(program)
    assert daggc.to_text(program) == path.read_text()


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_a_machine(name: str) -> None:
    text = (ROOT / "ir_examples" / f"{name}.dag").read_text()
    sources = {line.split('!src "')[1].split('"')[0] for line in text.splitlines() if "!src" in line}
    assert sources
    assert all(source.count("/") == 1 for source in sources)
