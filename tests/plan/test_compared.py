"""What is shown of a step beside its prediction."""

from __future__ import annotations

from dataclasses import dataclass, replace

from daggc.plan.compared import compare
from daggc.plan.simulate import Job, run_jobs
from daggc.plan.simulate.memory import Buffer, memory_over_time


@dataclass(frozen=True)
class Ran:
    name: str
    start: float
    end: float


def test_times_memory_and_bytes_by_device() -> None:
    done = run_jobs([Job("F0.0", "cpu:0", 1.0), Job("F0.1", "cpu:0", 1.0), Job("B0", "cpu:1", 2.0, (1,))])
    buffers = [Buffer("cpu:0", 8e6, 0), Buffer("cpu:1", 2e6, 2)]
    predicted = replace(done, memory=memory_over_time(done.tasks, buffers))
    records = {
        "cpu:0": [Ran("F0.0", 0.0, 2.0), Ran("F0.1", 2.0, 4.0), Ran("F0.0", 8.0, 10.0), Ran("F0.1", 10.0, 12.0)],
        "cpu:1": [Ran("B0", 4.0, 7.0), Ran("B0", 12.0, 15.0)],
    }
    found = compare(predicted, records, 1000, {"cpu:0": 1e7}, 1100.0)
    assert [(row.name, row.predicted, row.measured, row.count) for row in found.rows] == [
        ("F0", 1.0, 2.0, 4),
        ("B0", 2.0, 3.0, 2),
    ]
    assert (found.step, found.measured_step) == (4.0, 8.0)
    lines = [line.split() for line in str(found).splitlines()]
    memory = [line[3:] for line in lines if line[:3] == ["memory", "at", "most"]]
    assert memory == [["cpu:0", "8", "MB", "10", "MB", "1.25"], ["cpu:1", "2", "MB"]]
    (sent,) = [line[3:] for line in lines if line[:3] == ["a", "step", "sends"]]
    assert sent[-1] == "1.10"


def test_without_measurements_only_predictions_are_shown() -> None:
    done = run_jobs([Job("F0", "cpu:0", 1.0)])
    found = compare(done, {}, 1000)
    assert found.rows == () and found.measured_moved is None and found.measured_step is None
    assert str(found).splitlines()[-1].split()[:3] == ["a", "step", "sends"]
