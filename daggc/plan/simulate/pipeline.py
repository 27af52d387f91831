"""A schedule without a graph, simulated from the time of each phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from daggc.plan.schedule.tasks import Schedule, Task
from daggc.plan.simulate.engine import run_jobs
from daggc.plan.simulate.jobs import Job
from daggc.plan.simulate.result import Simulation


def simulate_schedule(
    schedule: Schedule, seconds: Mapping[str, Sequence[float] | float], transfer: float = 0.0, strict: bool = True
) -> Simulation:
    """Simulate a schedule without a graph.

    Args:
        seconds: for each phase, the time of a task of each stage, or of any stage.
        transfer: seconds that a result takes to a neighbouring stage on another device.
    """

    def time_of(task: Task) -> float:
        times = seconds[task.phase]
        return float(times if isinstance(times, int | float) else times[task.stage])

    jobs: list[Job] = []
    index_of: dict[Task, int] = {}
    for task, sources in schedule.needs().items():
        needs: list[int] = []
        for source in sources:
            index = index_of[source]
            source_device, device = schedule.device_of[source.stage], schedule.device_of[task.stage]
            if source_device != device and transfer:
                jobs.append(Job(f"{source}>{device}", f"{source_device}->{device}", 0.0, (index,), transfer, True))
                index = len(jobs) - 1
            needs.append(index)
        index_of[task] = len(jobs)
        device = f"device {schedule.device_of[task.stage]}"
        jobs.append(
            Job(str(task), device, time_of(task), tuple(needs), 0.0, False, task.stage, task.phase, task.microbatch)
        )
    return run_jobs(jobs, strict)
