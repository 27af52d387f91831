"""One training step as a timeline: what the simulation predicted above what the workers recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from daggc.plan.device import Cluster
from daggc.plan.part import Step
from daggc.plan.simulate import Simulation, simulate
from daggc.report.timeline import Span, timeline_html

if TYPE_CHECKING:  # its module loads torch and dask
    from daggc.runtime.worker import Record


def step_timeline(
    step: Step, cluster: Cluster, records: Mapping[str, Sequence[Record]], title: str = "daggc: a training step"
) -> str:
    """The HTML page.

    Args:
        step: as it was planned.
        cluster: what it was planned for.
        records: when its tasks ran, by device (``TrainStep.records()``).
    """
    return timeline_html(predicted_spans(predict(step, cluster)), measured_spans(step, records), title)


def predict(step: Step, cluster: Cluster) -> Simulation:
    """When each task of the step would run: devices take the first task that is ready, as Dask's priorities do."""
    return simulate(step.graph, step.program, cluster, strict=False)


def predicted_spans(simulation: Simulation) -> list[Span]:
    """Bars of a simulation. Transfers are drawn with the device that sends."""
    return [
        Span(
            task.job.name,
            task.job.place.partition("->")[0],
            task.start,
            task.end,
            "transfer" if task.job.transfer else task.job.phase or "other",
            -1 if task.job.microbatch is None else task.job.microbatch,
        )
        for task in simulation.tasks
    ]


def measured_spans(step: Step, records: Mapping[str, Sequence[Record]]) -> list[Span]:
    """Bars of what ran; phases are those that the step gives to tasks of these names."""
    phases = {
        node.attrs["task"]: str(node.attrs.get("phase", "other")) for node in step.graph.nodes if node.op == "call"
    }
    return [
        Span(record.name, device, record.start, record.end, phases.get(record.name, "other"), record.microbatch)
        for device, own in records.items()
        for record in own
    ]
