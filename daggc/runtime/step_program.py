"""From a model, a loss and a batch to the placed program of a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from daggc.errors import CaptureError, PlanError
from daggc.frontend.autocast import State, autocast_state
from daggc.frontend.export import Capture, capture
from daggc.ir.graph import Graph, Program
from daggc.passes.manager import pipeline, run
from daggc.passes.microbatch import Microbatched, Mixing, at_batch, microbatched, rewrite_like
from daggc.passes.vjp import differentiate, simplify
from daggc.plan.bodies import Group
from daggc.plan.device import Cluster
from daggc.plan.outline import outline
from daggc.plan.part import Part, Step
from daggc.plan.plan import Plan, plan_model
from daggc.plan.schedule.tasks import split_batch
from daggc.plan.step import step_graph
from daggc.runtime.batch import Batch
from daggc.runtime.dask_executor import checksum
from daggc.runtime.resident import RESIDENT

# Without folding, whose limit on sizes may treat captures at two batch sizes differently.
_SIMPLIFY = "canonicalize,cse,dce"


@dataclass(frozen=True)
class Options:
    """What the user asked of a training step; see :func:`daggc.runtime.train.train_step`."""

    microbatches: int = 1
    schedule: str = "1f1b"
    stages: int | None = None
    pins: Mapping[str, str] | None = None
    split_backward: bool = False
    force: bool = False
    replicas: int = 1


@dataclass(frozen=True)
class StepProgram:
    """A training step ready to run.

    Attributes:
        step: the placed graph and its bodies.
        plan: how the model was cut, for the first microbatch's size.
        exactness: why microbatches add up to the batch, or why it was not cut; None if one was asked for.
        sizes: samples of each microbatch.
        constants: tensors of ``constant`` ports, by ref.
        assigned: the plain values that each step sets attributes of the model to, by module path and name.
    """

    step: Step
    plan: Plan
    exactness: Microbatched | None
    sizes: tuple[int, ...]
    constants: Mapping[str, torch.Tensor]
    assigned: Mapping[tuple[str, str], Any]

    @cached_property
    def layout(self) -> tuple[tuple[str, str, int], ...]:
        """Where the step has its state, and a checksum of what is given with the program."""
        ports = self.step.graph.inputs_of(*RESIDENT)
        sums = {ref: checksum(tensor) for ref, tensor in self.constants.items()}
        return tuple((port.ref, str(port.value.type.device), sums.get(port.ref, 0)) for port in ports)

    @cached_property
    def updated(self) -> frozenset[str]:
        """The parameters that it updates."""
        return frozenset(port.target for port in self.step.graph.outputs_of("param"))

    def explain(self) -> str:
        """The plan and its reasons, the order of the tasks, and how the batch is cut."""
        cut = "the batch is not cut" if self.exactness is None else str(self.exactness)
        return "\n\n".join([self.plan.explain(), str(self.step), cut])


@dataclass(frozen=True)
class _Analysis:
    """A forward captured at two batch sizes, and what following the batch axis of the first told."""

    forward: Graph
    other: Graph
    result: Microbatched


class StepBuilder:
    """Builds step programs of one model; keeps captures, which are what takes time."""

    def __init__(self, model: nn.Module, call: Any, cluster: Cluster, options: Options) -> None:
        self.model = model
        self.call = call
        self.cluster = cluster
        self.options = options
        self._captures: dict[Any, Capture] = {}
        self._plans: dict[Any, Plan] = {}

    def build(self, batch: Batch, groups: Sequence[Group], clip: bool) -> StepProgram:
        """The step for a batch of this signature and size; with ``clip``, gradients are clipped.

        Raises:
            CaptureError: the model or loss cannot be captured.
            PlanError: nothing fits the devices.
        """
        wanted = max(self.options.microbatches, self.options.replicas)
        sizes = list(split_batch(batch.size, min(wanted, batch.size)))
        analysis = self._analyse(batch, sizes) if len(sizes) > 1 else None
        if analysis is None or not (analysis.result.exact or self.options.force):
            sizes = [batch.size]
            rewritten = {batch.size: whole_batch(self._forward(batch, batch.size), batch)}
        else:
            rewritten = {size: self._rewritten(batch, size, analysis) for size in dict.fromkeys(sizes)}
        first = rewritten[sizes[0]]
        captured = self._capture(batch, sizes[0] if len(sizes) == 1 else max(2, sizes[0]))
        plan = self._plan(batch, len(sizes), captured.program, first.forward)
        parts = {size: self._part(batch, micro, plan) for size, micro in rewritten.items()}
        devices = [self._replicas_of(stage.device) for stage in plan.stages]
        step = step_graph(
            parts,
            sizes,
            groups,
            devices,
            schedule=self.options.schedule,
            clip=clip,
            chain_buffers=analysis is not None and not analysis.result.exact,
            donate=True,
        )
        held = {f"constant:{name}": tensor for name, tensor in captured.constants.items()}
        return StepProgram(step, plan, analysis.result if analysis else None, tuple(sizes), held, captured.assigned)

    def _analyse(self, batch: Batch, sizes: Sequence[int]) -> _Analysis:
        """Whether the batch can be cut, from captures at two sizes (at one sample nothing can be proved)."""
        size = max(2, sizes[0])
        forward, other = self._forward(batch, size), self._forward(batch, size + 1)
        result = microbatched(forward, batch.batched_names, "0", other=other, force=self.options.force)
        constants, others = self._capture(batch, size).constants, self._capture(batch, size + 1).constants
        if any(name in others and not torch.equal(tensor, others[name]) for name, tensor in constants.items()):
            result = replace(result, mixing=Mixing("", "a constant of the model changes with the batch size"))
        return _Analysis(forward, other, result)

    def _rewritten(self, batch: Batch, size: int, analysis: _Analysis) -> Microbatched:
        """The forward at one microbatch's size, rewritten so that losses add up."""
        if size == analysis.result.batch:
            return analysis.result
        if size == 1:  # captured as another graph, for an axis of size 1 is not broadcast: made from the others
            forward = at_batch(analysis.forward, analysis.other, batch.batched_names, 1)
        else:
            forward = self._forward(batch, size)
        return rewrite_like(forward, analysis.forward, analysis.result)

    def _part(self, batch: Batch, micro: Microbatched, plan: Plan) -> Part:
        wrt = self._wrt(batch, micro.forward)
        joint = simplify(differentiate(micro.forward, wrt))
        main, bodies = outline(joint, micro.forward, plan.stage_of, split_backward=self.options.split_backward)
        return Part(main, bodies, micro.denominators, batch.batched_names, "0")

    def _replicas_of(self, device: str) -> tuple[str, ...]:
        """The devices of a stage's replicas, when the plan has the stage on this one."""
        first = self.cluster.names.index(device)
        return self.cluster.names[first : first + self.options.replicas]

    def _first_replicas(self) -> Cluster:
        """The devices that a plan for one replica of each stage is made for."""
        count = self.options.replicas
        if count < 1 or len(self.cluster.devices) < count:
            have = ", ".join(self.cluster.names)
            raise PlanError(f"{count} replicas need as many devices; there are {have}")
        whole = len(self.cluster.devices) // count * count
        return self.cluster.part(self.cluster.names[:whole:count])

    def _plan(self, batch: Batch, microbatches: int, program: Program, forward: Graph) -> Plan:
        """Plans are kept: a batch of another size must leave every parameter where it is."""
        nodes = tuple((node.op, node.outputs[0].name) for node in forward.nodes)
        key = nodes, tuple(self._wrt(batch, forward))
        if key not in self._plans:
            program = Program({"forward": forward}, provenance=program.provenance)
            self._plans[key] = plan_model(
                program,
                self._first_replicas(),
                wrt=self._wrt(batch, forward),
                stages=self.options.stages,
                pins=self.options.pins,
                split_backward=self.options.split_backward,
                microbatches=microbatches,
            )
        return self._plans[key]

    def _wrt(self, batch: Batch, forward: Graph) -> list[str]:
        trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return [port.ref for port in forward.inputs_of("param") if port.target in trainable]

    def _forward(self, batch: Batch, size: int) -> Graph:
        # What is inside a checkpoint the analysis cannot cut; microbatches save memory in its stead.
        first = "uncheckpoint," if self.options.microbatches > 1 else ""
        return run(self._capture(batch, size).program, pipeline(first + _SIMPLIFY)).forward

    def _capture(self, batch: Batch, size: int) -> Capture:
        key = (batch.signature(), size, modes_of(self.model))
        if key not in self._captures:
            args, kwargs = batch.spec.rebuild(iter(example_leaves(batch, size)))
            captured = capture(self.model, args, kwargs, self.call)
            if len(captured.program.forward.outputs_of("output")) != 1:
                raise CaptureError("a training step captures one loss")
            left = captured.program.forward.outputs_of("input", "attribute")
            if left:
                raise CaptureError(
                    f"forward leaves a tensor in {'an argument' if left[0].kind == 'input' else 'an attribute'} "
                    f"({left[0].target!r}), which a training step would not; return it, or make it a buffer"
                )
            self._captures[key] = captured
        return self._captures[key]


def modes_of(model: nn.Module) -> tuple[tuple[bool, ...], tuple[bool, ...], State]:
    """What a program depends on beside its inputs.

    Which modules are in training mode, which parameters are frozen, and the autocast around the call.
    """
    training = tuple(module.training for module in model.modules())
    return training, tuple(parameter.requires_grad for parameter in model.parameters()), autocast_state()


def whole_batch(forward: Graph, batch: Batch) -> Microbatched:
    """A forward that is run on the whole batch at once: nothing is rewritten."""
    kept = tuple(port for port in forward.outputs if port.kind in ("output", "buffer"))
    graph = Graph(forward.name, forward.inputs, forward.nodes, kept)
    return Microbatched(graph, None, None, batch.size, (), "0", False, batch.batched_names)


def example_leaves(batch: Batch, size: int) -> list[torch.Tensor]:
    """The batch's leaves with ``size`` samples: cut off, or the samples repeated."""
    leaves: list[torch.Tensor] = []
    for leaf, batched in zip(batch.leaves, batch.batched, strict=True):
        repeats = -(-size // leaf.shape[0]) if batched else 1
        leaves.append((torch.cat([leaf] * repeats) if repeats > 1 else leaf)[:size] if batched else leaf)
    return leaves
