"""A parallel plan as jobs for the simulator."""

from __future__ import annotations

from daggc.errors import PlanError
from daggc.plan.parallel.estimate import Choice, Model
from daggc.plan.parallel.orders import pipeline_order
from daggc.plan.schedule import BACKWARD, FORWARD
from daggc.plan.simulate import Job, Simulation, run_jobs

_LETTERS, _PHASES = "FB", (FORWARD, BACKWARD)


def simulate_choice(model: Model, choice: Choice, priced: Choice | None = None) -> Simulation:
    """Simulate a step: every replica's pipeline, the sums of gradients over replicas, and the updates.

    A place is a group of devices that share their layers' tensors, named after the first of them.

    Args:
        priced: takes times from this choice instead: of a plan with many replicas, one alone can be simulated.

    Raises:
        PlanError: there are not enough layers for the pipeline.
    """
    stages = model.stages(priced or choice)
    if stages is None:
        raise PlanError(f"there are fewer layers than chunks: {choice}")
    p, t, v, m, d = choice.pipeline, choice.tensor, choice.chunks, choice.microbatches, choice.data
    order = [
        (rank, _LETTERS[phase] + f"{chunk}.{k}", (chunk, _PHASES[phase], k), needs)
        for (chunk, phase, k), needs in pipeline_order(p, v, m)
        for rank in (chunk % p,)
    ]
    seconds = {FORWARD: stages.forward.tolist(), BACKWARD: stages.backward.tolist()}
    jobs: list[Job] = []
    last: list[list[int]] = [[] for _ in range(p)]
    for replica in range(d):
        base = len(jobs)
        # Megatron's order of devices: those that share tensors next to each other, then replicas, then the pipeline
        places = [f"gpu:{(rank * d + replica) * t}" for rank in range(p)]
        final = [0] * p
        for rank, name, (chunk, phase, k), needs in order:
            own = tuple([base + source for source in needs])
            final[rank] = len(jobs)
            jobs.append(Job(name, places[rank], seconds[phase][chunk], own, 0.0, False, chunk, phase, k))
        for rank in range(p):
            last[rank].append(final[rank])
    for replica in range(d):
        for rank in range(p):
            place = f"gpu:{(rank * d + replica) * t}"
            summed = Job(f"G{rank}", place, float(stages.gradients[rank]), tuple(last[rank]), phase="gradients")
            jobs.append(summed)
            jobs.append(Job(f"U{rank}", place, float(stages.update[rank]), (len(jobs) - 1,), phase="update"))
    return run_jobs(jobs)
