"""A stream of batches through a compiled module, several of them under way: ``CompiledModule.map``."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch

from daggc.backend.serializers import copied
from daggc.errors import RunError
from daggc.frontend.pytree import Spec, flatten
from daggc.plan.plan import Plan
from daggc.runtime.batch import arguments_of
from daggc.runtime.dask_executor import DaskExecutor, Inputs, Run

if TYPE_CHECKING:  # the module hands itself over; nothing of it is needed here at run time
    from daggc.runtime.module import CompiledModule, Entry

_ROUND_TRIP = 0.01  # seconds from a result on its worker to the first task of the batch that takes its place
_MOST = 16  # batches under way, by default


def map_batches(
    module: CompiledModule, batches: Iterable[Any], in_flight: int | None = None
) -> Generator[Any, None, None]:
    """See :meth:`CompiledModule.map`."""
    if in_flight is not None and in_flight < 1:
        raise RunError(f"in_flight is at least 1, got {in_flight}")
    if module._forward_hooks or module._forward_pre_hooks:
        raise RunError("map does not run hooks of the compiled module; register them on the model, or call it")
    return _stream(module, batches, in_flight)


def _stream(module: CompiledModule, batches: Iterable[Any], in_flight: int | None) -> Generator[Any, None, None]:
    reading = iter(batches)
    held: WeakKeyDictionary[DaskExecutor, Inputs] = WeakKeyDictionary()
    pending: deque[_Pending] = deque()
    try:
        more = True
        while more:
            more = False
            try:
                batch = next(reading)
                more = True
                pending.append(_begin(module, batch, held))
            except StopIteration:
                pass
            except Exception as wrong:  # the batches before it come first
                pending.append(_Failed(wrong))
            # What runs when it is its turn, runs before anything after it is read.
            while pending and (not more or pending[-1].room is None or len(pending) >= (in_flight or pending[-1].room)):
                yield pending.popleft().result()
    finally:
        for run in pending:
            run.cancel()


class _Pending(Protocol):
    """The result of one batch."""

    @property
    def room(self) -> int | None:
        """How many batches may be under way with it; None: only this one, and it runs when it is asked for."""
        ...

    def result(self) -> Any:
        """Wait for the result. Raises what the batch raises, and leaves nothing under way then."""
        ...

    def cancel(self) -> None:
        """Give it up."""
        ...


@dataclass(frozen=True)
class _Failed:
    """A batch that could not be read or submitted."""

    wrong: Exception
    room: int | None = None

    def result(self) -> Any:
        raise self.wrong

    def cancel(self) -> None:
        """Nothing is under way."""


@dataclass(frozen=True)
class _Call:
    """A batch that is an ordinary call, when it is its turn."""

    module: CompiledModule
    leaves: list[torch.Tensor]
    spec: Spec
    room: int | None = None

    def result(self) -> Any:
        args, kwargs = self.spec.rebuild(iter(self.leaves))
        with torch.no_grad():
            return self.module.forward(*args, **kwargs)

    def cancel(self) -> None:
        """Nothing is under way."""


@dataclass(frozen=True)
class _Remote:
    """A batch under way on workers."""

    entry: Entry
    run: Run
    call: _Call
    room: int | None

    def result(self) -> Any:
        try:
            results = self.run.outputs()
        except RunError:
            if not self.entry.captured.answers:
                raise
            return self.call.result()  # the model's Python may decide otherwise on this batch
        return self.entry.out_spec.rebuild(iter(self.call.module.store(self.entry, results, self.call.leaves)))

    def cancel(self) -> None:
        self.run.cancel()


def _begin(module: CompiledModule, batch: Any, held: WeakKeyDictionary[DaskExecutor, Inputs]) -> _Pending:
    """Submit a batch, if others may be under way beside it."""
    args, kwargs = arguments_of(batch)
    leaves, spec = flatten((args, kwargs))
    with torch.no_grad():
        entry = module.entry(leaves, spec)
        executor = entry.executor
        if not isinstance(executor, DaskExecutor) or _leaves_something_behind(entry):
            return _Call(module, leaves, spec)
        inputs = module.inputs(entry, leaves)
        if executor not in held:
            held[executor] = executor.place(inputs)
        if entry.captured.answers:  # it may have to run again, and its owner may fill the same memory anew
            leaves = [copied(leaf) for leaf in leaves]
        run = executor.begin(inputs, held[executor])
    return _Remote(entry, run, _Call(module, leaves, spec), _room(executor.plan))


def _leaves_something_behind(entry: Entry) -> bool:
    """Whether a call changes what the next one reads: buffers, its arguments, attributes of modules."""
    captured = entry.captured
    return bool(captured.assigned or captured.kept or entry.program.forward.outputs_of("buffer", "input"))


def _room(plan: Plan) -> int:
    """Batches under way that keep all stages busy: one in each, and those that a round trip to here lasts.

    More gain nothing: BERT-base on two workers streams as fast with 2 as with 6.
    """
    return min(_MOST, len(plan.stages) + math.ceil(_ROUND_TRIP / max(plan.slowest, 1e-6)))
