"""Where the state of a training lives: in stores on workers, or in one in this process."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from distributed import Future
from distributed.comm.core import CommClosedError
from torch.autograd.graph import increment_version

from daggc.backend.dask_graph import Emission, Found, Resident, Source, add_collection, emit
from daggc.backend.lanes import emit_lanes
from daggc.backend.local import run_calls
from daggc.backend.serializers import take_sent
from daggc.errors import DaggcError, RunError, WorkerLostError
from daggc.frontend.dtypes import ir_type
from daggc.ir.graph import Program
from daggc.plan.outline import RESIDENT
from daggc.runtime import store
from daggc.runtime.dask_executor import merged, new_token, opaque_functions, program_key
from daggc.runtime.devices import device_of
from daggc.runtime.lanes import run_lane
from daggc.runtime.memory import count_again, start_counting
from daggc.runtime.pool import Pool
from daggc.runtime.shipping import add_inputs
from daggc.runtime.worker import Context, Record, put_state, read_state, run_task, run_update, take_records

_PIECE = 1 << 26  # bytes of state that go to or from a worker at a time: so much it holds twice

Tensors = Mapping[str, torch.Tensor]


class Pending(Protocol):
    """A step under way."""

    def outputs(self) -> dict[str, torch.Tensor]:
        """Wait for the step and give its ``output`` values by target; raises what the step raised."""
        ...


class Home(Protocol):
    """Holds a training's state and runs its steps, in the order they are submitted.

    Attributes:
        version: the steps that the state has seen once all that are under way have ended. A step that fails
            before its updates changes nothing, and the version is again what it was before it.
    """

    version: int

    def load(self, program: Program, tensors: Tensors, version: int) -> None:
        """Replace the state: every resident input of the program's ``@step``, by ref."""
        ...

    def submit(self, program: Program, inputs: Tensors, lanes: bool = False) -> Pending:
        """Begin a step that makes the next version.

        Args:
            inputs: tensors of the other input ports, by ref.
            lanes: on workers, run the part of each device as one task.
        """
        ...

    def snapshot(self) -> dict[str, torch.Tensor]:
        """The newest state, after all steps submitted; on the CPU."""
        ...

    def settle(self) -> None:
        """Wait for all steps submitted."""
        ...

    def discard(self) -> None:
        """Give up the steps under way and what went wrong before; the state is replaced next."""
        ...

    def records(self) -> dict[str, list[Record]]:
        """When tasks ran since the last call, by device."""
        ...

    def memory(self) -> dict[str, float]:
        """By device: bytes its process held at most, beyond what it held before the first state was put there.

        Counted since the last call, or since then.
        """
        ...

    def moved(self) -> float | None:
        """Bytes of tensors that a step sent from one worker to others, since the last call; None without steps."""
        ...

    def close(self) -> None:
        """Drop the state."""
        ...


class LocalHome:
    """State in this process: the model's and the optimizer's own tensors, which a step that is submitted writes to.

    What is changed in them between steps is seen by the next one. A step that fails before its updates changes
    nothing; one that fails during them leaves the state broken, and every use raises why, until it is loaded again.
    """

    def __init__(self) -> None:
        self.version = 0
        self._tensors: dict[str, torch.Tensor] = {}
        self._memory: set[int] = set()  # where the tensors are
        self._device = torch.device("cpu")
        self._broken: DaggcError | None = None

    def load(self, program: Program, tensors: Tensors, version: int) -> None:
        """See :class:`Home`. Raises RunError for a tensor that is not of the type that the program has."""
        for port in program["step"].inputs_of(*RESIDENT):
            wanted, got = port.value.type.with_(device=None), ir_type(tensors[port.ref])
            if got != wanted:
                raise RunError(f"the step was compiled for {port.ref!r} of type {wanted}, now it is {got}")
        self._tensors = {ref: tensor.detach() for ref, tensor in tensors.items()}
        self._memory = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
        self._device = device_of(tensors.values())
        self.version, self._broken = version, None

    def submit(self, program: Program, inputs: Tensors, lanes: bool = False) -> Pending:
        graph = program["step"]
        own = self.snapshot()
        resident = {port.value.name: port.ref for port in graph.inputs_of(*RESIDENT)}
        values = {
            port.value.name: own[port.ref] if port.kind in RESIDENT else inputs[port.ref].detach()
            for port in graph.inputs
        }
        values.update(
            (name, tensor.to(self._device)) for name, tensor in values.items() if tensor.device != self._device
        )
        wanted = {port.value.name for port in graph.outputs}
        # What fails before the updates changes nothing.
        updates = [node for node in graph.nodes if node.attrs.get("phase") == "update"]
        before = [node for node in graph.nodes if node.attrs.get("phase") != "update"]
        read_later = {value.name for node in updates for value in node.inputs}
        run_calls(program, before, values, wanted | read_later, self._device)
        results = {
            port.ref: values[name]
            for port in graph.outputs
            if (name := port.value.name) in values and resident.get(name) != port.ref
        }
        results |= _inside(self._memory, results)
        values |= _inside(self._memory, {name: values[name] for name in read_later if name not in resident})
        try:
            with torch.no_grad():
                _write(own, results)  # new values of buffers, as eager does before parameters change
                run_calls(program, updates, values, wanted, self._device, resident)
                _write(own, {p.ref: values[p.value.name] for p in graph.outputs if p.ref not in results})
                # fused kernels do not tell autograd that they write: a graph of the user's that kept a parameter
                increment_version([own[port.ref] for port in graph.outputs_of("param")])
        except BaseException as wrong:
            self._broken = RunError(
                f"an update failed and left the parameters between two steps; load a checkpoint to go on ({wrong})"
            )
            raise
        self.version += 1
        return _Done({port.target: results[port.ref] for port in graph.outputs_of("output")})

    def snapshot(self) -> dict[str, torch.Tensor]:
        """The state itself, no copy of it. Raises RunError if an update failed."""
        if self._broken is not None:
            raise RunError(str(self._broken))
        return self._tensors

    def settle(self) -> None:
        """Nothing is under way."""

    def discard(self) -> None:
        self._broken = None

    def records(self) -> dict[str, list[Record]]:
        return {}

    def memory(self) -> dict[str, float]:
        return {}

    def moved(self) -> float | None:
        return None

    def close(self) -> None:
        self._tensors = {}


def _pieces(refs: Sequence[str], tensors: Tensors) -> list[list[str]]:
    """The tensors of a device in groups; at least one, which may be empty."""
    found: list[list[str]] = [[]]
    room = _PIECE
    for ref in refs:
        nbytes = tensors[ref].nbytes
        if nbytes > room and found[-1]:
            found.append([])
            room = _PIECE
        found[-1].append(ref)
        room -= nbytes
    return found


def _inside(memory: set[int], found: Tensors) -> dict[str, torch.Tensor]:
    """Copies of the tensors that lie in the memory of the state, which is about to be written to."""
    return {name: tensor.clone() for name, tensor in found.items() if tensor.untyped_storage().data_ptr() in memory}


def _write(state: Tensors, new: Tensors) -> None:
    """Put new values where the old are, unless they were computed there."""
    for ref, tensor in new.items():
        if ref in state and tensor.data_ptr() != state[ref].data_ptr():
            state[ref].copy_(tensor)


class _Done:
    def __init__(self, outputs: dict[str, torch.Tensor]) -> None:
        self._outputs = outputs

    def outputs(self) -> dict[str, torch.Tensor]:
        return self._outputs


AHEAD = 2  # steps submitted before the first of them has ended
_CUT = 16  # steps after which a submission depends on nothing: Dask keeps what a task depends on, and so on


class WorkerHome:
    """State in stores on workers: each device's worker has what the plan puts there.

    Steps follow each other through their update tasks. Dask remembers a task's dependencies for as long as the
    task lives, so an unbroken chain of steps would grow for ever: every 16 steps it is waited for, and cut.

    When a step fails, those submitted after it are given up too. Its updates wait for everything else of the step,
    so usually the state is what it was before the step, and training can go on; if not, the state is broken, and
    every use raises why, until it is loaded again.
    """

    def __init__(self, pool: Pool, threads: int = 0) -> None:
        self.pool = pool
        self.version = 0
        self.threads = threads
        self._name = f"train-{uuid.uuid4().hex}"
        self._broken: DaggcError | None = None
        self._devices: dict[str, str] = {}  # ref -> device of every resident tensor
        self._pieces: dict[str, list[list[str]]] = {}  # by device
        self._shipped: dict[int, str] = {}  # id of a program -> its key; programs are kept by their builder
        self._after: dict[str, Found] = {}
        self._chained = False  # whether the step submitted last depends on the one before it
        self._pending: list[_Submitted] = []
        self._before: dict[str, float] = {}  # device -> bytes that its process held before the first state came
        self._counted = 0  # the version up to which what was sent is known
        self._sent = 0.0  # since then, but for what the last count has
        weakref.finalize(self, abandon, pool, self._name, self._shipped)

    def load(self, program: Program, tensors: Tensors, version: int) -> None:
        self.settle()
        self._check()
        homes = {port.ref: str(port.value.type.device) for port in program["step"].inputs_of(*RESIDENT)}
        self._devices = homes
        if not self._before:
            held = self.pool.gather([self.pool.run_on(device, start_counting) for device in self.pool.addresses])
            self._before = dict(zip(self.pool.addresses, held, strict=True))
        own = {device: [ref for ref, home in homes.items() if home == device] for device in self.pool.addresses}
        self._pieces = {device: _pieces(refs, tensors) for device, refs in own.items()}
        for number, part in enumerate(self._parts()):
            futures: list[Future] = []
            for device, refs in part.items():
                sent = self.pool.scatter({ref: tensors[ref].detach() for ref in refs}, device)
                futures.append(self.pool.run_on(device, put_state, self._name, version, sent, number > 0))
            self.pool.gather(futures)
        self.version = self._counted = version
        self._sent = 0.0
        self._newly_sent()

    def _parts(self) -> Iterator[dict[str, list[str]]]:
        """What of the state goes to or from the workers at a time: of each a piece."""
        for number in range(max(map(len, self._pieces.values()), default=0)):
            yield {device: own[number] for device, own in self._pieces.items() if number < len(own)}

    def _check(self) -> None:
        if self._broken is not None:
            raise type(self._broken)(str(self._broken))

    def submit(self, program: Program, inputs: Tensors, lanes: bool = False) -> Pending:
        graph = program["step"]
        self._check()
        key = self._ship(program)
        token = new_token()
        data = Emission()
        sources: dict[str, Source] = {port.ref: Resident(port.ref) for port in graph.inputs_of(*RESIDENT)}
        given = {port.ref: port for port in graph.inputs if port.ref not in sources}
        keys = {ref: f"daggc.in-{token}-{number}" for number, ref in enumerate(given)}
        sources |= {ref: Found(name) for ref, name in keys.items()}
        # The batch travels while the steps before it run.
        sent = add_inputs(
            data, self.pool, [(keys[ref], inputs[ref], str(port.value.type.device)) for ref, port in given.items()]
        )
        try:
            while len(self._pending) >= AHEAD:
                self._pending[0].outputs()
            if self._chained and self.version % _CUT == 0:
                self.settle()
        except BaseException:
            self.pool.cancel(sent)
            raise
        context = {device: Context(self._name, self.version, self.threads) for device in self.pool.addresses}
        if lanes:
            step = emit_lanes(
                graph, key, token, sources, run_lane, context=context, addresses=self.pool.addresses
            )  # fmt: skip
            emission = merged(step, data)
            wanted = emission.outputs
        else:
            step = emit(
                graph, key, token, sources, run_task, context=context, update=run_update, read=read_state,
                after=self._after,
            )  # fmt: skip
            emission = merged(step, data)
            wanted = add_collection(emission, graph, ("output",), token)
        collectors = sorted({found.key for found in wanted.values()})
        updates = [found.key for found in emission.updates.values() if found.key not in collectors]
        futures = self.pool.submit(emission, [*collectors, *updates])
        del sent  # the workers have it for as long as tasks will read it
        self._after = dict(emission.updates)
        self._chained = not lanes
        self.version += 1
        step = _Submitted(
            self, self.version - 1, dict(zip(collectors, futures, strict=False)), futures[len(collectors) :], wanted
        )
        self._pending.append(step)
        return step

    def _ship(self, program: Program) -> str:
        if id(program) not in self._shipped:
            key = program_key(program)
            self.pool.ship(key, program, opaque_functions(program))
            self._shipped[id(program)] = key
        return self._shipped[id(program)]

    def finished(self, step: _Submitted) -> None:
        """A step has ended, and with it all before it."""
        if step in self._pending:
            del self._pending[: self._pending.index(step) + 1]
        if not self._pending:
            self._after = {}  # nothing to wait for, and its keys are released

    def failed(self, step: _Submitted, wrong: DaggcError) -> None:
        """A step has failed: give up those after it, and find out what it left of the state."""
        followers = self._pending[self._pending.index(step) + 1 :] if step in self._pending else []
        self._give_up()
        for follower in followers:
            follower.fail(RunError(f"not run: an earlier step failed: {wrong}"))
        if isinstance(wrong, WorkerLostError) or self.pool.client.status != "running":
            self._broken = wrong
            return
        try:
            found = {
                device: self.pool.gather([self.pool.run_on(device, store.status, self._name)], timeout=30)[0]
                for device in sorted(set(self._devices.values()))
            }
        except DaggcError as unknown:
            self._broken = unknown
            return
        torn = [device for device, version in found.items() if version != step.version]
        if torn:
            self._broken = RunError(
                f"an update failed and left the state on {', '.join(torn)} between two steps; "
                f"load a checkpoint to go on ({wrong})"
            )
        else:
            self.version = step.version

    def _give_up(self) -> None:
        self.pool.cancel([future for step in self._pending for future in step.futures])
        self._pending, self._after = [], {}

    def discard(self) -> None:
        for step in self._pending:
            step.fail(RunError("not waited for: another state was loaded"))
        self._give_up()
        self._broken = None

    def settle(self, before: _Submitted | None = None) -> None:
        for step in list(self._pending):
            if step is before:
                return
            step.outputs()

    def snapshot(self) -> dict[str, torch.Tensor]:
        self.settle()
        self._check()
        self._sent += self._newly_sent()
        tensors: dict[str, torch.Tensor] = {}
        for part in self._parts():
            futures = [
                self.pool.run_on(device, store.snapshot, self._name, self.version, refs)
                for device, refs in part.items()
                if refs
            ]
            for found in self.pool.gather(futures):
                tensors |= found
        self._newly_sent()  # the state, which no step sends
        return tensors

    def records(self) -> dict[str, list[Record]]:
        return self._everywhere(take_records)

    def memory(self) -> dict[str, float]:
        return {device: most - self._before.get(device, 0.0) for device, most in self._everywhere(count_again).items()}

    def moved(self) -> float | None:
        steps, self._counted = self.version - self._counted, self.version
        sent, self._sent = self._sent + self._newly_sent(), 0.0
        return sent / steps if steps > 0 else None

    def _newly_sent(self) -> float:
        return sum(self.pool.gather([self.pool.run_on(device, take_sent) for device in self.pool.addresses]))

    def _everywhere(self, function: Callable[[], Any]) -> dict[str, Any]:
        """What a function gives on each worker, by device."""
        names = {address: device for device, address in self.pool.addresses.items()}
        found: dict[str, Any] = self.pool.client.run(function, workers=list(names))
        return {names[address]: result for address, result in found.items()}

    def close(self) -> None:
        self.discard()
        if self.pool.client.status == "running":
            self.pool.client.run(store.drop, self._name)
            for key in self._shipped.values():
                self.pool.forget(key)
        self._shipped.clear()


class _Submitted:
    """A step on the workers, from one version to the next. Its futures are kept until its results were fetched."""

    def __init__(
        self,
        home: WorkerHome,
        version: int,
        collectors: dict[str, Future],
        updates: list[Future],
        wanted: Mapping[str, Found],
    ) -> None:
        self.version = version
        self._home = home
        self._collectors = collectors
        self._updates = updates
        self._wanted = wanted
        self._results: dict[str, torch.Tensor] = {}
        self._wrong: DaggcError | None = None

    @property
    def futures(self) -> list[Future]:
        return [*self._collectors.values(), *self._updates]

    def outputs(self) -> dict[str, torch.Tensor]:
        if self._wrong is not None:
            raise type(self._wrong)(str(self._wrong)) from self._wrong
        if self.futures:
            try:
                self._home.settle(before=self)
                gathered = self._home.pool.gather(self.futures)
            except DaggcError as wrong:
                if self._wrong is None:  # else an earlier step failed, and took this one with it
                    self._home.failed(self, wrong)
                    self.fail(wrong)
                raise
            by_key = dict(zip(self._collectors, gathered, strict=False))
            self._results = {
                ref.removeprefix("output:"): by_key[found.key][found.index] for ref, found in self._wanted.items()
            }
            self._collectors, self._updates = {}, []
            self._home.finished(self)
        return self._results

    def fail(self, wrong: DaggcError) -> None:
        """Waiting for it raises this from now on."""
        self._wrong = wrong
        self._collectors, self._updates = {}, []


def abandon(pool: Pool, name: str, shipped: Mapping[int, str]) -> None:
    """Drop a store and programs on all workers without waiting; the garbage collector calls it, on any thread."""
    if pool.client.status == "running":
        pool.client.loop.add_callback(_drop, pool.client, name)
        for key in shipped.values():
            pool.forget(key)


async def _drop(client: Any, name: str) -> None:
    with suppress(CommClosedError, OSError, TimeoutError, ValueError):  # closed meanwhile: all is dropped
        await client._run(store.drop, name, on_error="ignore")
