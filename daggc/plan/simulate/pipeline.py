"""A schedule without a graph, simulated from the time of each phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from daggc.plan.schedule.tasks import Schedule, Task
from daggc.plan.simulate.engine import run_jobs
from daggc.plan.simulate.jobs import Job, Runtime
from daggc.plan.simulate.result import Simulation


def simulate_schedule(
    schedule: Schedule,
    seconds: Mapping[str, Sequence[float] | float],
    transfer: float | Mapping[tuple[int, int], float] = 0.0,
    strict: bool = True,
    message: float = 0.0,
) -> Simulation:
    """Simulate a schedule without a graph.

    Args:
        seconds: for each phase, the time of a task of each stage, or of any stage.
        transfer: seconds that a result takes to another device; or by (stage, stage) in the direction of travel.
        message: seconds from the end of a task to the start of one that waited for it; part of ``transfer``.
    """

    def time_of(task: Task) -> float:
        times = seconds[task.phase]
        return float(times if isinstance(times, int | float) else times[task.stage])

    def between(source: Task, task: Task) -> float:
        own = transfer if isinstance(transfer, int | float) else transfer.get((source.stage, task.stage), 0.0)
        return max(own - message, 0.0)

    device_of = {task: device for device, order in enumerate(schedule.orders) for task in order}
    jobs: list[Job] = []
    index_of: dict[Task, int] = {}
    for task, sources in schedule.needs().items():
        needs: list[int] = []
        device = device_of[task]
        for source in sources:
            index = index_of[source]
            delay = between(source, task) if device_of[source] != device else 0.0
            if delay:
                jobs.append(Job(f"{source}>{device}", f"{device_of[source]}->{device}", 0.0, (index,), delay, True))
                index = len(jobs) - 1
            needs.append(index)
        index_of[task] = len(jobs)
        where = f"device {device}"
        jobs.append(
            Job(str(task), where, time_of(task), tuple(needs), 0.0, False, task.stage, task.phase, task.microbatch)
        )
    return run_jobs(jobs, strict, runtime=Runtime(message=message))
