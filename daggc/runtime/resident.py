"""Where the state of a training lives: in stores on workers, or in one in this process."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from distributed import Future

from daggc.backend.dask_graph import Emission, Found, Resident, Source, add_collection, add_data, emit
from daggc.backend.local import run_graph
from daggc.ir.graph import Program
from daggc.runtime import store
from daggc.runtime.dask_executor import merged, new_token, opaque_functions, program_key
from daggc.runtime.pool import Pool
from daggc.runtime.worker import Context, Record, run_task, run_update, take_records

RESIDENT = ("param", "buffer", "constant", "state")
Tensors = Mapping[str, torch.Tensor]


class Pending(Protocol):
    """A step under way."""

    def outputs(self) -> dict[str, torch.Tensor]:
        """Wait for the step and give its ``output`` values by target; raises what the step raised."""
        ...


class Home(Protocol):
    """Holds a training's state and runs its steps, in the order they are submitted."""

    version: int

    def load(self, program: Program, tensors: Tensors, version: int) -> None:
        """Replace the state: every resident input of the program's ``@step``, by ref."""
        ...

    def submit(self, program: Program, inputs: Tensors) -> Pending:
        """Begin a step that makes the next version. ``inputs``: tensors of the other input ports, by ref."""
        ...

    def snapshot(self) -> dict[str, torch.Tensor]:
        """The newest state, after all steps submitted; on the CPU."""
        ...

    def settle(self) -> None:
        """Wait for all steps submitted."""
        ...

    def records(self) -> dict[str, list[Record]]:
        """When tasks ran since the last call, by device."""
        ...

    def close(self) -> None:
        """Drop the state."""
        ...


class LocalHome:
    """State in this process; a step runs when it is submitted."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.version = 0
        self._name = f"local-{uuid.uuid4().hex}"

    def load(self, program: Program, tensors: Tensors, version: int) -> None:
        store.put(self._name, version, tensors)
        self.version = version

    def submit(self, program: Program, inputs: Tensors) -> Pending:
        graph = program["step"]
        state = store.get(self._name)
        outputs: dict[str, torch.Tensor] = {}

        def compute() -> dict[str, torch.Tensor]:
            tensors = [
                state.read(port.ref, self.version) if port.kind in RESIDENT else inputs[port.ref]
                for port in graph.inputs
            ]
            results = run_graph(program, graph, tensors, self.device)
            named = list(zip(graph.outputs, results, strict=True))
            outputs.update((port.target, value) for port, value in named if port.kind == "output")
            return {port.ref: value for port, value in named if port.kind != "output"}

        state.update(self.version, compute)
        self.version += 1
        return _Done(outputs)

    def snapshot(self) -> dict[str, torch.Tensor]:
        return store.snapshot(self._name, self.version)

    def settle(self) -> None:
        """Nothing is under way."""

    def records(self) -> dict[str, list[Record]]:
        return {}

    def close(self) -> None:
        store.drop(self._name)


class _Done:
    def __init__(self, outputs: dict[str, torch.Tensor]) -> None:
        self._outputs = outputs

    def outputs(self) -> dict[str, torch.Tensor]:
        return self._outputs


_AHEAD = 2  # steps submitted before the first of them has ended
_CUT = 16  # steps after which a submission depends on nothing: Dask keeps what a task depends on, and so on


class WorkerHome:
    """State in stores on workers: each device's worker has what the plan puts there.

    Steps follow each other through their update tasks. Dask remembers a task's dependencies for as long as the
    task lives, so an unbroken chain of steps would grow for ever: every 16 steps it is waited for, and cut.
    """

    def __init__(self, pool: Pool, threads: int = 0) -> None:
        self.pool = pool
        self.version = 0
        self.threads = threads
        self._name = f"train-{uuid.uuid4().hex}"
        self._devices: dict[str, str] = {}  # ref -> device of every resident tensor
        self._shipped: dict[int, str] = {}  # id of a program -> its key; programs are kept by their builder
        self._after: dict[str, Found] = {}
        self._pending: list[_Submitted] = []

    def load(self, program: Program, tensors: Tensors, version: int) -> None:
        self.settle()
        self._after = {}
        homes = {port.ref: str(port.value.type.device) for port in program["step"].inputs_of(*RESIDENT)}
        self._devices = homes
        futures: list[Future] = []
        for device in self.pool.addresses:
            own = {ref: tensors[ref].detach() for ref, home in homes.items() if home == device}
            futures.append(self.pool.run_on(device, store.put, self._name, version, self.pool.scatter(own, device)))
        self.pool.gather(futures)
        self.version = version

    def submit(self, program: Program, inputs: Tensors) -> Pending:
        graph = program["step"]
        while len(self._pending) >= _AHEAD:
            self._pending[0].outputs()
        if self.version % _CUT == 0:
            self.settle()
            self._after = {}
        key = self._ship(program)
        token = new_token()
        data = Emission()
        sources: dict[str, Source] = {}
        for port in graph.inputs:
            if port.kind in RESIDENT:
                sources[port.ref] = Resident(port.ref)
            else:
                name = f"daggc.in-{token}-{len(sources)}"
                sources[port.ref] = add_data(data, name, inputs[port.ref].detach(), str(port.value.type.device))
        context = {device: Context(self._name, self.version, self.threads) for device in self.pool.addresses}
        emission = merged(
            emit(graph, key, token, sources, run_task, context=context, update=run_update, after=self._after), data
        )
        wanted = add_collection(emission, graph, ("output",), token)
        collectors = sorted({found.key for found in wanted.values()})
        updates = [found.key for found in emission.updates.values()]
        futures = self.pool.submit(emission, [*collectors, *updates])
        self._after = dict(emission.updates)
        self.version += 1
        step = _Submitted(self, dict(zip(collectors, futures, strict=False)), futures[len(collectors) :], wanted)
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

    def settle(self) -> None:
        for step in list(self._pending):
            step.outputs()

    def snapshot(self) -> dict[str, torch.Tensor]:
        self.settle()
        futures = [self.pool.run_on(device, store.snapshot, self._name, self.version) for device in self.pool.addresses]
        tensors: dict[str, torch.Tensor] = {}
        for part in self.pool.gather(futures):
            tensors |= part
        return tensors

    def records(self) -> dict[str, list[Record]]:
        names = {address: device for device, address in self.pool.addresses.items()}
        found: dict[str, Any] = self.pool.client.run(take_records, workers=list(names))
        return {names[address]: records for address, records in found.items()}

    def close(self) -> None:
        if self.pool.client.status == "running":
            self.pool.client.run(store.drop, self._name)
            for key in self._shipped.values():
                self.pool.forget(key)
        self._shipped = {}


class _Submitted:
    """A step on the workers. Its update tasks' futures are kept until its results have been fetched."""

    def __init__(
        self, home: WorkerHome, futures: dict[str, Future], updates: list[Future], wanted: Mapping[str, Found]
    ) -> None:
        self._home = home
        self._futures = futures
        self._updates = updates
        self._wanted = wanted
        self._results: dict[str, torch.Tensor] | None = None

    def outputs(self) -> dict[str, torch.Tensor]:
        if self._results is None:
            gathered = self._home.pool.gather([*self._futures.values(), *self._updates])
            by_key = dict(zip(self._futures, gathered, strict=False))
            self._results = {
                ref.removeprefix("output:"): by_key[found.key][found.index] for ref, found in self._wanted.items()
            }
            self._futures, self._updates = {}, []
            self._home.finished(self)
        return self._results
