"""Planning anew from what steps took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from daggc.plan.device import Cluster
from daggc.plan.explain import seconds as as_text
from daggc.plan.outline import RESIDENT
from daggc.runtime.calibration.refine import measured_tasks, refined
from daggc.runtime.step_program import StepBuilder, StepProgram
from daggc.runtime.worker import Record


@dataclass(frozen=True)
class Replanned:
    """What came of planning anew.

    Attributes:
        cluster: with times corrected by what tasks took.
        program: of the step as it is now planned; None where the plan stays.
        before: seconds that a step of the plan so far is predicted to take with those times, and ``after`` of the
            best plan.
        moving: seconds that moving the state takes.
        steps: for which the plans were compared.
    """

    cluster: Cluster
    program: StepProgram | None
    before: float
    after: float
    moving: float
    steps: int

    def __str__(self) -> str:
        verdict = "the plan stays" if self.program is None else "the next step uses the new plan"
        return (
            f"a step of this plan: {as_text(self.before)}; of the best plan, by measured times: "
            f"{as_text(self.after)}; moving the state: {as_text(self.moving)}. "
            f"For {self.steps} steps to come, {verdict}."
        )


def replanned(
    builder: StepBuilder, current: StepProgram, records: Mapping[str, Sequence[Record]], steps: int
) -> Replanned:
    """Correct the cluster by records of ``current``, and see whether another plan pays."""
    step = current.step
    cluster = refined(current.cluster, measured_tasks(step.graph, step.program, records))
    before = replace(current, cluster=cluster).predicted.makespan
    found = builder.again(cluster)
    after = found.predicted.makespan
    moving = moving_seconds(current, found, cluster)
    pays = found.layout != current.layout or str(found.step) != str(step)
    pays = pays and (before - after) * steps > moving
    return Replanned(cluster, found if pays else None, before, after, moving, steps)


def moving_seconds(old: StepProgram, new: StepProgram, cluster: Cluster) -> float:
    """Seconds that it takes to move the state from one plan's devices to another's, over the client."""
    homes = {ref: device for ref, device, _ in old.layout}
    ports = new.step.graph.inputs_of(*RESIDENT)
    if all(homes.get(port.ref) == port.value.type.device for port in ports):
        return 0.0
    nbytes = sum(port.value.type.nbytes for port in ports)  # all of it: the client takes it home and sends it out
    return 2 * nbytes / cluster.link.bandwidth
