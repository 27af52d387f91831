"""Devices that are not alike: the slower one gets less to do, the smaller one what fits."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F

from daggc.plan.device import cluster_of, cpu_device
from daggc.runtime.calibration.session import slower
from daggc.runtime.predict import predict_step
from daggc.runtime.step_program import Options, StepProgram

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools" / "planning"))

from unequal import batch, busy, mlp, shares_of_work, slow_worker, small_worker


def planned(*devices: Any, execution: str = "auto") -> StepProgram:
    options = Options(4, execution=execution)
    return predict_step(mlp(768, 12), F.cross_entropy, batch(768, 1024), cluster_of(devices), options=options)


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0, 3.0])
def test_a_device_gets_work_by_its_speed(factor: float):
    program = planned(cpu_device(0), slower(cpu_device(1), factor))
    assert shares_of_work(program.plan)["cpu:1"] == pytest.approx(1 / (1 + factor), abs=0.06)


def test_a_slower_device_takes_as_many_times_as_long():
    fast, slow = planned(cpu_device(0)), planned(slower(cpu_device(0), 2))
    assert slow.predicted.makespan == pytest.approx(2 * fast.predicted.makespan, rel=0.01)


@pytest.mark.parametrize("part", [0.9, 0.6, 0.3])
def test_a_device_with_little_memory_gets_what_fits(part: float):
    free = planned(cpu_device(0), cpu_device(1))
    room = part * free.predicted.peaks["cpu:1"]
    program = planned(cpu_device(0), cpu_device(1, room))
    assert 0 < program.predicted.peaks["cpu:1"] <= room
    assert program.predicted.makespan < 1.1 * planned(cpu_device(0)).predicted.makespan


def test_a_step_that_fits_in_lanes_alone_runs_in_lanes():
    devices = cpu_device(0), cpu_device(1)
    lanes, graph = (planned(*devices, execution=execution) for execution in ("lanes", "graph"))
    needs = [max(one.predicted.peaks.values()) for one in (lanes, graph)]
    assert needs[0] < needs[1]
    small = planned(*(cpu_device(index, sum(needs) / 2) for index in range(2)))
    assert small.lanes and "in lanes" in small.explain() and "as a graph of tasks it would take" in small.explain()


def test_the_busy_process_ends_whatever_happens():
    with pytest.raises(ZeroDivisionError), busy(min(os.sched_getaffinity(0))) as process:
        os.kill(process, 0)
        raise ZeroDivisionError
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_worker_that_shares_its_core_is_seen_and_gets_less(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DAGGC_CALIBRATE", "auto")
    result = slow_worker(width=512, samples=128, rounds=2)
    assert 1.3 < result.factor < 4
    assert 0.2 < result.shares["cpu:1"] < 0.45 and str(result)


@pytest.mark.slow
def test_a_worker_with_a_limit_on_its_memory_runs_a_step_that_fits():
    result = small_worker()
    assert all(result.predicted[name] <= room for name, room in result.room.items())
    assert result.predicted["cpu:1"] < result.equal["cpu:1"] and len(result.losses) == 6 and str(result)
