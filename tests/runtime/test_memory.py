"""What a process holds, and that a step's peak is as predicted."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import dask
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import daggc
from daggc.runtime.local_workers import local_workers
from daggc.runtime.worker import usable

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks of a process are reset through /proc"),
]

_HELD = """
import torch
from daggc.runtime.memory import count_again, held_now, resident_now, start_counting
kept = torch.ones(20_000_000 // 4)
before = start_counting()
torch.ones(100_000_000 // 4)
held = torch.ones(50_000_000 // 4)
print(count_again() - before, held_now() - before, count_again() - before, resident_now() - held_now())
"""


def test_peaks_are_of_what_came_since_the_last_count() -> None:
    found = subprocess.run([sys.executable, "-c", _HELD], capture_output=True, text=True, check=True).stdout
    most, now, later, files = map(float, found.split())
    assert 99e6 <= most < 160e6
    assert 49e6 <= now <= later < 60e6
    assert files > 0  # the code of libraries counts for a limit


def test_peaks_and_bytes_moved_are_as_predicted() -> None:
    """About 250 MB of residuals; the bound is wide, for what the allocator cannot use again varies."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(256, 256), nn.Tanh())))
    batch = torch.randn(16_384, 256), torch.randn(16_384, 256)
    with local_workers(2) as client:
        compiled = daggc.compile(model, client=client)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        step = compiled.train_step(F.mse_loss, optimizer, microbatches=2, schedule="gpipe", stages=2, seed=0)
        float(step(*batch))
        step.compare()  # what loading the state took does not count
        for _ in range(3):
            step(*batch)
        step.sync()  # brings the state here: no step sends that
        found = step.compare()
        step.close()
    assert sum(found.memory.values()) > 250e6
    assert found.memory.keys() == found.measured_memory.keys()
    for device, predicted in found.memory.items():
        assert found.measured_memory[device] == pytest.approx(predicted, rel=0.3), str(found)
    assert found.measured_moved == found.moved


@pytest.mark.parametrize(("pause", "killed", "part"), [(0.8, 0.95, 0.8), (False, 0.95, 0.9), (False, False, 0.95)])
def test_memory_is_used_up_to_where_dask_acts(pause: float | bool, killed: float | bool, part: float) -> None:
    manager = SimpleNamespace(memory_limit=1000, memory_pause_fraction=pause)
    with dask.config.set({"distributed.worker.memory.terminate": killed}):
        assert usable(manager) == pytest.approx(part * 1000)
        assert usable(SimpleNamespace(memory_limit=None)) == usable(None) == 0
