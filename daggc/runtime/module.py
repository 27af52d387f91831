"""``daggc.compile``: a module that looks like the user's and runs its captured program."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from daggc.errors import CaptureError, RunError
from daggc.frontend.autocast import autocast_state
from daggc.frontend.branches import Answers, decisions_of
from daggc.frontend.effects import is_plain
from daggc.frontend.export import Capture, capture, plain_call
from daggc.frontend.pytree import Spec, flatten
from daggc.ir.graph import Port, Program
from daggc.passes import SIMPLIFY
from daggc.passes.manager import pipeline, run
from daggc.passes.vjp import has_gradient
from daggc.plan.plan import Plan
from daggc.runtime.autograd import Differentiable, MakeExecutor
from daggc.runtime.batch import strides_of
from daggc.runtime.dask_executor import DaskExecutor
from daggc.runtime.executor import Executor
from daggc.runtime.lazy import Pullback, lazy_call, lazy_vjp
from daggc.runtime.mapping import map_batches
from daggc.runtime.memory import give_back_after
from daggc.runtime.pool import Pool
from daggc.runtime.thunk import Thunk
from daggc.runtime.train import TrainStep, train_step

_CACHE_SIZE = 16  # captured signatures kept for one module, and branches of one signature

Fetch = Callable[[], torch.Tensor]


@dataclass
class Entry:
    """One captured signature of a module: the program, and where its inputs come from."""

    captured: Capture
    program: Program
    ports: tuple[Port, ...]
    fetch: tuple[Fetch | None, ...]  # None: a user input or the random key
    function: Differentiable | None
    executor: Executor
    wants: tuple[bool, ...]  # which inputs require gradients
    local_tasks: DaskExecutor | None = None  # for thunks without a client, made when first asked for
    branches: dict[Answers, Entry] = field(default_factory=dict)  # this signature, by what the model's Python decides

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The outputs of ``@forward``, with their place in torch's autograd graph."""
        if self.function is not None:
            return self.function(inputs)
        with torch.no_grad():
            return self.executor.forward(inputs)[0]

    @property
    def out_spec(self) -> Spec:
        return self.captured.out_spec


class CompiledModule(nn.Module):
    """Runs a captured program in place of the model's Python.

    It shares parameters, buffers and submodules with the model, so ``parameters()``, ``state_dict()``,
    ``to()`` and any ``torch.optim`` see the model's own. It is captured at its first call, and again for each
    new signature: shapes, strides and dtypes of tensors, values of other arguments, train or eval mode and plain
    attributes (numbers, flags) of each module, which parameters require gradients, the autocast around the call.
    The 16 used last are kept.
    What a model reads elsewhere (a config object, a global) is as it was at capture.
    """

    model: nn.Module

    def __init__(
        self, model: nn.Module, make_executor: MakeExecutor, pool: Pool | None = None, codegen: str = "torch"
    ) -> None:
        if not isinstance(model, nn.Module):
            raise CaptureError(f"daggc.compile takes a torch.nn.Module, got a {type(model).__name__}")
        compiled = next((name for name, own in model.named_modules() if isinstance(own, CompiledModule)), None)
        if compiled is not None:
            raise CaptureError(f"{f'{compiled!r} of the model' if compiled else 'the model'} is compiled already")
        super().__init__()
        object.__setattr__(self, "model", model)  # not a submodule: names stay the model's own
        # Set before the tables are shared: a submodule of one of these names would be lost.
        self._pool = pool
        self._make_executor = make_executor
        self._codegen = codegen
        self._entries: OrderedDict[Any, Entry] = OrderedDict()
        self._parameters = model._parameters
        self._buffers = model._buffers
        self._modules = model._modules
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.training = model.training

    def __getattr__(self, name: str) -> Any:
        """Attributes of the model itself (``config``, say) are found here too."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModule:
        """A copy of the model, compiled for the same place, nothing captured yet."""
        return CompiledModule(copy.deepcopy(self.model, memo), self._make_executor, self._pool, self._codegen)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RunError("a compiled module cannot be pickled; pickle its .model or its state_dict()")

    def train(self, mode: bool = True) -> CompiledModule:
        self.training = mode
        self.model.train(mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = flatten((args, kwargs))
        _refuse_shared_memory(leaves, self.entry(leaves, spec))
        entry, results = self._run(leaves, spec)
        for (path, name), value in entry.captured.assigned.items():
            setattr(self.model.get_submodule(path), name, value)
        return entry.out_spec.rebuild(iter(self.store(entry, results, leaves)))

    def _run(self, leaves: Sequence[torch.Tensor], spec: Spec) -> tuple[Entry, Sequence[torch.Tensor]]:
        """Run the captured program for these arguments; another one if the model's Python now decides otherwise."""
        entry = self.entry(leaves, spec)
        try:
            return entry, entry.run(self.inputs(entry, leaves))
        except RunError:
            other = self._other_branch(entry, leaves, spec) if entry.captured.answers else entry
            if other is entry:
                raise
        return other, other.run(self.inputs(other, leaves))

    def _other_branch(self, entry: Entry, leaves: Sequence[torch.Tensor], spec: Spec) -> Entry:
        """The program of the same signature that is captured along the branch which these arguments take."""
        key = self._key(leaves, spec)  # before a capture sets attributes
        answers = decisions_of(self.model, plain_call, leaves, spec)
        if answers not in entry.branches:
            args, kwargs = spec.rebuild(iter(leaves))
            new = self._build(capture(self.model, args, kwargs), entry.wants)
            new.branches = entry.branches
            if len(entry.branches) == _CACHE_SIZE:
                warnings.warn(
                    f"the model's Python decides on numbers of its inputs, which were others in {_CACHE_SIZE} calls so "
                    "far; each such call is captured anew, which is slow: keep the numbers in tensors (torch.where), "
                    "or mark the function that reads them with @daggc.opaque",
                    stacklevel=4,
                )
                entry.branches.pop(next(iter(entry.branches)))
            entry.branches[answers] = new
        self._entries[key] = entry.branches[answers]
        return entry.branches[answers]

    def entry(self, leaves: Sequence[torch.Tensor], spec: Spec) -> Entry:
        """The captured program for these arguments, from the cache or captured now."""
        key = self._key(leaves, spec)
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        args, kwargs = spec.rebuild(iter(leaves))
        entry = self._build(capture(self.model, args, kwargs), _wants(leaves))
        entry.branches[entry.captured.answers] = entry
        self._entries[key] = entry
        if len(self._entries) > _CACHE_SIZE:
            self._entries.popitem(last=False)
        return entry

    def _key(self, leaves: Sequence[torch.Tensor], spec: Spec) -> Any:
        """What decides which program runs: a call that differs in it is captured anew."""
        return (
            str(spec.tree),
            spec.fixed,
            tuple((leaf.dtype, leaf.shape, leaf.layout, strides_of(leaf), leaf.requires_grad) for leaf in leaves),
            torch.is_grad_enabled(),
            autocast_state(),
            tuple(_settings(module) for module in self.model.modules()),
            tuple((p.dtype, p.requires_grad, strides_of(p)) for p in self.model.parameters()),
        )

    def _build(self, captured: Capture, wants: Sequence[bool]) -> Entry:
        program = replace(run(captured.program, pipeline(SIMPLIFY)), codegen=self._codegen)
        forward = program.forward
        wrt = [f"param:{name}" for name in captured.trainable]
        wrt += [port.ref for port, want in zip(forward.inputs_of("input"), wants, strict=True) if want]
        known = {port.ref for port in forward.inputs}
        wrt = [ref for ref in wrt if ref in known]
        differentiable = wrt if torch.is_grad_enabled() and has_gradient(program, wrt) else []
        function = Differentiable(program, differentiable, self._make_executor) if differentiable else None
        executor = self._make_executor(program, ()) if function is None else function.executor
        fetch = tuple(self._fetch(port, captured) for port in forward.inputs)
        give_back_after(self.model)
        return Entry(captured, program, forward.inputs, fetch, function, executor, tuple(wants))

    def _fetch(self, port: Port, captured: Capture) -> Fetch | None:
        """How to get the live tensor behind a port: looked up at each call, for it may be replaced."""
        if port.kind == "constant":
            return lambda: captured.constants[port.target]
        if port.kind not in ("param", "buffer"):
            return None
        owner_path, _, name = port.target.rpartition(".")
        owner = self.model.get_submodule(owner_path)
        table: dict[str, Any] = owner._parameters if port.kind == "param" else owner._buffers
        return lambda: table[name]

    @property
    def plan(self) -> Plan | None:
        """The plan of the signature used last; None in this process and before the first call."""
        entry = next(reversed(self._entries.values()), None)
        return getattr(entry.executor, "plan", None) if entry else None

    def lazy(self, *args: Any, **kwargs: Any) -> Thunk:
        """The model's result as a Dask collection: nothing runs until ``compute`` or ``persist``.

        Changes of buffers (batch norm's statistics) are not written back to the model, and tensors that forward
        keeps in attributes are not set.
        """
        return lazy_call(self, args, kwargs)

    def map(self, batches: Iterable[Any], *, in_flight: int | None = None) -> Generator[Any, None, None]:
        """The model's results for a stream of batches, in order: inference, several batches at a time.

        On workers the batches follow each other through the stages. A batch is read from ``batches`` when one
        before it has left, so that the stream may be endless; a result is fetched, and forgotten by its worker, as
        soon as it is there. Parameters are sent once, before the first batch; they must not change meanwhile. Each
        result is what ``compiled(*batch)`` gives under ``torch.no_grad()``, in the mode (train or eval) that the
        model is in. A model that leaves something behind for the next call (batch norm in training, attributes
        that forward sets) takes one batch after another, and so does any model in this process.

        To stop early, leave the loop or ``close()`` the generator: what is under way is cancelled.

        Args:
            batches: any iterable, such as a ``DataLoader``, of dicts (the model's keywords), tuples or lists (its
                arguments), or single arguments.
            in_flight: how many batches may be under way; by default one for each stage, and as many more as keep
                the stages busy while a result comes back.

        Raises:
            RunError: ``in_flight`` is below 1, or the compiled module has hooks. While iterating, what a batch
                raises is raised when it is its turn; the results before it are given, those after it cancelled.
            WorkerLostError: while iterating: a worker is gone.
        """
        return map_batches(self, batches, in_flight)

    def vjp(self, *args: Any, **kwargs: Any) -> tuple[Thunk, Pullback]:
        """The model's result as a thunk, and its pullback.

        ``pullback(cotangent)`` gives ``({parameter name: thunk}, (thunk of each input))`` of gradients; the
        cotangent has the structure of the result (None where there is none). With respect to all trainable
        parameters and all floating-point inputs.
        """
        return lazy_vjp(self, args, kwargs)

    def train_step(
        self,
        loss_fn: Callable[..., Any] | None,
        optimizer: torch.optim.Optimizer,
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
        execution: str = "auto",
        scaler: torch.amp.GradScaler | None = None,
    ) -> TrainStep:
        """A function that trains the model on a batch, ``loss = step(x, target)``, or on several.

        For several, gradients are accumulated: :meth:`daggc.runtime.train.TrainStep.accumulate`.

        Forward, backward and update run where the plan puts them; parameters, gradients and optimizer state
        never leave their worker. The numbers are those of eager PyTorch on the whole batch, under the autocast
        that is on at the call. Calls return at once with a lazy loss; at most two steps are under way.

        Args:
            loss_fn: ``loss_fn(model(*inputs), target)`` for ``step(*inputs, target)``. None for models that
                give their own loss (``.loss``, ``["loss"]``, a scalar, the first of a tuple). A lone dict,
                ``step(batch)``, is the model's keywords; a loss function then gets ``(output, batch)``.
            optimizer: ``torch.optim.SGD``, ``Adam`` or ``AdamW`` over the model's parameters. Its groups and
                learning rates are read at each call, so schedulers work as ever (each other momentum or
                beta is another program: ``OneCycleLR(cycle_momentum=False)``).
            microbatches: into how many parts to cut a batch (along axis 0 of every tensor as long as the
                first); the last may be smaller. Only cut if an analysis proves that the parts add up to the
                whole; otherwise the batch stays whole and ``step.explain()`` names the op that mixes samples.
            schedule: order of the parts, one of :data:`daggc.plan.schedule.SCHEDULES`; those named ``zb-...``
                make weight gradients tasks of their own. ``auto``, like ``microbatches="auto"`` and
                ``replicas="auto"``, simulates what is possible and takes the fastest that fits memory.
            max_grad_norm: clip gradients by their global norm.
            stages, pins, split_backward: as for :func:`daggc.compile`.
            replicas: of every stage, each on a device of its own; they take the microbatches in turn, of which
                there are at least as many (data parallelism). Batch statistics are each replica's own then, and
                the buffers of the first are kept.
            remat: what the backward computes again rather than keep: ``none``, ``cheap`` (no matrix products and
                the like), ``full`` (all but what enters each block), or ``auto``: as little as fits memory.
            partition: ``line`` cuts the model into segments of a line, ``list`` schedules independent parts side
                by side, ``auto`` takes what is predicted to be faster.
            force_microbatches: cut even if samples are mixed (batch norm then normalises each part).
            seed: of random ops; by default drawn from torch's generator.
            threads: torch threads inside a task; 0 leaves what the workers have.
            replan_after: so many steps after the first of a plan, :meth:`~daggc.runtime.train.TrainStep.replan` is
                called, once for each plan; None leaves that to you.
            execution: ``graph`` makes every call of a step a task of Dask's. ``lanes`` makes one task of all that a
                worker does of a step; workers then give each other activations and gradients directly. ``auto`` takes
                lanes where they are predicted to be faster. The numbers are the same.
            scaler: a ``torch.amp.GradScaler``, for steps under ``torch.autocast`` in float16. The step scales its loss,
                skips the update where a gradient is infinite or NaN, and changes the scale, as the scaler would; do not
                call the scaler's own methods for that. It has the newest scale after ``step.sync()``.

        Raises:
            RunError: the optimizer is of another class, or has parameters that are not the model's.
        """
        return train_step(
            self.model,
            loss_fn,
            optimizer,
            self._pool,
            microbatches=microbatches,
            schedule=schedule,
            max_grad_norm=max_grad_norm,
            stages=stages,
            pins=pins,
            split_backward=split_backward,
            replicas=replicas,
            remat=remat,
            partition=partition,
            force_microbatches=force_microbatches,
            seed=seed,
            threads=threads,
            replan_after=replan_after,
            codegen=self._codegen,
            execution=execution,
            scaler=scaler,
        )

    def inputs(self, entry: Entry, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors of ``@forward``'s ports: live parameters and buffers, the user's inputs, a fresh key."""
        given = iter(leaves)
        changed = {port.ref for port in entry.program.forward.outputs_of("buffer", "input")}
        tensors: list[torch.Tensor] = []
        for port, fetch in zip(entry.ports, entry.fetch, strict=True):
            if port.kind == "key":
                tensors.append(random_key())
                continue
            tensor = next(given) if fetch is None else fetch()
            # What is written to after the run, the backward sees as it was.
            tensors.append(tensor.clone() if port.ref in changed else tensor)
        return tensors

    def store(
        self, entry: Entry, results: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Leave on the model and in its arguments what a call leaves there; returns the results proper."""
        forward = entry.program.forward
        by_ref = dict(zip((port.ref for port in forward.inputs_of("input")), leaves, strict=True))
        found: dict[str, list[torch.Tensor]] = {}
        written: dict[str, torch.Tensor] = {}
        outputs = [port for port in forward.outputs if port.kind != "residual"]
        given = [*leaves, *(fetch() for fetch in entry.fetch if fetch is not None)]
        results = _apart(outputs, results, entry.captured.memory, given)
        for port, result in zip(outputs, results, strict=True):
            if port.kind == "buffer":
                with torch.no_grad():
                    self.model.get_buffer(port.target).copy_(result)
                written[port.value.name] = self.model.get_buffer(port.target)
            elif port.kind == "input":
                written[port.value.name] = by_ref[port.ref].copy_(result)
            else:
                found.setdefault(port.kind, []).append(result)
        kept = iter(found.get("attribute", ()))
        for (path, name), spec in entry.captured.kept.items():
            setattr(self.model.get_submodule(path), name, spec.rebuild(kept))
        memory = entry.captured.memory
        proper = zip(forward.outputs_of("output"), found.get("output", ()), memory, strict=False)
        return [written.get(port.value.name, result) if group < 0 else result for port, result, group in proper]


def _apart(
    outputs: Sequence[Port], results: Sequence[torch.Tensor], memory: Sequence[int], given: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Results that share memory only where eager's do: ``x.clone()`` is the same value as x, but another tensor.

    Args:
        memory: of outputs and attributes, in the order of their ports; see :class:`Capture`.
        given: the inputs of the program.
    """
    groups = {tensor.untyped_storage().data_ptr(): -1 for tensor in given if tensor.numel()}
    order = [place for kind in ("output", "attribute") for place, port in enumerate(outputs) if port.kind == kind]
    apart = list(results)
    for place, group in zip(order, memory, strict=True):
        result = results[place]
        if result.numel() and groups.setdefault(result.untyped_storage().data_ptr(), group) != group:
            apart[place] = result.clone()
    return apart


def _refuse_shared_memory(leaves: Sequence[torch.Tensor], entry: Entry) -> None:
    """A write to an argument or buffer is seen by no other: raises RunError if eager's would be."""
    forward = entry.program.forward
    refs = {port.ref for port in forward.outputs_of("input", "buffer")}
    if not refs:
        return
    given = iter(leaves)
    storages: dict[int, list[Port]] = {}
    for port, fetch in zip(entry.ports, entry.fetch, strict=True):
        tensor = fetch() if fetch is not None else None if port.kind == "key" else next(given)
        if tensor is not None and tensor.numel():
            storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(port)
    for ports in storages.values():
        if any(port.kind == "input" for port in ports) and len(ports) > 1 and any(port.ref in refs for port in ports):
            names = " and ".join(f"{port.kind} {port.target!r}" for port in ports)
            raise RunError(f"forward writes to one of {names}, which share memory; clone one of them")


def _wants(leaves: Sequence[torch.Tensor]) -> tuple[bool, ...]:
    return tuple(leaf.requires_grad and torch.is_grad_enabled() for leaf in leaves)


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """What of a module's own, beside tensors, decides what its forward does: plain attributes and hooks."""
    plain = ((name, type(x), x) for name, x in vars(module).items() if type(x) in _PLAIN and is_plain(x))
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return (*plain, *(id(hook) for table in hooks for hook in table.values()))


_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), tuple, torch.Size, torch.dtype, torch.device})


def random_key() -> torch.Tensor:
    """A key for random ops, drawn from torch's generator: ``torch.manual_seed`` makes runs repeatable."""
    return torch.randint(2**62, (2,), dtype=torch.int64)
