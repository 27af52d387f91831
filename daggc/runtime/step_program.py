"""From a model, a loss and a batch to the placed program of a training step."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from daggc.backend.lanes import devices_of
from daggc.errors import CaptureError, DifferentiationError, IRError, PlanError
from daggc.frontend.autocast import State, autocast_of, autocast_off, autocast_state
from daggc.frontend.export import Capture, capture
from daggc.ir.graph import Graph, Program
from daggc.passes.manager import pipeline, run
from daggc.passes.microbatch import Microbatched, Mixing, at_batch, microbatched, require_alike, rewrite_like
from daggc.passes.vjp import differentiate, has_gradient, simplify
from daggc.plan.automatic import AUTO, Choice, Tried, estimate, possible, take_best
from daggc.plan.bodies import Group, Scaling
from daggc.plan.device import Cluster
from daggc.plan.fuse import fused
from daggc.plan.lanes import in_lanes
from daggc.plan.outline import RESIDENT, outline
from daggc.plan.part import Part, Step
from daggc.plan.plan import Plan, plan_model
from daggc.plan.recomputation import recomputing
from daggc.plan.schedule.tasks import split_batch
from daggc.plan.simulate import Simulation, simulate
from daggc.plan.step import step_graph
from daggc.plan.step_order import schedule_of, stage_times
from daggc.runtime.batch import Batch
from daggc.runtime.costs import runtime_of
from daggc.runtime.shipping import checksum
from daggc.runtime.traffic import sent, total

# Without folding, whose limit on sizes may treat captures at two batch sizes differently.
_SIMPLIFY = "canonicalize,cse,dce"
_WORTH_LANES = 0.98  # of the time as a graph of tasks, which shows more of a step while it runs
_SPARE = 1.15  # times the memory that is predicted for a graph of tasks, which holds more than lanes, must be there
GRAPH, IN_LANES = "graph", "lanes"


@dataclass(frozen=True)
class Options:
    """What the user asked of a training step; see :func:`daggc.runtime.train.train_step`."""

    microbatches: int | str = 1
    schedule: str = "1f1b"
    stages: int | None = None
    pins: Mapping[str, str] | None = None
    split_backward: bool = False
    force: bool = False
    replicas: int | str = 1
    remat: str = AUTO
    partition: str = AUTO
    codegen: str = "torch"
    execution: str = AUTO

    @property
    def uncut(self) -> bool:
        """Whether the batch stays whole."""
        return self.microbatches == 1 and self.replicas == 1


@dataclass(frozen=True)
class StepProgram:
    """A training step ready to run.

    Attributes:
        step: the placed graph and its bodies.
        plan: how the model was cut, for the first microbatch's size.
        cluster: what it was planned for.
        exactness: why microbatches add up to the batch, or why it was not cut; None if one was asked for.
        sizes: samples of each microbatch, of one batch after the other.
        constants: tensors of ``constant`` ports, by ref.
        assigned: the plain values that each step sets attributes of the model to, by module path and name.
        lanes: whether each device's part is run as one task; see :mod:`daggc.backend.lanes`.
        tried: what else could have been chosen, and what it was predicted to take; what was chosen first.
    """

    step: Step
    plan: Plan
    cluster: Cluster
    exactness: Microbatched | None
    sizes: tuple[int, ...]
    constants: Mapping[str, torch.Tensor]
    assigned: Mapping[tuple[str, str], Any]
    lanes: bool
    tried: tuple[Tried, ...] = ()

    @cached_property
    def predicted(self) -> Simulation:
        """A step as it is expected to run, on Dask's workers."""
        cluster, runtime = self.cluster, runtime_of(self.cluster, self.lanes)
        cluster = in_lanes(cluster) if self.lanes else cluster
        return simulate(self.step.graph, self.step.program, cluster, strict=self.lanes, runtime=runtime)

    @property
    def moved(self) -> int:
        """Bytes of tensors that workers send in a step: to each other, and what it gives to the client."""
        return total(sent(self.step.graph))

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
        tried = "\n".join(["Considered", *(f"  {one}" for one in self.tried)])
        ran = f"{self._execution()}\n{self.predicted}"
        return "\n\n".join([self.plan.explain(), str(self.step), cut, tried, f"Predicted\n{ran}"])

    def _execution(self) -> str:
        """How the step runs, and what the other way would take."""
        if len(devices_of(self.step.graph)) == 1:
            return "one device has the whole step, and runs it as one task"
        ways = ("as a graph of tasks", "in lanes, a task for each device")
        other = replace(self, lanes=not self.lanes).predicted
        return f"{ways[self.lanes]}; {ways[not self.lanes]} it would take {other.makespan * 1e3:.4g} ms"


@dataclass(frozen=True)
class _Analysis:
    """A forward captured at two batch sizes, and what following the batch axis of the first told."""

    forward: Graph
    other: Graph | None
    result: Microbatched


@dataclass(frozen=True)
class _Cut:
    """A model cut into stages for microbatches of some sizes.

    Attributes:
        sizes: samples of each microbatch.
        keys: which part each runs.
        counts: the microbatches of each batch.
        devices: of each stage, or of its replicas.
        times: of the tasks of one microbatch; see :func:`daggc.plan.step_order.stage_times`.
    """

    sizes: tuple[int, ...]
    keys: tuple[Hashable, ...]
    counts: tuple[int, ...]
    captured: Capture
    plan: Plan
    parts: Mapping[Hashable, Part]
    devices: tuple[tuple[str, ...], ...]
    times: Mapping[str, Any]

    def options(self, choice: Choice) -> Mapping[str, Any]:
        """What the order of tasks may depend on."""
        return self.times if choice.in_flight is None else {**self.times, "memory": choice.in_flight}


class StepBuilder:
    """Builds step programs of one model; keeps captures, which are what takes time."""

    def __init__(self, model: nn.Module, call: Any, cluster: Cluster, options: Options) -> None:
        self.model = model
        self.call = call
        self.cluster = cluster
        self.options = options
        self._captures: dict[Any, Capture] = {}
        self._plans: dict[Any, Plan] = {}
        self._analyses: dict[Any, _Analysis] = {}
        self._joints: dict[Any, tuple[Microbatched, Graph]] = {}  # of the batches that are being built for
        self._last: tuple[State, Sequence[Batch], Sequence[Group], bool, Scaling | None] | None = None

    def build(
        self, batches: Sequence[Batch], groups: Sequence[Group], clip: bool, scaling: Scaling | None = None
    ) -> StepProgram:
        """The step for batches of these signatures and sizes; see :func:`daggc.plan.step.step_graph`.

        Raises:
            CaptureError: the model or loss cannot be captured.
            PlanError: nothing fits the devices, or the batches cannot be of one step.
        """
        self._last = autocast_state(), batches, groups, clip, scaling
        self._joints = {}
        wanted = self.options
        single = all(batch.size == 1 for batch in batches)
        analyses = () if wanted.uncut or single else tuple(self._analyse(batch) for batch in batches)
        inexact = [one for one in analyses if not one.result.exact]
        can_cut = bool(analyses) and (not inexact or wanted.force)
        cuttable: Sequence[_Analysis | None] = analyses if can_cut else [None] * len(batches)
        choices = possible(
            len(self.cluster.devices),
            max(batch.size for batch in batches) if can_cut else 1,
            microbatches=_at_least(wanted.microbatches, wanted.replicas) if can_cut or single else 1,
            schedule=wanted.schedule,
            replicas=wanted.replicas if can_cut or wanted.replicas != AUTO else 1,
            stages=wanted.stages,
            split_backward=wanted.split_backward,
            remat=wanted.remat,
        )
        made: dict[Choice, StepProgram] = {}
        cuts: dict[Any, _Cut] = {}

        def cut(choice: Choice) -> _Cut:
            key = replace(choice, schedule=""), choice.turns(self._depth(choice))
            if key not in cuts:
                cuts[key] = self._cut(batches, choice, cuttable)
            return cuts[key]

        def estimated(choice: Choice) -> float:
            own = cut(choice)
            main, options = own.parts[own.keys[0]].main, own.options(choice)
            schedule = schedule_of(choice.schedule, own.devices, len(own.sizes), main, options)
            return estimate(schedule, own.times, own.devices, self.cluster)

        def simulated(choice: Choice) -> Simulation:
            made[choice] = self._make(cut(choice), groups, clip, scaling, choice, bool(inexact))
            return made[choice].predicted

        choice, tried = take_best(choices, estimated, simulated, self.cluster)
        exactness = next((one.result for one in (*inexact, *analyses)), None)
        best = replace(made[choice], exactness=exactness, tried=tried)
        if wanted.execution != AUTO or len(devices_of(best.step.graph)) == 1:
            return best
        graph = replace(best, lanes=False)
        peaks = graph.predicted.peaks
        roomy = all(_SPARE * peak <= self.cluster.device(name).memory for name, peak in peaks.items())
        faster = best.predicted.makespan < _WORTH_LANES * graph.predicted.makespan
        return best if faster or not roomy else graph

    def use(self, cluster: Cluster) -> None:
        """Plan for these devices from now on."""
        self.cluster = cluster
        self._plans = {}

    def again(self, cluster: Cluster) -> StepProgram:
        """What :meth:`build` made last, for other devices, whatever autocast is on by now."""
        if self._last is None:
            raise PlanError("no step has been built yet")
        other = copy.copy(self)
        other.use(cluster)
        autocast, batches, groups, clip, scaling = self._last
        with autocast_off(), autocast_of(autocast):
            return other.build(batches, groups, clip, scaling)

    def _cut(self, batches: Sequence[Batch], choice: Choice, analyses: Sequence[_Analysis | None]) -> _Cut:
        """The model as it is cut for a choice, whatever the order of tasks; batches with an analysis may be cut."""
        kinds: dict[Any, int] = {}
        pieces: dict[Hashable, tuple[Batch, Microbatched, Graph]] = {}
        keys: list[Hashable] = []
        sizes: list[int] = []
        counts: list[int] = []
        for batch, analysis in zip(batches, analyses, strict=True):
            own = split_batch(batch.size, min(choice.microbatches, batch.size)) if analysis else (batch.size,)
            kind = kinds.setdefault(batch.signature(), len(kinds))
            for size in own:
                keys.append(f"{size}.{kind}" if kind else size)
                if keys[-1] not in pieces:
                    pieces[keys[-1]] = (batch, *self._differentiated(batch, size, analysis, len(batches) > 1))
            sizes += own
            counts.append(len(own))
        captured = self._captured_alike(batches, analyses)
        batch, first, _ = pieces[keys[0]]
        plan = self._plan(batch, choice, captured.program, first.forward, len(batches))
        parts = {key: self._part(*piece, plan, choice) for key, piece in pieces.items()}
        devices = tuple(self._replicas_of(stage.device, choice.replicas) for stage in plan.stages)
        times = stage_times(parts[keys[0]], [own[0] for own in devices], self.cluster)
        return _Cut(tuple(sizes), tuple(keys), tuple(counts), captured, plan, parts, devices, times)

    def _captured_alike(self, batches: Sequence[Batch], analyses: Sequence[_Analysis | None]) -> Capture:
        """The capture of the batches of a step. Raises PlanError if there is more than one model in them."""
        least = 1 if len(batches) == 1 else 2
        found = [
            self._capture(batch, max(batch.size, least) if analysis is None else analysis.result.batch)
            for batch, analysis in zip(batches, analyses, strict=True)
        ]
        first, last = found[0], found[-1]
        for other in found[1:]:
            nodes = [[(node.op, node.outputs[0].name) for node in one.program.forward.nodes] for one in (first, other)]
            held = first.constants.keys() == other.constants.keys() and all(
                torch.equal(tensor, other.constants[name]) for name, tensor in first.constants.items()
            )
            if nodes[0] != nodes[1] or not held:
                raise PlanError(
                    "the model is another program, or has other constants, for some of the batches of this step than "
                    "for its first: accumulate batches of one shape only (pad them)"
                )
        return first if last is first else replace(first, assigned=last.assigned)

    def _make(
        self, cut: _Cut, groups: Sequence[Group], clip: bool, scaling: Scaling | None, choice: Choice, chain: bool
    ) -> StepProgram:
        """The step as it is chosen."""
        step = fused(
            step_graph(
                cut.parts,
                cut.keys,
                groups,
                cut.devices,
                schedule=choice.schedule,
                clip=clip,
                scaling=scaling,
                chain_buffers=chain,
                donate=True,
                times=cut.options(choice),
                batches=cut.counts,
            )
        )
        step = replace(step, program=replace(step.program, codegen=self.options.codegen))
        held = {f"constant:{name}": tensor for name, tensor in cut.captured.constants.items()}
        lanes = self.options.execution != GRAPH or len(devices_of(step.graph)) == 1
        return StepProgram(step, cut.plan, self.cluster, None, cut.sizes, held, cut.captured.assigned, lanes)

    def _analyse(self, batch: Batch) -> _Analysis:
        """Whether the batch can be cut, from captures at two sizes (at one sample nothing can be proved).

        What eager computes is the program of the whole batch: of a part, Python could decide otherwise by its size.
        """
        whole = self._analysed(batch, max(2, batch.size))
        wanted = _at_least(self.options.microbatches, self.options.replicas)
        if whole.result.exact or not self.options.force or not isinstance(wanted, int):
            return whole
        return self._analysed(batch, max(2, split_batch(batch.size, min(wanted, batch.size))[0]))

    def _analysed(self, batch: Batch, size: int) -> _Analysis:
        key = batch.signature(), size, modes_of(self.model)
        if key not in self._analyses:
            forward, more = self._forward(batch, size), self._larger(batch, size)
            other = self._forward(batch, more) if more else None
            result = microbatched(forward, batch.batched_names, "0", other=other, force=self.options.force)
            if not more:
                result = replace(result, mixing=Mixing("", "the model takes no batch of another size"))
            constants, others = self._capture(batch, size).constants, self._capture(batch, more or size).constants
            if any(name in others and not torch.equal(tensor, others[name]) for name, tensor in constants.items()):
                result = replace(result, mixing=Mixing("", "a constant of the model changes with the batch size"))
            self._analyses[key] = _Analysis(forward, other, result)
        return self._analyses[key]

    def _larger(self, batch: Batch, size: int) -> int:
        """Another size of batches that the model takes, which may be one of pairs of samples; 0 if none is found."""
        for more in (size + 1, 2 * size):
            try:
                self._capture(batch, more)
            except CaptureError:
                continue
            return more
        return 0

    def _rewritten(self, batch: Batch, size: int, analysis: _Analysis) -> Microbatched:
        """The forward at one microbatch's size, rewritten so that losses add up."""
        if size == analysis.result.batch:
            return analysis.result
        try:  # captured at one size, made for the others
            if analysis.other is None:
                raise IRError("there is no capture at another batch size")
            forward = at_batch(analysis.forward, analysis.other, batch.batched_names, size)
        except IRError:
            if size == 1:  # captured as another graph, for an axis of size 1 is not broadcast
                raise
            forward = self._forward(batch, size)
            require_alike(forward, analysis.forward, analysis.result)
        return rewrite_like(forward, analysis.forward, analysis.result)

    def _differentiated(
        self, batch: Batch, size: int, analysis: _Analysis | None, several: bool
    ) -> tuple[Microbatched, Graph]:
        """The forward of one microbatch, and with its backward."""
        key = batch.signature(), size
        if key not in self._joints:
            if analysis is not None:
                micro = self._rewritten(batch, size, analysis)
            elif several and size == 1:  # captured, it would be another graph than the other batches have
                pair = self._forward(batch, 2), self._forward(batch, 3)
                micro = whole_batch(at_batch(*pair, batch.batched_names, 1), batch)
            else:
                micro = whole_batch(self._forward(batch, size), batch)
            wrt = self._wrt(batch, micro.forward)
            if not has_gradient(Program({"forward": micro.forward}), wrt):
                raise DifferentiationError(
                    "the loss depends on no parameter that requires a gradient: are all frozen, or is it detached?"
                )
            joint = simplify(differentiate(micro.forward, wrt))
            self._joints[key] = micro, joint
        return self._joints[key]

    def _part(self, batch: Batch, micro: Microbatched, joint: Graph, plan: Plan, choice: Choice) -> Part:
        joint = recomputing(joint, micro.forward, choice.remat, plan.stage_of)
        main, bodies = outline(joint, micro.forward, plan.stage_of, split_backward=choice.split_backward)
        return Part(main, bodies, micro.denominators, batch.batched_names, "0")

    def _replicas_of(self, device: str, replicas: int) -> tuple[str, ...]:
        """The devices of a stage's replicas, when the plan has the stage on this one."""
        first = self.cluster.names.index(device)
        return self.cluster.names[first : first + replicas]

    def _first_replicas(self, choice: Choice) -> Cluster:
        """The devices that a plan for one replica of each stage is made for, with the memory that it may fill."""
        count = choice.replicas
        if count < 1 or len(self.cluster.devices) < count:
            have = ", ".join(self.cluster.names)
            raise PlanError(f"{count} replicas need as many devices; there are {have}")
        whole = len(self.cluster.devices) // count * count
        own = self.cluster.part(self.cluster.names[:whole:count])
        rooms = [min(choice.room[first : first + count], default=1.0) for first in range(0, whole, count)]
        devices = [
            replace(device, memory=room * device.memory) for device, room in zip(own.devices, rooms, strict=True)
        ]
        return replace(own, devices=tuple(devices))

    def _depth(self, choice: Choice) -> int:
        """How many devices one replica of each stage has."""
        return len(self.cluster.devices) // choice.replicas

    def _plan(self, batch: Batch, choice: Choice, program: Program, forward: Graph, batches: int) -> Plan:
        """Plans are kept: a batch of another size, or more of them, must leave every parameter where it is."""
        nodes = tuple((node.op, node.outputs[0].name) for node in forward.nodes)
        turns = choice.turns(self._depth(choice))
        key = nodes, tuple(self._wrt(batch, forward)), replace(choice, schedule=""), turns
        if key not in self._plans:
            program = Program({"forward": forward}, provenance=program.provenance)
            self._plans[key] = plan_model(
                program,
                self._first_replicas(choice),
                wrt=self._wrt(batch, forward),
                stages=choice.stages,
                pins=self.options.pins,
                split_backward=choice.split_backward,
                microbatches=-(-batches * choice.microbatches // choice.replicas),
                partition=self.options.partition,
                remat=choice.remat,
                turns=turns,
                in_flight=choice.in_flight,
            )
        return self._plans[key]

    def _wrt(self, batch: Batch, forward: Graph) -> list[str]:
        trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return [port.ref for port in forward.inputs_of("param") if port.target in trainable]

    def _forward(self, batch: Batch, size: int) -> Graph:
        # What is inside a checkpoint the analysis cannot cut; microbatches save memory in its stead.
        first = "" if self.options.uncut else "uncheckpoint,"
        return run(self._capture(batch, size).program, pipeline(first + _SIMPLIFY)).forward

    def _capture(self, batch: Batch, size: int) -> Capture:
        key = (batch.signature(), size, modes_of(self.model))
        if key not in self._captures:
            args, kwargs = batch.spec.rebuild(iter(batch.examples(size)))
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


def _at_least(microbatches: int | str, replicas: int | str) -> int | str:
    """Microbatches that give every replica one."""
    if isinstance(microbatches, str) or isinstance(replicas, str):
        return microbatches
    return max(microbatches, replicas)
