"""Which way to spread a training step over a cluster: every factorisation is looked at, and the best are simulated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from daggc.errors import PlanError
from daggc.ir.graph import Program
from daggc.plan.device import Cluster
from daggc.plan.parallel.captured import layers_of
from daggc.plan.parallel.estimate import Choice, Estimate, Model
from daggc.plan.parallel.layers import Layers
from daggc.plan.parallel.machine import Machine, machine_of
from daggc.plan.parallel.simulated import simulate_choice
from daggc.plan.simulate import Simulation

_CHUNKS = (1, 2, 3, 4, 5, 6, 8)
_MICROBATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class ParallelPlan:
    """How a training step is spread, what was considered, and how it would run.

    Attributes:
        best: of the choices that fit, the fastest as simulated.
        considered: those that fit, fastest first by the closed form.
        examined: how many choices were looked at, those that do not fit included.
        simulation: of the best, all replicas. The devices that share a layer's tensors run in step: each group of them
            is one place.
        parameters: of the model.
    """

    best: Estimate
    considered: tuple[Estimate, ...]
    examined: int
    simulation: Simulation
    parameters: float
    devices: int

    def __str__(self) -> str:
        lines = [f"{self.parameters / 1e9:.1f}B parameters on {self.devices} devices: {self.best}"]
        lines += [f"  {self.examined} choices examined, {len(self.considered)} fit; the next by the closed form:"]
        others = [other for other in self.considered if other.choice != self.best.choice]
        lines += [f"  {other}" for other in others[:4]]
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """Plain data, without the timeline."""
        return {
            "parameters": self.parameters,
            "devices": self.devices,
            "examined": self.examined,
            "simulated_seconds": self.simulation.makespan,
            "best": _plain(self.best),
            "considered": [_plain(other) for other in self.considered[:20]],
        }


def _plain(estimate: Estimate) -> dict[str, object]:
    return {**vars(estimate), "choice": vars(estimate.choice)}


def plan_parallel(
    model: Program | Layers, cluster: Cluster | Machine, batch: int, *, simulated: int = 4, room: float = 0.94
) -> ParallelPlan:
    """Spread a training step over equal devices.

    Tensor parallelism stays within a host. Adam in mixed precision is assumed: see
    :class:`~daggc.plan.parallel.estimate.Model`.

    Args:
        model: a captured program, or its layers.
        batch: samples of a step.
        simulated: how many of the best are simulated, one replica each.
        room: the part of a device's memory that may be used.

    Raises:
        PlanError: nothing fits, with what comes nearest; or the cluster is not of equal devices.
    """
    layers = model if isinstance(model, Layers) else layers_of(model)
    machine = cluster if isinstance(cluster, Machine) else machine_of(cluster)
    spread = Model(layers, machine)
    fitting: list[Estimate] = []
    nearest: Estimate | None = None
    examined = 0
    for choice in choices(machine, len(layers.layers), batch):
        estimate = spread.estimate(choice)
        if estimate is None:
            continue
        examined += 1
        if estimate.memory <= machine.chip.device.memory * room:
            fitting.append(estimate)
        elif nearest is None or estimate.memory < nearest.memory:
            nearest = estimate
    if not fitting:
        memory = machine.chip.device.memory * room
        closest = (
            f"the nearest needs {nearest.memory / 1e9:.1f} GB: {nearest.choice}" if nearest else "no choice divides"
        )
        raise PlanError(
            f"a step of {batch} samples does not fit {machine.devices} devices of {memory / 1e9:.1f} GB; {closest}"
        )
    fitting.sort(key=lambda found: (found.seconds, str(found.choice)))
    tried: list[Estimate] = []
    for estimate in fitting[: max(simulated, 1)]:
        seconds = simulate_choice(spread, replace(estimate.choice, data=1), estimate.choice).makespan
        tried.append(replace(estimate, seconds=seconds, tflops=estimate.tflops * estimate.seconds / seconds))
    best = min(tried, key=lambda found: (found.seconds, str(found.choice)))
    whole = simulate_choice(spread, best.choice)
    return ParallelPlan(best, tuple(fitting), examined, whole, layers.parameters, machine.devices)


def choices(machine: Machine, layers: int, batch: int) -> Iterator[Choice]:
    """Every factorisation of the devices, with the microbatches, chunks and recomputation that it allows."""
    for tensor in _divisors(machine.per_host):
        if machine.devices % tensor:
            continue
        for pipeline in _divisors(machine.devices // tensor):
            data = machine.devices // tensor // pipeline
            if pipeline > layers or batch % data:
                continue
            for microbatch in _MICROBATCHES:
                if batch // data % microbatch:
                    continue
                count = batch // data // microbatch
                for chunks in _CHUNKS:
                    if chunks > 1 and (pipeline == 1 or pipeline * chunks > layers or count % pipeline):
                        continue
                    for recompute in (False, True):
                        yield Choice(pipeline, tensor, data, microbatch, count, chunks, recompute)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
