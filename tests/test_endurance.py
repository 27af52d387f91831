"""tools/endurance, tools/network and tools/too_big in small: their figures, and that they see what they look for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))

from benchmarks.endurance import Block, growth, ratio, report, window  # noqa: E402  # tools are no package
from benchmarks.processes import Held  # noqa: E402  # tools are no package

pytestmark = pytest.mark.timeout(300)


def blocks(count: int, leak: int = 0, slower: float = 0.0) -> list[Block]:
    """Of 100 steps each; ``leak``: bytes a step, ``slower``: seconds that the last step takes more than the first."""
    return [
        Block(100 * n, 0.05 + slower * n / count, 0.02, {"client": Held(10**8 + 100 * n * leak, 10**7, 1000)})
        for n in range(1, count + 1)
    ]


def test_a_leak_is_seen() -> None:
    found = growth(blocks(40, leak=2000), "client", 10)["resident"]
    assert found.slope == pytest.approx(2000)
    assert found.steps == 3000
    assert found.part == pytest.approx(2000 * 3000 / (10**8 + 1000 * 2000))
    assert "GROWS" in report(blocks(40, leak=2000))
    assert "GROWS" not in report(blocks(40))


def test_windows_are_of_a_thousand_steps_or_a_third() -> None:
    assert window(blocks(100)) == 10
    assert window(blocks(12)) == 4
    assert ratio(blocks(10)) == pytest.approx(2.5)
    assert "the ratio changed by +0.0%" in report(blocks(40))
    assert "the ratio changed by +0.0%" not in report(blocks(40, slower=0.01))


def tool(*command: str, folder: Path) -> dict[str, Any] | list[Any]:
    """What a tool writes as JSON; its standard output shows when it fails."""
    paths = os.pathsep.join([str(ROOT / "tools"), str(ROOT / "tools" / "planning")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DAGGC_CALIBRATE": "off"}
    out = folder / "out.json"
    done = subprocess.run(
        [sys.executable, *command, "--json", str(out)], capture_output=True, text=True, timeout=250, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
def test_processes_are_looked_at_between_blocks_of_steps(tmp_path: Path) -> None:
    found = tool("-m", "benchmarks.endurance", "--case", "tiny", "--steps", "60", "--every", "20", folder=tmp_path)
    assert isinstance(found, list) and [block["steps"] for block in found] == [20, 40, 60]
    assert set(found[0]["held"]) == {"client", "scheduler", "worker 0", "worker 1"}


@pytest.mark.slow
def test_the_profile_of_a_step_is_exact(tmp_path: Path) -> None:
    (found,) = tool("-m", "benchmarks.network", "--case", "tiny", "--plan", "gpipe", "--steps", "5", folder=tmp_path)
    assert found["exact"] and {own["what"] for own in found["planned"]} == {"activation", "cotangent", "output"}


@pytest.mark.slow
def test_a_model_too_big_for_one_worker_trains_on_two(tmp_path: Path) -> None:
    script, size = ROOT / "tools" / "planning" / "too_big.py", ("--width", "1024", "--layers", "12", "--steps", "3")
    found = tool(str(script), *size, folder=tmp_path)
    assert isinstance(found, dict)
    assert "bytes are short" in found["refused"]
    assert found["error"] < 1e-5
    for device, held in found["held"].items():
        assert found["process"][device] <= found["limit"]
        assert held == pytest.approx(found["predicted"][device], rel=0.2)
