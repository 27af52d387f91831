"""A whole training step as one placed graph of tasks: microbatches, accumulation, clipping, updates.

For 2 stages on two devices and 2 microbatches (F forward, B backward, U update; a schedule orders each device):

    F0.0 -> F1.0 -> B1.0 -> B0.0 -.            gradients of B0.0 are an input of B0.1, which adds its own
    F0.1 -> F1.1 -> B1.1 -> B0.1 -+-> U0       (in order of microbatches, whatever arrives first)
                      `----------- -> U1

Before the forwards, totals of the batch that the loss divides by (:mod:`daggc.passes.microbatch`) are counted from
the data; before the updates, the global norm of the gradients, where they are clipped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from daggc.errors import PlanError
from daggc.ir.attrs import Attr, Attrs
from daggc.ir.graph import Graph, Node, Port, Program, Value
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.call import declare
from daggc.ops.optim import SCALAR
from daggc.plan import bodies as make
from daggc.plan.bodies import Group, state_target
from daggc.plan.place import place
from daggc.plan.schedule import Schedule, Task, schedule_named

FRACTION, TOTAL = "fraction", "total:"
_SHARED = ("param", "buffer", "constant")


@dataclass(frozen=True)
class Part:
    """What one microbatch of a certain size runs, before placement.

    Attributes:
        main: the graph of calls that ``outline`` made of the joint graph.
        bodies: by name.
        denominators: see :class:`daggc.passes.microbatch.Microbatched`.
        batched_inputs: targets of the inputs that each microbatch has its own part of.
        loss: target of the loss.
    """

    main: Graph
    bodies: Mapping[str, Graph]
    denominators: Graph | None = None
    batched_inputs: tuple[str, ...] = ()
    loss: str = "0"


@dataclass(frozen=True)
class Step:
    """A training step.

    Attributes:
        program: the graph ``step`` and the bodies of its calls.
        schedule: the order that its calls are in.
        sizes: samples of each microbatch.
    """

    program: Program
    schedule: Schedule
    sizes: tuple[int, ...]

    @property
    def graph(self) -> Graph:
        return self.program["step"]

    def __str__(self) -> str:
        lines = [f"step of {len(self.sizes)} microbatches of {', '.join(map(str, self.sizes))} samples"]
        for device in dict.fromkeys(node.attrs["device"] for node in self.graph.nodes if node.op == "call"):
            tasks = [n.attrs["task"] for n in self.graph.nodes if n.op == "call" and n.attrs["device"] == device]
            lines.append(f"  {device}: {' '.join(tasks)}")
        moved = [node for node in self.graph.nodes if node.op == "transfer"]
        lines.append(f"  {len(moved)} transfers, {sum(node.output.type.nbytes for node in moved):,} bytes")
        return "\n".join(lines)


def step_graph(
    parts: Mapping[int, Part],
    sizes: Sequence[int],
    groups: Sequence[Group],
    devices: Sequence[str],
    *,
    schedule: str = "1f1b",
    clip: bool = False,
    chain_buffers: bool = True,
    donate: bool = False,
) -> Step:
    """Assemble a training step.

    Args:
        parts: what a microbatch runs, by its number of samples.
        sizes: samples of each microbatch, in order; each is a key of ``parts``.
        groups: the optimizer's parameter groups. Parameters without a gradient are left alone, as torch does.
        devices: the device of each stage.
        schedule: ``gpipe`` or ``1f1b``.
        clip: multiply gradients by ``min(max norm / (global norm + 1e-6), 1)``.
        chain_buffers: each microbatch reads the buffers that the one before it left. Where the cut of the batch
            is exact, buffers do not depend on the samples, and False gives what one whole batch would.
        donate: optimizer state may be updated in place.

    Returns:
        A step whose graph has these ports beside parameters, buffers and constants by their names. Inputs:
        ``state:<name>:<param>``; ``input:<target>#<microbatch>`` (``input:<target>`` if all share it);
        ``key:#<microbatch>``; and f64 scalars ``lr:<group>``, ``step`` (1 on the first), ``fraction#<microbatch>``
        (its samples / the batch's), ``clip`` (the largest norm). Outputs: ``output:<loss>``,
        ``output:grad_norm`` with ``clip``, ``param``, ``state`` and ``buffer``. Each call has the attributes
        ``task`` (a name such as ``F0.1``), ``stage``, ``phase``, ``microbatch`` (of forward, backward,
        weight_grad) and ``after`` (names of tasks of its device that it waits for, beside its inputs').

    Raises:
        PlanError: parts do not fit together, or name parameters or stages that are not there.
    """
    assembly = _Assembly(parts, tuple(sizes), groups, devices, schedule, clip, chain_buffers, donate)
    return assembly.build()


@dataclass
class _Microbatch:
    """The values of one microbatch, by name in its part's main graph."""

    index: int
    part: Part
    suffix: str
    values: dict[str, Value] = field(default_factory=dict)
    calls: dict[tuple[int, str], Node] = field(default_factory=dict)


class _Assembly:
    """The step under construction, unplaced until the end."""

    def __init__(
        self,
        parts: Mapping[int, Part],
        sizes: tuple[int, ...],
        groups: Sequence[Group],
        devices: Sequence[str],
        schedule: str,
        clip: bool,
        chain_buffers: bool,
        donate: bool,
    ) -> None:
        _check_parts(parts, sizes, devices)
        self.b = REGISTRY.builder("step")
        self.bodies: dict[str, Graph] = {}
        self.clip, self.chain, self.donate = clip, chain_buffers, donate
        self.devices = tuple(devices)
        used = {device: index for index, device in enumerate(dict.fromkeys(devices))}
        first = parts[sizes[0]]
        split = any(node.attrs["phase"] == "weight_grad" for part in parts.values() for node in part.main.nodes)
        order = [used[device] for device in devices]
        self.schedule = schedule_named(schedule)(len(devices), len(sizes), order, split_backward=split)
        self.sizes = sizes
        names = {size: "" if len(parts) == 1 else f".x{size}" for size in parts}
        self.microbatches = [_Microbatch(k, parts[size], names[size]) for k, size in enumerate(sizes)]
        self.first = first
        self.makers = {value.name: node for node in first.main.nodes for value in node.outputs}
        self.updated = self._updated(groups)
        self.loss_stage = int(self._maker(self._loss_port(first)).attrs["stage"])
        self.inputs: dict[str, Value] = {}
        self.homes: dict[str, str] = {}
        self.gradients: dict[str, Value] = {}  # parameter -> its gradient so far
        self.added: dict[str, int] = {}  # parameter -> microbatches whose gradient is in that sum
        self.plain: dict[str, Graph] = {}
        self.after = _credit_edges(self.schedule)

    # --- what there is --------------------------------------------------------------------------------

    def _loss_port(self, part: Part) -> Port:
        for port in part.main.outputs_of("output"):
            if port.target == part.loss:
                return port
        raise PlanError(f"the step's graph has no output {part.loss!r} to be the loss")

    def _maker(self, port: Port) -> Node:
        maker = self.makers.get(port.value.name)
        if maker is None:
            raise PlanError(f"{port.ref!r} is an input of the model: no task makes it")
        return maker

    def _updated(self, groups: Sequence[Group]) -> dict[str, tuple[Port, Group, int]]:
        """Parameters with a gradient and a group: port, group and stage, in order of the model."""
        group_of: dict[str, Group] = {}
        for group in groups:
            for name in group.params:
                if name in group_of:
                    raise PlanError(f"parameter {name!r} is in two groups")
                group_of[name] = group
        ports = {port.target: port for port in self.first.main.inputs_of("param")}
        found: dict[str, tuple[Port, Group, int]] = {}
        gradients = {port.target: port for port in self.first.main.outputs_of("grad")}
        for name, port in ports.items():
            gradient = gradients.get(f"param:{name}")
            if gradient is not None and name in group_of:
                found[name] = port, group_of[name], int(self._maker(gradient).attrs["stage"])
        return found

    # --- inputs ---------------------------------------------------------------------------------------

    def _input(self, type_: TensorType, kind: str, target: str, name: str, device: str = "") -> Value:
        ref = f"{kind}:{target}"
        if ref not in self.inputs:
            self.inputs[ref] = self.b.input(type_.with_(device=None), kind, target, name=name)
            if device:
                self.homes[ref] = device
        return self.inputs[ref]

    def _scalar(self, target: str) -> Value:
        return self._input(SCALAR, "scalar", target, target)

    def _declare_inputs(self) -> None:
        """Ports in an order that is good to read; parameters live where their updates run."""
        for port in self.first.main.inputs:
            if port.kind in _SHARED:
                home = self.devices[self.updated[port.target][2]] if port.target in self.updated else ""
                home = home if port.kind == "param" else ""
                self._input(port.value.type, port.kind, port.target, port.value.name, home)
        for name, (port, group, stage) in self.updated.items():
            for state in group.states:
                target = state_target(state, name)
                self._input(port.value.type, "state", target, f"{state}_{port.value.name}", self.devices[stage])
        for microbatch in self.microbatches:
            for port in microbatch.part.main.inputs:
                if port.kind != "cotangent" and not (port.kind == "scalar" and port.target.startswith(TOTAL)):
                    microbatch.values[port.value.name] = self._own_input(microbatch, port)

    def _own_input(self, microbatch: _Microbatch, port: Port) -> Value:
        """What a port of a microbatch's graph is in the step."""
        own = f"{port.value.name}_{microbatch.index}"
        if port.kind == "input" and port.target in microbatch.part.batched_inputs:
            return self._input(port.value.type, "input", f"{port.target}#{microbatch.index}", own)
        if port.kind == "key":
            return self._input(port.value.type, "key", f"#{microbatch.index}", own)
        if port.kind == "scalar" and port.target == FRACTION:
            return self._input(SCALAR, "scalar", f"{FRACTION}#{microbatch.index}", own)
        return self._input(port.value.type, port.kind, port.target, port.value.name)

    # --- calls ----------------------------------------------------------------------------------------

    def _call(
        self,
        body: Graph,
        inputs: Sequence[Value],
        names: Sequence[str],
        task: str,
        stage: int,
        phase: str,
        path: str = "",
        **more: Attr,
    ) -> tuple[Value, ...]:
        self.bodies.setdefault(body.name, body)
        types = [port.value.type for port in body.outputs]
        attrs = Attrs({**declare(types), "callee": body.name, "stage": stage, "phase": phase, "task": task, **more})
        outputs = tuple(Value(name, type_) for name, type_ in zip(names, types, strict=True))
        node = Node("call", tuple(inputs), outputs, attrs, path, origin=body.name)
        return self.b.append(node, inputs)

    def _prepare(self) -> None:
        """Count what the loss divides by over the whole batch, before the first forward."""
        counts: list[tuple[Value, ...]] = []
        for microbatch in self.microbatches:
            graph = microbatch.part.denominators
            if graph is None:
                continue
            body = replace(graph, name=f"denominators{microbatch.suffix}")
            inputs = [self._own_input(microbatch, port) for port in body.inputs]
            names = [f"denominator_{port.target}_{microbatch.index}" for port in body.outputs]
            task, index = f"D.{microbatch.index}", microbatch.index
            counts.append(self._call(body, inputs, names, task, self.loss_stage, "prepare", microbatch=index))
        if not counts:
            return
        if len(counts) != len(self.microbatches):
            raise PlanError("microbatches of one size divide their loss by totals of the batch, others do not")
        totals = self._sum("totals", counts, [f"total_{k}" for k in range(len(counts[0]))])
        for microbatch in self.microbatches:
            for port in microbatch.part.main.inputs_of("scalar"):
                if port.target.startswith(TOTAL):
                    microbatch.values[port.value.name] = totals[int(port.target.removeprefix(TOTAL))]

    def _sum(self, name: str, groups: Sequence[Sequence[Value]], names: Sequence[str]) -> Sequence[Value]:
        """Add up groups of values in order, with the loss."""
        if len(groups) == 1:
            return groups[0]
        body = make.sums(name, [value.type for value in groups[0]], len(groups))
        inputs = [value for group in groups for value in group]
        return self._call(body, inputs, names, name, self.loss_stage, "prepare" if name == "totals" else "loss")

    def _run_microbatches(self) -> None:
        """Calls in the schedule's order, each as soon as its inputs are there."""
        for microbatch in self.microbatches:
            for node in microbatch.part.main.nodes:
                microbatch.calls[int(node.attrs["stage"]), str(node.attrs["phase"])] = node
        pending = [
            task
            for task in self.schedule.emitted
            if (task.stage, task.phase) in self.microbatches[task.microbatch].calls
        ]
        if len(pending) != sum(len(microbatch.part.main.nodes) for microbatch in self.microbatches):
            raise PlanError("the graph has two tasks of one stage and phase, or a phase that no schedule knows")
        exist = {str(task) for task in pending}
        while pending:
            waiting = [task for task in pending if not self._run(task, exist)]
            if len(waiting) == len(pending):
                raise PlanError(f"tasks wait for each other: {', '.join(map(str, pending[:5]))}")
            pending = waiting

    def _run(self, task: Task, exist: set[str]) -> bool:
        """Emit a task of the schedule; False if its inputs are not there yet."""
        microbatch = self.microbatches[task.microbatch]
        node = microbatch.calls[task.stage, task.phase]
        part, values = microbatch.part, microbatch.values
        body = part.bodies[str(node.attrs["callee"])]
        reads = [v for v, port in zip(node.inputs, body.inputs, strict=True) if port.kind != "cotangent"]
        shared = self._gradient_params(part)
        sums = [at for at, value in enumerate(node.outputs) if value.name in shared]
        sums_so_far = [self.gradients.get((shared[node.outputs[at].name])[0]) for at in sums]
        first = microbatch.index == 0
        params = [name for at in sums for name in shared[node.outputs[at].name]]
        behind = any(self.added.get(name, 0) != microbatch.index for name in params)
        if behind or any(value.name not in values for value in reads):
            return False
        self.added.update(dict.fromkeys(params, microbatch.index + 1))
        name = f"{body.name}{microbatch.suffix}"
        if name not in self.plain:
            self.plain[name] = make.with_loss_cotangent(body, name, part.loss)
        body = self.plain[name]
        inputs = [values[value.name] for value in reads]
        kept = list(range(len(node.outputs)))
        if sums and not first:
            read = {value.name for user in part.main.nodes for value in user.inputs}
            kept = [at for at in kept if at not in sums or node.outputs[at].name in read]
            name = f"{name}.add"
            body = self.bodies.get(name) or make.accumulating(body, name, sums, kept)
            inputs += [value for value in sums_so_far if value is not None]
        after = tuple(name for name in map(str, self.after.get(task, ())) if name in exist)
        names = [f"{node.outputs[at].name}_{microbatch.index}" for at in (kept if first else [*kept, *sums])]
        results = self._call(
            body, inputs, names, str(task), task.stage, task.phase, node.path,
            microbatch=microbatch.index, **({"after": after} if after else {}),
        )  # fmt: skip
        for at, value in zip(kept, results, strict=False):
            values[node.outputs[at].name] = value
        for at, value in zip(sums, [results[at] for at in sums] if first else results[len(kept) :], strict=True):
            self.gradients.update(dict.fromkeys(shared[node.outputs[at].name], value))
        self._pass_buffers(microbatch)
        return True

    def _gradient_params(self, part: Part) -> dict[str, tuple[str, ...]]:
        """Names of values that are gradients of updated parameters -> those parameters."""
        found: dict[str, tuple[str, ...]] = {}
        for port in part.main.outputs_of("grad"):
            name = port.target.removeprefix("param:")
            if port.target.startswith("param:") and name in self.updated:
                found[port.value.name] = (*found.get(port.value.name, ()), name)
        return found

    def _pass_buffers(self, microbatch: _Microbatch) -> None:
        """Give new values of buffers to the next microbatch, as soon as they are there."""
        if not self.chain or microbatch.index + 1 == len(self.microbatches):
            return
        following = self.microbatches[microbatch.index + 1]
        for port in microbatch.part.main.outputs_of("buffer"):
            value = microbatch.values.get(port.value.name)
            for other in following.part.main.inputs_of("buffer"):
                if other.target == port.target and value is not None:
                    following.values[other.value.name] = value

    def _withhold_buffers(self) -> None:
        """Microbatches after the first wait for the buffers that the one before them changes."""
        if not self.chain:
            return
        changed = {port.target for port in self.first.main.outputs_of("buffer")}
        for microbatch in self.microbatches[1:]:
            for port in microbatch.part.main.inputs_of("buffer"):
                if port.target in changed:
                    del microbatch.values[port.value.name]

    # --- after the last backward ----------------------------------------------------------------------

    def _clip(self, stages: Mapping[int, list[tuple[Port, Group]]]) -> tuple[Value, Value] | None:
        """The clipping coefficient and the global norm."""
        if not self.clip or not stages:
            return None
        norms: list[Value] = []
        for stage, params in stages.items():
            gradients = [self.gradients[port.target] for port, _ in params]
            body = make.squared_norms(f"stage{stage}.squared_norm", [value.type for value in gradients])
            norms += self._call(body, gradients, [f"squared_norm_{stage}"], f"N{stage}", stage, "norm")
        body = make.clipping("clip", len(norms))
        names = ["coefficient", "grad_norm"]
        coefficient, norm = self._call(body, [*norms, self._scalar("clip")], names, "clip", min(stages), "norm")
        return coefficient, norm

    def _update(self, stage: int, params: Sequence[tuple[Port, Group]], coefficient: Value | None) -> dict[str, Value]:
        """Emit a stage's update; its results by ``kind:target``."""
        body, targets = make.updates(f"stage{stage}.update", params, coefficient is not None, self.donate)
        inputs: list[Value] = []
        for port, group in params:
            inputs += [self.inputs[port.ref], self.gradients[port.target]]
            inputs += [self.inputs[f"state:{state_target(state, port.target)}"] for state in group.states]
        inputs += [self._scalar(f"lr:{name}") for name in make.groups_of(params)]
        inputs += [self._scalar("step"), *([] if coefficient is None else [coefficient])]
        names = [f"new_{target}" for _, target in targets]
        results = self._call(body, inputs, [_identifier(name) for name in names], f"U{stage}", stage, "update")
        return {f"{kind}:{target}": value for (kind, target), value in zip(targets, results, strict=True)}

    def build(self) -> Step:
        self._declare_inputs()
        self._withhold_buffers()
        self._prepare()
        self._run_microbatches()
        port = self._loss_port(self.first)
        losses = [(microbatch.values[self._loss_port(microbatch.part).value.name],) for microbatch in self.microbatches]
        (loss,) = self._sum("loss", losses, ["loss"])
        stages: dict[int, list[tuple[Port, Group]]] = {}
        for parameter, group, stage in self.updated.values():
            stages.setdefault(stage, []).append((parameter, group))
        stages = dict(sorted(stages.items(), reverse=True))  # the last stage is the first that is done
        clipped = self._clip(stages)
        results: dict[str, Value] = {}
        for stage, params in stages.items():
            results |= self._update(stage, params, clipped[0] if clipped else None)
        self.b.output(loss, "output", port.target)
        self._other_outputs(port)
        if clipped:
            self.b.output(clipped[1], "output", "grad_norm")
        for kind in ("param", "state"):
            for ref, value in results.items():
                if ref.startswith(f"{kind}:"):
                    self.b.output(value, kind, ref.removeprefix(f"{kind}:"))
        last = self.microbatches[-1]
        for buffer in last.part.main.outputs_of("buffer"):
            self.b.output(last.values[buffer.value.name], "buffer", buffer.target)
        graph = place(
            self.b.build(),
            lambda node: self.devices[int(node.attrs["stage"])],
            lambda own: self.homes.get(own.ref),
        )
        program = Program({"step": graph, **self.bodies}, provenance=("step",))
        return Step(program, self.schedule, self.sizes)

    def _other_outputs(self, loss: Port) -> None:
        """A batch that is not cut gives the model's other results too."""
        if len(self.microbatches) > 1:
            return
        for port in self.first.main.outputs_of("output"):
            if port.target != loss.target:
                self.b.output(self.microbatches[0].values[port.value.name], "output", port.target)


def _identifier(name: str) -> str:
    return re.sub(r"[^\w$]+", "_", name)


def _credit_edges(schedule: Schedule) -> dict[Task, tuple[Task, ...]]:
    """Forward tasks that wait for a backward of their stage, so that no more microbatches are in flight."""
    edges: dict[Task, tuple[Task, ...]] = {}
    for order in schedule.orders:
        latest: dict[int, Task] = {}
        for task in order:
            if task.phase == "backward":
                latest[task.stage] = task
            elif task.phase == "forward" and task.stage in latest:
                edges[task] = (latest[task.stage],)
    return edges


def _check_parts(parts: Mapping[int, Part], sizes: Sequence[int], devices: Sequence[str]) -> None:
    if not sizes or not devices:
        raise PlanError("a step has microbatches and devices")
    missing = [size for size in sizes if size not in parts]
    if missing:
        raise PlanError(f"there is no part for microbatches of {missing[0]} samples; there are {sorted(parts)}")
    first = parts[sizes[0]]
    summary = _summary(first)
    for size, part in parts.items():
        stages = {int(node.attrs["stage"]) for node in part.main.nodes}
        if stages and max(stages) >= len(devices):
            raise PlanError(f"stage {max(stages)} has no device; there are {len(devices)} devices")
        if _summary(part) != summary:
            raise PlanError(f"microbatches of {sizes[0]} and of {size} samples are cut into different stages")


def _summary(part: Part) -> dict[str, object]:
    """What must be alike in parts of different sizes: where each gradient and new buffer is made."""
    stage = {value.name: node.attrs["stage"] for node in part.main.nodes for value in node.outputs}
    alike: dict[str, object] = {}
    together: dict[str, list[str]] = {}
    for port in part.main.outputs_of("grad", "buffer"):
        alike[port.ref] = stage.get(port.value.name)
        together.setdefault(port.value.name, []).append(port.ref)
    alike["together"] = sorted(together.values())
    alike["inputs"] = [port.ref for port in part.main.inputs if not port.target.startswith(TOTAL)]
    return alike
