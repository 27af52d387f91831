"""A whole training step as one placed graph of tasks: microbatches, accumulation, clipping, updates.

For 2 stages on two devices and 2 microbatches (F forward, B backward, U update; a schedule orders each device):

    F0.0 -> F1.0 -> B1.0 -> B0.0 -.            gradients of B0.0 are an input of B0.1, which adds its own
    F0.1 -> F1.1 -> B1.1 -> B0.1 -+-> U0       (in order of microbatches, whatever arrives first)
                      `----------- -> U1

Before the forwards, totals of the batch that the loss divides by (:mod:`daggc.passes.microbatch`) are counted from
the data. What comes after the last backward is :mod:`daggc.plan.step_end`'s.

Gradients are accumulated over several batches in the same way: their microbatches follow each other, and each batch has
its share of the loss.

A stage may have replicas, one on each of several devices, which take the microbatches in turn. Each replica adds up
the gradients of its own microbatches. Every parameter has its home at one replica, with its optimizer state: there
the replicas' sums are added (R) and the update runs (as in ZeRO-1, so that neither state nor updates are doubled),
and from there the other replicas get its new value when the next step begins.

    F0.0 -> F1.0 -> B1.0 -> B0.0 -.            stage 0 on devices a and b, stage 1 on c
    F0.1 -> F1.1 -> B1.1 -> B0.1 -+-> R0 -> U0     (a has the home of one half of the parameters,
                                  `-> R0/1 -> U0/1  b of the other)
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from daggc.errors import PlanError
from daggc.ir.graph import Graph, Node, Port, Value
from daggc.ops.optim import SCALAR
from daggc.plan import bodies as make
from daggc.plan.bodies import Group, Scaling, state_target
from daggc.plan.construction import Construction
from daggc.plan.part import FRACTION, TOTAL, Part, Step, check_parts
from daggc.plan.schedule import Task
from daggc.plan.step_end import Ending, Parameter, declare_scaling, end
from daggc.plan.step_order import held_back, schedule_of

_SHARED = ("param", "buffer", "constant")


def step_graph(
    parts: Mapping[Hashable, Part],
    sizes: Sequence[Hashable],
    groups: Sequence[Group],
    devices: Sequence[str | Sequence[str]],
    *,
    schedule: str = "1f1b",
    clip: bool = False,
    scaling: Scaling | None = None,
    chain_buffers: bool = True,
    donate: bool = False,
    times: Mapping[str, Any] | None = None,
    batches: Sequence[int] = (),
) -> Step:
    """Assemble a training step.

    Args:
        parts: what a microbatch runs, by its number of samples (and what else tells parts apart).
        sizes: of each microbatch, in order, the key of its part.
        groups: the optimizer's parameter groups. Parameters without a gradient are left alone, as torch does.
        devices: the device of each stage, or of each of its replicas.
        schedule: one of :data:`daggc.plan.schedule.SCHEDULES`.
        clip, scaling: see :class:`daggc.plan.step_end.Ending`.
        chain_buffers: each microbatch reads the buffers that the one before it left. Where the cut of the batch
            is exact, buffers do not depend on the samples, and False gives what one whole batch would. Each
            replica of a stage passes on its own, and the step leaves the first one's.
        donate: optimizer state may be updated in place.
        times: what the order of tasks may depend on: ``seconds`` and ``transfer`` of
            :class:`daggc.plan.schedule.Options`, of one microbatch.
        batches: how many microbatches each batch is cut into, in order; by default there is one batch. With several,
            the loss is the mean of theirs.

    Returns:
        A step whose graph has these ports beside parameters, buffers and constants by their names. Inputs:
        ``state:<name>:<param>``; ``input:<target>#<microbatch>`` (``input:<target>`` if all share it);
        ``key:#<microbatch>``; and f64 scalars ``lr:<group>``, ``step`` (1 on the first), ``fraction#<microbatch>``
        (its samples / the batch's), ``clip`` (the largest norm). Outputs: ``output:<loss>``,
        ``output:grad_norm`` with ``clip``, ``output:finite`` with ``scaling`` (False: the step was skipped), ``param``,
        ``state`` and ``buffer``. With ``scaling``, :data:`daggc.plan.bodies.SCALING_STATE` is state too, and ``step``
        counts skipped steps. Several batches have an input ``#<microbatch>`` of all. Each call has the attributes
        ``task`` (a name such as ``F0.1``), ``stage``, ``phase``, ``microbatch`` (of forward, backward,
        weight_grad) and ``after`` (names of tasks of its device that it waits for, beside its inputs').

    Raises:
        PlanError: parts do not fit together, or name parameters or stages that are not there.
    """
    batches = tuple(batches) or (len(sizes),)
    ending = Ending(clip, scaling, donate)
    return _Assembly(parts, tuple(sizes), groups, devices, schedule, ending, chain_buffers, times, batches).build()


@dataclass
class _Microbatch:
    """The values of one microbatch, by name in its part's main graph."""

    index: int
    batch: int
    part: Part
    suffix: str
    values: dict[str, Value] = field(default_factory=dict)
    calls: dict[tuple[int, str], Node] = field(default_factory=dict)


class _Assembly:
    """The step under construction, unplaced until the end."""

    def __init__(
        self,
        parts: Mapping[Hashable, Part],
        sizes: tuple[Hashable, ...],
        groups: Sequence[Group],
        devices: Sequence[str | Sequence[str]],
        schedule: str,
        ending: Ending,
        chain_buffers: bool,
        times: Mapping[str, Any] | None,
        batches: tuple[int, ...],
    ) -> None:
        check_parts(parts, sizes, len(devices))
        if sum(batches) != len(sizes):
            raise PlanError(f"batches of {batches} microbatches are {sum(batches)}, there are {len(sizes)}")
        self.ending, self.chain, self.batches = ending, chain_buffers, batches
        self.replicas = tuple((own,) if isinstance(own, str) else tuple(own) for own in devices)
        self.step = Construction(self.replicas)
        first = parts[sizes[0]]
        self.schedule = schedule_of(schedule, self.replicas, len(sizes), first.main, times or {})
        self.sizes = sizes
        names = {size: "" if len(parts) == 1 else f".x{size}" for size in parts}
        batch_of = [batch for batch, count in enumerate(batches) for _ in range(count)]
        self.microbatches = [
            _Microbatch(k, batch, parts[size], names[size])
            for k, (batch, size) in enumerate(zip(batch_of, sizes, strict=True))
        ]
        self.first = first
        self.makers = {value.name: node for node in first.main.nodes for value in node.outputs}
        self.updated = self._updated(groups)
        self.changed = self._changed_buffers()
        self.waiting: dict[tuple[int, str], list[tuple[_Microbatch, str]]] = {}  # for a microbatch's value of a buffer
        self.loss_stage = int(self._maker(self._loss_port(first)).attrs["stage"])
        self.gradients: dict[tuple[str, int], Value] = {}  # parameter and replica -> its gradient so far
        self.added: dict[tuple[str, int], int] = {}  # likewise: the last microbatch whose gradient is in that sum
        self.owner = self._owners()
        self.plain: dict[str, tuple[Graph, bool]] = {}  # bodies with cotangents of results inside; see bodies.seeded
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

    def _declare_inputs(self) -> None:
        """Ports in an order that is good to read; parameters live where their updates run."""
        for port in self.first.main.inputs:
            if port.kind in _SHARED:
                home = self._home(port.target) if port.kind == "param" and port.target in self.updated else ""
                self.step.input(port.value.type, port.kind, port.target, port.value.name, home)
        for name, (port, group, _) in self.updated.items():
            for state in group.states:
                target = state_target(state, name)
                self.step.input(port.value.type, "state", target, f"{state}_{port.value.name}", self._home(name))
        declare_scaling(self.step, self.ending, self.loss_stage)
        for microbatch in self.microbatches:
            for port in microbatch.part.main.inputs:
                if port.kind != "cotangent" and not (port.kind == "scalar" and port.target.startswith(TOTAL)):
                    microbatch.values[port.value.name] = self._own_input(microbatch, port)

    def _own_input(self, microbatch: _Microbatch, port: Port) -> Value:
        """What a port of a microbatch's graph is in the step."""
        own = f"{port.value.name}_{microbatch.index}"
        if port.kind == "input" and (len(self.batches) > 1 or port.target in microbatch.part.batched_inputs):
            return self.step.input(port.value.type, "input", f"{port.target}#{microbatch.index}", own)
        if port.kind == "key":
            return self.step.input(port.value.type, "key", f"#{microbatch.index}", own)
        if port.kind == "scalar" and port.target == FRACTION:
            return self.step.input(SCALAR, "scalar", f"{FRACTION}#{microbatch.index}", own)
        return self.step.input(port.value.type, port.kind, port.target, port.value.name)

    # --- calls ----------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Count what the loss divides by over each batch, before the first forward."""
        counts: dict[int, list[tuple[Value, ...]]] = {}
        for microbatch in self.microbatches:
            graph = microbatch.part.denominators
            if graph is None:
                continue
            body = replace(graph, name=f"denominators{microbatch.suffix}")
            inputs = [self._own_input(microbatch, port) for port in body.inputs]
            names = [f"denominator_{port.target}_{microbatch.index}" for port in body.outputs]
            task, stage, index = f"D.{microbatch.index}", self.loss_stage, microbatch.index
            results = self.step.call(
                body, inputs, names, task, stage, "prepare", replica=self._replica(stage, index), microbatch=index
            )
            counts.setdefault(microbatch.batch, []).append(results)
        for batch, groups in counts.items():
            if len(groups) != self.batches[batch]:
                raise PlanError("microbatches of one size divide their loss by totals of the batch, others do not")
            mark = f".{batch}" if len(self.batches) > 1 else ""
            totals = self._sum(f"totals{mark}", groups, [f"total_{k}{mark}" for k in range(len(groups[0]))], "prepare")
            for microbatch in self.microbatches:
                for port in microbatch.part.main.inputs_of("scalar") if microbatch.batch == batch else ():
                    if port.target.startswith(TOTAL):
                        microbatch.values[port.value.name] = totals[int(port.target.removeprefix(TOTAL))]

    def _sum(
        self, name: str, groups: Sequence[Sequence[Value]], names: Sequence[str], phase: str, over: int = 1
    ) -> Sequence[Value]:
        """Add up groups of values in order, and divide by a number, with the loss."""
        if len(groups) == over == 1:
            return groups[0]
        body = make.sums(name, [value.type for value in groups[0]], len(groups), over)
        inputs = [value for group in groups for value in group]
        return self.step.call(body, inputs, names, name, self.loss_stage, phase)

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
            self.plain[name] = make.seeded(body, name, part.loss, len(self.batches), self.ending.scaling is not None)
        body, scaled = self.plain[name]
        inputs = [values[value.name] for value in reads]
        inputs += [self.step.inputs["state:loss_scale"]] if scaled else []
        kept = list(range(len(node.outputs)))
        if sums and not first:
            read = {value.name for user in part.main.nodes for value in user.inputs}
            kept = [at for at in kept if at not in sums or node.outputs[at].name in read]
            name = f"{name}.add"
            body = self.step.bodies.get(name) or make.accumulating(body, name, sums, kept)
            inputs += [value for value in sums_so_far if value is not None]
        after = tuple(name for name in map(str, self.after.get(task, ())) if name in exist)
        names = [f"{node.outputs[at].name}_{microbatch.index}" for at in (kept if first else [*kept, *sums])]
        results = self.step.call(
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

    def _withhold_buffers(self) -> None:
        """Microbatches wait for the buffers that one before them changes."""
        for microbatch in self.microbatches:
            for port in microbatch.part.main.inputs_of("buffer"):
                before = self._before(microbatch, port.target)
                if before >= 0:
                    del microbatch.values[port.value.name]
                    self.waiting.setdefault((before, port.target), []).append((microbatch, port.value.name))

    def _pass_buffers(self, microbatch: _Microbatch) -> None:
        """Give new values of buffers to the microbatches that begin with them, as soon as they are there."""
        for port in microbatch.part.main.outputs_of("buffer"):
            value = microbatch.values.get(port.value.name)
            if value is not None:
                for following, name in self.waiting.pop((microbatch.index, port.target), ()):
                    following.values[name] = value

    def _before(self, microbatch: _Microbatch, buffer: str) -> int:
        """The microbatch whose new value of a buffer this one begins with; negative if it is the step's own.

        That is the one before it on its replica or, where the microbatches of a batch all give the same, the last of
        the batch before.
        """
        if buffer not in self.changed:
            return -1
        if self.chain:
            return microbatch.index - len(self.replicas[self.changed[buffer]])
        return sum(self.batches[: microbatch.batch]) - 1

    def _changed_buffers(self) -> dict[str, int]:
        """Buffers that get a new value, and the stage that makes it."""
        ports = [port for port in self.first.main.outputs_of("buffer") if port.value.name in self.makers]
        return {port.target: int(self.makers[port.value.name].attrs["stage"]) for port in ports}

    # --- after the last backward ----------------------------------------------------------------------

    def build(self) -> Step:
        self._declare_inputs()
        self._withhold_buffers()
        self._prepare()
        self._run_microbatches()
        port = self._loss_port(self.first)
        losses = [(microbatch.values[self._loss_port(microbatch.part).value.name],) for microbatch in self.microbatches]
        (loss,) = self._sum("loss", losses, ["loss"], "loss", len(self.batches))
        homes: dict[tuple[int, int], list[Parameter]] = {}
        for parameter, group, stage in self.updated.values():
            homes.setdefault((stage, self.owner[parameter.target]), []).append((parameter, group))
        # The last stage is the first that is done.
        homes = dict(sorted(homes.items(), key=lambda item: (-item[0][0], item[0][1])))
        results = end(self.step, homes, self.gradients, self.loss_stage, self.ending)
        self.step.output(loss, "output", port.target)
        self._other_outputs(port)
        for kind in ("output", "param", "state"):
            for ref, value in results.items():
                if ref.startswith(f"{kind}:"):
                    self.step.output(value, kind, ref.removeprefix(f"{kind}:"))
        for buffer in self.first.main.outputs_of("buffer"):
            self.step.output(self._last_value(buffer), "buffer", buffer.target)
        return Step(self.step.build(), self.schedule, self.sizes)

    def _last_value(self, buffer: Port) -> Value:
        """What a buffer is after the step: on the first replica, where it lives."""
        last = self.microbatches[:: len(self.replicas[self.changed.get(buffer.target, 0)])][-1]
        if not self.chain and buffer.target in self.changed and last.batch != len(self.batches) - 1:
            raise PlanError(
                f"buffer {buffer.target!r} would not be that of the last batch: each batch needs a microbatch for "
                "every replica; cut batches into more microbatches, or take fewer replicas"
            )
        (own,) = (port for port in last.part.main.outputs_of("buffer") if port.target == buffer.target)
        return last.values[own.value.name]

    def _other_outputs(self, loss: Port) -> None:
        """A batch that is not cut gives the model's other results too."""
        if len(self.microbatches) > 1:
            return
        for port in self.first.main.outputs_of("output"):
            if port.target != loss.target:
                self.step.output(self.microbatches[0].values[port.value.name], "output", port.target)
