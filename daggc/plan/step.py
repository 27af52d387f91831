"""A whole training step as one placed graph of tasks: microbatches, accumulation, clipping, updates.

For 2 stages on two devices and 2 microbatches (F forward, B backward, U update; a schedule orders each device):

    F0.0 -> F1.0 -> B1.0 -> B0.0 -.            gradients of B0.0 are an input of B0.1, which adds its own
    F0.1 -> F1.1 -> B1.1 -> B0.1 -+-> U0       (in order of microbatches, whatever arrives first)
                      `----------- -> U1

Before the forwards, totals of the batch that the loss divides by (:mod:`daggc.passes.microbatch`) are counted from
the data; before the updates, the global norm of the gradients, where they are clipped.

A stage may have replicas, one on each of several devices, which take the microbatches in turn. Each replica adds up
the gradients of its own microbatches. Every parameter has its home at one replica, with its optimizer state: there
the replicas' sums are added (R) and the update runs (as in ZeRO-1, so that neither state nor updates are doubled),
and from there the other replicas get its new value when the next step begins.

    F0.0 -> F1.0 -> B1.0 -> B0.0 -.            stage 0 on devices a and b, stage 1 on c
    F0.1 -> F1.1 -> B1.1 -> B0.1 -+-> R0 -> U0     (a has the home of one half of the parameters,
                                  `-> R0/1 -> U0/1  b of the other)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from daggc.errors import PlanError
from daggc.ir.attrs import Attr, Attrs
from daggc.ir.graph import Graph, Node, Port, Program, Value
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.call import declare
from daggc.ops.optim import SCALAR
from daggc.plan import bodies as make
from daggc.plan.bodies import Group, state_target
from daggc.plan.part import FRACTION, TOTAL, Part, Step, check_parts
from daggc.plan.place import place
from daggc.plan.schedule import Task
from daggc.plan.step_order import held_back, schedule_of

_SHARED = ("param", "buffer", "constant")


def step_graph(
    parts: Mapping[int, Part],
    sizes: Sequence[int],
    groups: Sequence[Group],
    devices: Sequence[str | Sequence[str]],
    *,
    schedule: str = "1f1b",
    clip: bool = False,
    chain_buffers: bool = True,
    donate: bool = False,
    times: Mapping[str, Any] | None = None,
) -> Step:
    """Assemble a training step.

    Args:
        parts: what a microbatch runs, by its number of samples.
        sizes: samples of each microbatch, in order; each is a key of ``parts``.
        groups: the optimizer's parameter groups. Parameters without a gradient are left alone, as torch does.
        devices: the device of each stage, or of each of its replicas.
        schedule: one of :data:`daggc.plan.schedule.SCHEDULES`.
        clip: multiply gradients by ``min(max norm / (global norm + 1e-6), 1)``.
        chain_buffers: each microbatch reads the buffers that the one before it left. Where the cut of the batch
            is exact, buffers do not depend on the samples, and False gives what one whole batch would. Each
            replica of a stage passes on its own, and the step leaves the first one's.
        donate: optimizer state may be updated in place.
        times: what the order of tasks may depend on: ``seconds`` and ``transfer`` of
            :class:`daggc.plan.schedule.Options`, of one microbatch.

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
    assembly = _Assembly(parts, tuple(sizes), groups, devices, schedule, clip, chain_buffers, donate, times)
    return assembly.build()


@dataclass
class _Microbatch:
    """The values of one microbatch, by name in its part's main graph."""

    index: int
    part: Part
    suffix: str
    values: dict[str, Value] = field(default_factory=dict)
    calls: dict[tuple[int, str], Node] = field(default_factory=dict)


_Parameter = tuple[Port, Group]


class _Assembly:
    """The step under construction, unplaced until the end."""

    def __init__(
        self,
        parts: Mapping[int, Part],
        sizes: tuple[int, ...],
        groups: Sequence[Group],
        devices: Sequence[str | Sequence[str]],
        schedule: str,
        clip: bool,
        chain_buffers: bool,
        donate: bool,
        times: Mapping[str, Any] | None,
    ) -> None:
        check_parts(parts, sizes, len(devices))
        self.b = REGISTRY.builder("step")
        self.bodies: dict[str, Graph] = {}
        self.clip, self.chain, self.donate = clip, chain_buffers, donate
        self.replicas = tuple((own,) if isinstance(own, str) else tuple(own) for own in devices)
        self.device_of: dict[str, str] = {}  # task -> device
        first = parts[sizes[0]]
        self.schedule = schedule_of(schedule, self.replicas, len(sizes), first.main, times or {})
        self.sizes = sizes
        names = {size: "" if len(parts) == 1 else f".x{size}" for size in parts}
        self.microbatches = [_Microbatch(k, parts[size], names[size]) for k, size in enumerate(sizes)]
        self.first = first
        self.makers = {value.name: node for node in first.main.nodes for value in node.outputs}
        self.updated = self._updated(groups)
        self.loss_stage = int(self._maker(self._loss_port(first)).attrs["stage"])
        self.inputs: dict[str, Value] = {}
        self.homes: dict[str, str] = {}
        self.gradients: dict[tuple[str, int], Value] = {}  # parameter and replica -> its gradient so far
        self.added: dict[tuple[str, int], int] = {}  # likewise: the last microbatch whose gradient is in that sum
        self.owner = self._owners()
        self.plain: dict[str, Graph] = {}
        self.after = held_back(self.schedule)

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

    def _owners(self) -> dict[str, int]:
        """The replica of its stage that each updated parameter has its home at: about as many bytes for each."""
        owners: dict[str, int] = {}
        loads = [[0] * len(own) for own in self.replicas]
        for name, (port, _, stage) in sorted(self.updated.items(), key=lambda item: -item[1][0].value.type.nbytes):
            owners[name] = loads[stage].index(min(loads[stage]))
            loads[stage][owners[name]] += port.value.type.nbytes
        return owners

    def _replica(self, stage: int, microbatch: int) -> int:
        return microbatch % len(self.replicas[stage])

    def _home(self, name: str) -> str:
        """The device where an updated parameter and its optimizer state live."""
        return self.replicas[self.updated[name][2]][self.owner[name]]

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
                home = self._home(port.target) if port.kind == "param" and port.target in self.updated else ""
                self._input(port.value.type, port.kind, port.target, port.value.name, home)
        for name, (port, group, _) in self.updated.items():
            for state in group.states:
                target = state_target(state, name)
                self._input(port.value.type, "state", target, f"{state}_{port.value.name}", self._home(name))
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
        replica: int = 0,
        **more: Attr,
    ) -> tuple[Value, ...]:
        self.bodies.setdefault(body.name, body)
        self.device_of[task] = self.replicas[stage][replica]
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
            replica = self._replica(self.loss_stage, index)
            counts.append(
                self._call(body, inputs, names, task, self.loss_stage, "prepare", replica=replica, microbatch=index)
            )
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
        replica = self._replica(task.stage, task.microbatch)
        shared = self._gradient_params(part)
        sums = [at for at, value in enumerate(node.outputs) if value.name in shared]
        sums_so_far = [self.gradients.get((shared[node.outputs[at].name][0], replica)) for at in sums]
        before = task.microbatch - len(self.replicas[task.stage])  # the replica's microbatch before this one
        first = before < 0
        params = [(name, replica) for at in sums for name in shared[node.outputs[at].name]]
        behind = any(self.added.get(key, -1) != max(before, -1) for key in params)
        if behind or any(value.name not in values for value in reads):
            return False
        self.added.update(dict.fromkeys(params, task.microbatch))
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
            body, inputs, names, str(task), task.stage, task.phase, node.path, replica,
            microbatch=microbatch.index, **({"after": after} if after else {}),
        )  # fmt: skip
        for at, value in zip(kept, results, strict=False):
            values[node.outputs[at].name] = value
        for at, value in zip(sums, [results[at] for at in sums] if first else results[len(kept) :], strict=True):
            self.gradients.update(dict.fromkeys([(name, replica) for name in shared[node.outputs[at].name]], value))
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
        if not self.chain:
            return
        for port in microbatch.part.main.outputs_of("buffer"):
            value = microbatch.values.get(port.value.name)
            after = microbatch.index + len(self.replicas[self._stage_of(port)])
            if value is None or after >= len(self.microbatches):
                continue
            following = self.microbatches[after]
            for other in following.part.main.inputs_of("buffer"):
                if other.target == port.target:
                    following.values[other.value.name] = value

    def _withhold_buffers(self) -> None:
        """Microbatches after a replica's first wait for the buffers that the one before them changes."""
        if not self.chain:
            return
        changed = {port.target: len(self.replicas[self._stage_of(port)]) for port in self._new_buffers()}
        for microbatch in self.microbatches:
            for port in microbatch.part.main.inputs_of("buffer"):
                if microbatch.index >= changed.get(port.target, len(self.microbatches)):
                    del microbatch.values[port.value.name]

    def _new_buffers(self) -> tuple[Port, ...]:
        return tuple(port for port in self.first.main.outputs_of("buffer") if port.value.name in self.makers)

    def _stage_of(self, port: Port) -> int:
        """The stage that makes a buffer's new value; 0 for one that is an input as it is."""
        maker = self.makers.get(port.value.name)
        return int(maker.attrs["stage"]) if maker else 0

    # --- after the last backward ----------------------------------------------------------------------

    def _reduce(self, stage: int, owner: int, params: Sequence[_Parameter]) -> list[Value]:
        """The gradients of parameters at their home: the sums of the stage's replicas, added in order."""
        names = [port.target for port, _ in params]
        groups = [
            [self.gradients[name, replica] for name in names]
            for replica in range(len(self.replicas[stage]))
            if (names[0], replica) in self.gradients
        ]
        if len(groups) == 1:
            return groups[0]
        body = make.sums(_numbered(f"stage{stage}.reduce", owner), [value.type for value in groups[0]], len(groups))
        inputs = [value for group in groups for value in group]
        results = [_identifier(f"reduced_{name}") for name in names]
        task = _numbered(f"R{stage}", owner, "/")
        return list(self._call(body, inputs, results, task, stage, "reduce", replica=owner))

    def _clip(self, reduced: Mapping[tuple[int, int], Sequence[Value]]) -> tuple[Value, Value] | None:
        """The clipping coefficient and the global norm."""
        if not self.clip or not reduced:
            return None
        norms: list[Value] = []
        for (stage, owner), gradients in reduced.items():
            body = make.squared_norms(
                _numbered(f"stage{stage}.squared_norm", owner), [value.type for value in gradients]
            )
            task, result = _numbered(f"N{stage}", owner, "/"), _numbered(f"squared_norm_{stage}", owner, "_")
            norms += self._call(body, gradients, [result], task, stage, "norm", replica=owner)
        body = make.clipping("clip", len(norms))
        names = ["coefficient", "grad_norm"]
        stage = min(stage for stage, _ in reduced)
        coefficient, norm = self._call(body, [*norms, self._scalar("clip")], names, "clip", stage, "norm")
        return coefficient, norm

    def _update(
        self,
        stage: int,
        owner: int,
        params: Sequence[_Parameter],
        gradients: Sequence[Value],
        coefficient: Value | None,
    ) -> dict[str, Value]:
        """Emit the update of parameters of one home; its results by ``kind:target``."""
        name = _numbered(f"stage{stage}.update", owner)
        body, targets = make.updates(name, params, coefficient is not None, self.donate)
        inputs: list[Value] = []
        for (port, group), gradient in zip(params, gradients, strict=True):
            inputs += [self.inputs[port.ref], gradient]
            inputs += [self.inputs[f"state:{state_target(state, port.target)}"] for state in group.states]
        inputs += [self._scalar(f"lr:{name}") for name in make.groups_of(params)]
        inputs += [self._scalar("step"), *([] if coefficient is None else [coefficient])]
        names = [_identifier(f"new_{target}") for _, target in targets]
        task = _numbered(f"U{stage}", owner, "/")
        results = self._call(body, inputs, names, task, stage, "update", replica=owner)
        return {f"{kind}:{target}": value for (kind, target), value in zip(targets, results, strict=True)}

    def build(self) -> Step:
        self._declare_inputs()
        self._withhold_buffers()
        self._prepare()
        self._run_microbatches()
        port = self._loss_port(self.first)
        losses = [(microbatch.values[self._loss_port(microbatch.part).value.name],) for microbatch in self.microbatches]
        (loss,) = self._sum("loss", losses, ["loss"])
        homes: dict[tuple[int, int], list[_Parameter]] = {}
        for parameter, group, stage in self.updated.values():
            homes.setdefault((stage, self.owner[parameter.target]), []).append((parameter, group))
        # The last stage is the first that is done.
        homes = dict(sorted(homes.items(), key=lambda item: (-item[0][0], item[0][1])))
        reduced = {home: self._reduce(*home, params) for home, params in homes.items()}
        clipped = self._clip(reduced)
        results: dict[str, Value] = {}
        for home, params in homes.items():
            results |= self._update(*home, params, reduced[home], clipped[0] if clipped else None)
        self.b.output(loss, "output", port.target)
        self._other_outputs(port)
        if clipped:
            self.b.output(clipped[1], "output", "grad_norm")
        for kind in ("param", "state"):
            for ref, value in results.items():
                if ref.startswith(f"{kind}:"):
                    self.b.output(value, kind, ref.removeprefix(f"{kind}:"))
        for buffer in self.first.main.outputs_of("buffer"):
            last = self.microbatches[:: len(self.replicas[self._stage_of(buffer)])][-1]
            (own,) = (port for port in last.part.main.outputs_of("buffer") if port.target == buffer.target)
            self.b.output(last.values[own.value.name], "buffer", buffer.target)
        graph = place(
            self.b.build(), lambda node: self.device_of[node.attrs["task"]], lambda own: self.homes.get(own.ref)
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


def _numbered(name: str, owner: int, mark: str = ".") -> str:
    """The name of what one replica of a stage does for the parameters at home there."""
    return f"{name}{mark}{owner}" if owner else name
