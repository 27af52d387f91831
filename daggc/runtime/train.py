"""``cm.train_step``: forward, backward and update on the workers, parameters and optimizer state at home there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from daggc.errors import RunError
from daggc.plan.automatic import AUTO
from daggc.plan.bodies import Group
from daggc.plan.compared import Comparison, compare
from daggc.plan.device import Cluster, cluster_of, cpu_device
from daggc.plan.outline import RESIDENT
from daggc.plan.plan import Plan
from daggc.runtime.arguments import check_step
from daggc.runtime.batch import Batch, call_with_loss, read_batch
from daggc.runtime.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from daggc.runtime.memory import give_back_after
from daggc.runtime.optimizers import (
    Counts,
    check_dtypes,
    learning_rates,
    present_state,
    read_groups,
    read_state,
    set_learning_rate,
    write_state,
)
from daggc.runtime.pool import Pool
from daggc.runtime.replan import Replanned, replanned
from daggc.runtime.resident import Home, LocalHome, Pending, WorkerHome
from daggc.runtime.scaler import (
    Scaler,
    check_scaled,
    read_scale,
    rescaled,
    scaling_of,
    skipped,
    unskipped,
    write_scale,
)
from daggc.runtime.step_program import GRAPH, IN_LANES, Options, StepBuilder, StepProgram, modes_of
from daggc.runtime.worker import Record

_MOST_MICROBATCHES = 1 << 20  # of a step: their random numbers come from keys of their own
_MANY = 3  # programs that differ in options of the optimizer alone, after which the user is told


class LazyLoss:
    """The loss of a step that may still be running: ``float(loss)`` or ``loss.item()`` waits for it."""

    def __init__(self, pending: Pending) -> None:
        self._pending = pending

    def result(self) -> torch.Tensor:
        """The loss as a scalar tensor. Raises what the step raised."""
        return self._pending.outputs()["0"]

    compute = result

    def item(self) -> float:
        return self.result().item()

    def __float__(self) -> float:
        return self.item()

    @property
    def grad_norm(self) -> float:
        """The global norm of the gradients before clipping; only with ``max_grad_norm``."""
        outputs = self._pending.outputs()
        if "grad_norm" not in outputs:
            raise RunError("the gradient norm is computed only with train_step(max_grad_norm=...)")
        return outputs["grad_norm"].item()

    @property
    def skipped(self) -> bool:
        """Whether a gradient was infinite or NaN, so that nothing was updated; never without a ``scaler``."""
        finite = self._pending.outputs().get("finite")
        return finite is not None and not finite.item()

    def __repr__(self) -> str:
        return "LazyLoss()"


class TrainStep:
    """One training step, called with a batch; see :func:`train_step`."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any] | None,
        optimizer: torch.optim.Optimizer,
        pool: Pool | None,
        options: Options,
        max_grad_norm: float | None,
        seed: int | None,
        threads: int,
        replan_after: int | None = None,
        scaler: Scaler | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.max_grad_norm = max_grad_norm
        self.pool = pool
        self._groups = read_groups(optimizer, model)
        check_dtypes(self._groups, model)
        check_scaled(scaler, self._groups, model)
        self._seed = int(torch.randint(2**62, ()).item()) if seed is None else seed
        cluster: Cluster = pool.cluster if pool else cluster_of([cpu_device(0)])
        self._builder = StepBuilder(model, call_with_loss(loss_fn), cluster, options)
        self._programs: dict[Any, StepProgram] = {}
        self._home: Home = WorkerHome(pool, threads) if pool else LocalHome()
        self._loaded: tuple[tuple[str, str, int], ...] | None = None  # layout of the state where steps run
        self._aside: dict[str, torch.Tensor] = {}  # what the program that runs now has no use for
        self._steps = 0
        self._counts = Counts(0, {})
        self._current: StepProgram | None = None
        self._replan_after = replan_after if pool else None  # in this process there is nothing to choose
        self._same = 0  # steps of the program that ran last
        self._kept = 0  # steps after which the model has the state
        self._lost = 0  # later ones, whose state close() has dropped

    @property
    def steps(self) -> int:
        """Steps taken, those submitted included; a step that failed is not counted."""
        return self._steps if self._loaded is None else self._home.version

    def __call__(self, *args: Any, **kwargs: Any) -> LazyLoss:
        """Submit a step on a batch; returns its loss, which may not be there yet.

        Learning rates, and ``max_grad_norm``, are those of this moment. In this process the step reads and writes
        the model's own parameters and the optimizer's own state, as eager does. On workers, changes to them are not
        seen: the workers have the newest; see :meth:`sync` and :meth:`load_from_model`.

        Raises:
            WorkerLostError: a worker of an earlier step is gone; load a checkpoint into a new train step.
            RunError, CaptureError, PlanError: the step cannot be run.
        """
        return self._submit([read_batch(args, kwargs)])

    def accumulate(self, batches: Iterable[Any]) -> LazyLoss:
        """Submit one step on several batches: one update, by the mean of their losses.

        The numbers are those of ``(loss / n).backward()`` for each of the ``n`` batches and one update after that.
        The batches follow each other through the stages as microbatches of one batch do, each of them cut as
        ``microbatches`` says: activations take no more memory for more batches. Random ops, rates and clipping are
        as in any step; buffers (batch norm's statistics) go from batch to batch.

        Args:
            batches: of dicts, tuples or lists: ``step(batch)`` of a dict, ``step(*batch)`` of the others. Each may have
                another number of samples, and tensors of other lengths; every combination is planned, and compiled,
                anew.

        Raises:
            RunError: there are none, or they differ in more than shapes.
        """
        read = [read_batch(tuple(batch) if isinstance(batch, tuple | list) else (batch,), {}) for batch in batches]
        if not read:
            raise RunError("there are no batches to accumulate gradients over")
        for batch in read:
            if (str(batch.spec.tree), batch.spec.fixed) != (str(read[0].spec.tree), read[0].spec.fixed):
                raise RunError(
                    "the batches of one step have the same structure, and the same values that are not tensors; got "
                    f"{read[0].spec.tree} and {batch.spec.tree}"
                )
        return self._submit(read)

    def _submit(self, batches: Sequence[Batch]) -> LazyLoss:
        program = self.program(*batches)
        if self._replan_after is not None and program is self._current and self._same == self._replan_after:
            self.replan()
            program = self.program(*batches)
        self._settle_state(program)
        inputs = self._inputs(program, batches)
        version = self.steps
        pending = self._home.submit(program.step.program, inputs, program.lanes)
        self._counts.add(version, program.updated)
        self._same = self._same + 1 if program is self._current else 1
        self._current = program
        if self.pool is None:  # the model has new parameters: the optimizer shall have the state that goes with them
            tensors = self._home.snapshot()
            write_state(self.optimizer, self._groups, self.model, tensors, self._updates(tensors))
            write_scale(self.scaler, tensors)
        for (path, name), value in program.assigned.items():
            setattr(self.model.get_submodule(path), name, value)
        self.optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]  # schedulers look at it
        return LazyLoss(pending)

    def plan_for(self, *args: Any, **kwargs: Any) -> StepProgram:
        """The program of a step on such a batch, planned but not run; its ``predicted`` is the simulation of it."""
        return self.program(read_batch(args, kwargs))

    def program(self, *batches: Batch) -> StepProgram:
        """The program of a step on batches like these, built when first needed."""
        self._groups = read_groups(self.optimizer, self.model)
        clip = self.max_grad_norm is not None
        scaling = scaling_of(self.scaler)
        shapes = tuple((batch.signature(), batch.size) for batch in batches)
        key = (shapes, self._groups, clip, scaling, modes_of(self.model))
        if key not in self._programs:
            self._warn_of_options(key)
            groups = [Group(str(i), g.names, g.kind, dict(g.options)) for i, g in enumerate(self._groups)]
            self._programs[key] = self._builder.build(batches, groups, clip, scaling)
            give_back_after(self.model)
        return self._programs[key]

    def _warn_of_options(self, key: tuple[Any, ...]) -> None:
        """Learning rates are inputs of a program; other options are part of it."""
        alike = [other for other in self._programs if (other[0], *other[2:]) == (key[0], *key[2:])]
        if len(alike) == _MANY:
            warnings.warn(
                "the optimizer's momentum, betas or weight decay change from step to step, and each value is planned "
                "and compiled anew: keep them (OneCycleLR and CyclicLR: cycle_momentum=False)",
                stacklevel=4,
            )

    def _settle_state(self, program: StepProgram) -> None:
        """Put the state where the program's plan has it, if it is not there."""
        self._follow()
        if program.layout == self._loaded:
            return
        if self.pool is None:
            self._unload(self.steps)
        tensors, counts = self._state()
        ports = program.step.graph.inputs_of(*RESIDENT)
        given = {port.ref: program.constants.get(port.ref, tensors.get(port.ref)) for port in ports}
        missing = [ref for ref, tensor in given.items() if tensor is None]
        if missing:
            raise RunError(
                f"the step needs {missing[0]!r}, which neither the model nor its optimizer had when the state was "
                "taken from them; sync() and load_from_model() to take it again"
            )
        steps = self.steps
        known = {ref: tensor for ref, tensor in given.items() if tensor is not None}
        self._home.load(program.step.program, known, steps)
        self._counts = Counts(steps, counts)
        self._aside = {ref: tensor for ref, tensor in tensors.items() if ref not in given}
        self._loaded, self._steps = program.layout, steps

    def _follow(self) -> None:
        """In this process the model and the optimizer are the state: take it anew if their tensors are others now.

        Raises:
            RunError: the newest state is neither there nor on workers.
        """
        if self._lost:
            raise RunError(
                f"close() dropped what {self._lost} steps since the last sync() had changed: load() a checkpoint, or "
                "load_from_model() to go on from what the model has"
            )
        if self.pool is None and self._loaded is not None:
            held = {**self._aside, **self._home.snapshot()}
            states, counts = present_state(self.optimizer, self._groups, self.model)
            known = self._updates(held)
            moved = (not _same(held[ref], x) for ref, x in (self._model_tensors() | states).items() if ref in held)
            changed = any(moved) or any(known.get(name, 0) != count for name, count in counts.items())
            if changed or rescaled(self.scaler, held):
                self._unload(self.steps)

    def _state(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """All weights, buffers and state by port ref, and how often each parameter was updated.

        They are those of the workers, if they have been given them.
        """
        if self._loaded is not None:
            current = {**self._aside, **self._home.snapshot()}
            tensors = {ref: tensor for ref, tensor in current.items() if not ref.startswith("constant:")}
            return unskipped(tensors), self._updates(tensors)
        states, counts = read_state(self.optimizer, self._groups, self.model)
        return {**self._model_tensors(), **states, **read_scale(self.scaler)}, counts

    def _updates(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """How often each parameter was updated by the time of this state."""
        counts = self._counts.at(self.steps)
        missed = skipped(tensors)
        if missed and self._current is not None:
            counts.update((name, max(counts[name] - missed, 0)) for name in self._current.updated)
        return counts

    def _model_tensors(self) -> dict[str, torch.Tensor]:
        named: dict[str, torch.Tensor] = {f"param:{name}": tensor for name, tensor in self.model.named_parameters()}
        return named | {f"buffer:{name}": tensor for name, tensor in self.model.named_buffers()}

    def _inputs(self, program: StepProgram, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        """The tensors of the step's ports that are not resident, by ref."""
        inputs: dict[str, torch.Tensor] = {}
        several, waiting, start = len(batches) > 1, iter(batches), 0
        batch = next(waiting)
        for index, size in enumerate(program.sizes):
            if start == batch.size:
                batch, start = next(waiting), 0
            for name, leaf, batched in zip(batch.names, batch.part(start, size), batch.batched, strict=True):
                inputs[f"input:{name}#{index}" if batched or several else f"input:{name}"] = leaf
            inputs[f"key:#{index}"] = torch.tensor([self._seed, self.steps * _MOST_MICROBATCHES + index])
            inputs[f"scalar:fraction#{index}"] = _number(size / batch.size)
            start += size
        for group, rate in enumerate(learning_rates(self.optimizer)):
            inputs[f"scalar:lr:{group}"] = _number(rate)
        stateful = [name for group in self._groups if group.states for name in group.names if name in program.updated]
        inputs["scalar:step"] = _number(self._counts.common(self.steps, stateful) + 1)
        if self.max_grad_norm is not None:
            inputs["scalar:clip"] = _number(self.max_grad_norm)
        return inputs

    def sync(self) -> None:
        """Wait for all steps; write weights and buffers into the model, state into the optimizer.

        Training may go on as if nothing had happened, or elsewhere: with the optimizer itself, say; after that
        :meth:`load_from_model` brings what it changed back. In this process both have the newest after each step.
        """
        self._follow()
        if self._loaded is not None:
            self._write_back(*self._state())
            self._kept = self.steps

    def _write_back(self, tensors: Mapping[str, torch.Tensor], counts: Mapping[str, int]) -> None:
        with torch.no_grad():
            for ref, tensor in self._model_tensors().items():
                if not _same(tensor, tensors[ref]):
                    tensor.copy_(tensors[ref])
        write_state(self.optimizer, self._groups, self.model, tensors, counts)
        write_scale(self.scaler, tensors)

    def load_from_model(self) -> None:
        """Take parameters, buffers and state from the model, optimizer and scaler, at the next step.

        In this process every step does. Waits for the steps under way, and raises what went wrong with them; called
        again, it goes on regardless.
        """
        self._home.settle()
        self._home.discard()
        self._unload(self.steps)

    def _unload(self, steps: int) -> None:
        """The model and optimizer are what counts; the next step takes the state from them."""
        self._steps, self._loaded, self._aside = steps, None, {}
        self._kept, self._lost = steps, 0

    def save(self, path: str | Path) -> None:
        """Write a checkpoint: weights, buffers, optimizer state, loss scale, step count, seed, learning rates.

        The state of a learning-rate scheduler is not in it.
        """
        self._follow()
        tensors, counts = self._state()
        meta = {
            "steps": self.steps,
            "seed": self._seed,
            "learning_rates": learning_rates(self.optimizer),
            "updates": counts,
        }
        write_checkpoint(path, Checkpoint(tensors, meta))

    def load(self, path: str | Path) -> None:
        """Continue from a checkpoint, with the same numbers as if nothing had happened.

        The model, the optimizer (with its learning rates) and the scaler get the checkpoint's values too. Steps that
        are under way, or went wrong, are given up.

        Raises:
            RunError: the file is no checkpoint, or of another model or optimizer; nothing is changed then.
        """
        checkpoint = read_checkpoint(path)
        groups = read_groups(self.optimizer, self.model)
        own = {**self._model_tensors(), **read_state(self.optimizer, groups, self.model)[0], **read_scale(self.scaler)}
        checkpoint.check(path, own, len(groups))
        self._home.discard()
        self._groups = groups
        self._seed = checkpoint.meta["seed"]
        for group, rate in zip(self.optimizer.param_groups, checkpoint.meta["learning_rates"], strict=True):
            set_learning_rate(group, rate)
        self._write_back(checkpoint.tensors, checkpoint.meta["updates"])
        self._unload(checkpoint.meta["steps"])

    @property
    def plan(self) -> Plan | None:
        """The plan of the last step; None before the first."""
        return self._current.plan if self._current else None

    @property
    def step_program(self) -> StepProgram | None:
        """The program of the last step; None before the first."""
        return self._current

    def explain(self) -> str:
        """Why the step is as it is: the plan, the order of tasks, and how the batch is cut."""
        if self._current is None:
            return "nothing is planned before the first step"
        return self._current.explain()

    def records(self) -> dict[str, Sequence[Record]]:
        """When tasks ran since the last call, by device; for timelines."""
        return dict(self._home.records())

    def compare(self) -> Comparison:
        """What was predicted of a step beside what its tasks took since the last call of this or :meth:`records`.

        Waits for the steps under way. The first steps compile code and map memory: compare after a few more.

        Raises:
            RunError: no step has run.
        """
        if self._current is None:
            raise RunError("nothing has run yet: predictions are compared after a few steps")
        self._home.settle()
        found = self._home.memory(), self._home.moved()
        return compare(self._current.predicted, self._home.records(), self._current.moved, *found)

    def replan(self, steps: int = 1000) -> Replanned:
        """Correct the cost model by the steps since the last records, and plan anew where that pays.

        Waits for the steps under way. What corrects it is what tasks took; a plan is replaced if over ``steps``
        steps it is predicted to save more than moving parameters and optimizer state takes. The state moves when the
        next step begins; the numbers stay the same but for the order of additions.

        Args:
            steps: still to come.

        Raises:
            RunError: no step has run on workers.
        """
        if self._current is None:
            raise RunError("nothing has run yet: plan anew after a few steps")
        self._home.settle()
        records = self._home.records()
        if not any(records.values()):
            raise RunError(
                "no task was recorded since records were last taken (by compare, records, replan); run some steps first"
            )
        result = replanned(self._builder, self._current, records, steps)
        self._builder.use(result.cluster)
        if result.program is not None:
            self._programs = {key: result.program for key, own in self._programs.items() if own is self._current}
        return result

    def close(self) -> None:
        """Drop the state on the workers; the model keeps what the last :meth:`sync` gave it (in this process: all).

        After steps that no :meth:`sync` brought back, only :meth:`load` and :meth:`load_from_model` lead on.
        """
        steps = self.steps
        lost = self._lost or (steps - self._kept if self.pool is not None else 0)
        self._home.close()
        self._unload(steps)
        self._lost = lost


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same elements in the same memory."""
    placed = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return placed and one.dtype == other.dtype and one.shape == other.shape


def _number(value: float) -> torch.Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


def train_step(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    optimizer: torch.optim.Optimizer,
    pool: Pool | None,
    *,
    microbatches: int | str = 1,
    schedule: str = "1f1b",
    max_grad_norm: float | None = None,
    stages: int | None = None,
    pins: Mapping[str, str] | None = None,
    split_backward: bool = False,
    replicas: int | str = 1,
    remat: str = "auto",
    partition: str = "auto",
    force_microbatches: bool = False,
    seed: int | None = None,
    threads: int = 0,
    replan_after: int | None = None,
    codegen: str = "torch",
    execution: str = AUTO,
    scaler: Scaler | None = None,
) -> TrainStep:
    """See :meth:`daggc.runtime.module.CompiledModule.train_step`."""
    counts = {"microbatches": microbatches, "replicas": replicas}
    check_step(loss_fn, optimizer, counts, max_grad_norm, stages, replan_after)
    if execution not in (AUTO, GRAPH, IN_LANES):
        raise RunError(f"execution is {AUTO!r}, {GRAPH!r} or {IN_LANES!r}, got {execution!r}")
    options = Options(
        microbatches, schedule, stages, pins, split_backward, force_microbatches, replicas, remat, partition, codegen,
        execution,
    )  # fmt: skip
    return TrainStep(model, loss_fn, optimizer, pool, options, max_grad_norm, seed, threads, replan_after, scaler)
