"""tools/demo in small: everything it promises to write is there, and its losses are eager's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import daggc

ROOT = Path(__file__).parents[1]
SMALL = ["--steps", "16", "--layers", "2", "--width", "16", "--heads", "2", "--block", "12", "--batch", "4"]


def demo(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "char_gpt.demo", *SMALL, "--microbatches", "2", "--out", str(folder / "out"), *more],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tools"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )


@pytest.mark.timeout(200)
def test_the_demo_in_small(tmp_path: Path) -> None:
    done = demo(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 stages on 2 devices" in done.stdout
    assert "the same; 0.001 allowed" in done.stdout
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"checkpoint.safetensors", "ir", "sample.txt", "timeline.html"}
    for path in sorted((out / "ir").glob("*.dag")):
        daggc.verify(daggc.load(path))
        assert path.with_suffix(".mmd").read_text().startswith("flowchart")
    assert len(list((out / "ir").iterdir())) == 10
    page = (out / "timeline.html").read_text()
    assert page.count("<h2>") == 2
    assert "FB1.0" in page
    assert len((out / "sample.txt").read_text()) > 400


@pytest.mark.timeout(200)
def test_the_limit_ends_training_early(tmp_path: Path) -> None:
    done = demo(tmp_path, "--limit", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stopped after 0 seconds" in done.stdout


def test_bad_options_are_refused(tmp_path: Path) -> None:
    done = demo(tmp_path, "--heads", "3")
    assert done.returncode == 2
    assert "--width must be divisible by --heads" in done.stderr
