"""Runs a program's forward and backward as Dask tasks, for ``compile``, ``lazy`` and ``vjp``.

The client has the parameters; those that changed since the last run are shipped to the worker that uses them
(:mod:`daggc.runtime.shipping`). Residuals stay in the results of forward tasks, on their workers.
"""

from __future__ import annotations

import hashlib
import uuid
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from distributed import Future

from daggc.backend.dask_graph import Emission, Found, Source, add_collection, add_data, emit
from daggc.errors import WorkerLostError
from daggc.frontend.opaque import registered
from daggc.ir.graph import Program
from daggc.ir.printer import print_program
from daggc.plan.device import cluster_of, cpu_device
from daggc.plan.plan import Plan, plan_model
from daggc.runtime.devices import device_of
from daggc.runtime.executor import Tensors
from daggc.runtime.pool import Pool
from daggc.runtime.shipping import Copies, Shipments, add_inputs
from daggc.runtime.worker import know, run_task, unknow

RESULTS = ("output", "buffer", "grad", "input", "attribute")  # kinds of outputs that come back from the workers
HELD = ("param", "buffer", "constant")  # inputs that are the model's: shipped when they change


def program_key(program: Program) -> str:
    """The name under which workers know a program, for one executor: its hash and a token.

    Equal programs of two executors get different names, so that one may forget its own while the other runs.
    """
    return f"{hashlib.sha256(print_program(program).encode()).hexdigest()[:32]}-{new_token()[:8]}"


def opaque_functions(program: Program) -> dict[str, Any]:
    """The Python functions a program calls, to be shipped with it."""
    targets = {
        str(node.attrs["target"])
        for graph in program.graphs.values()
        for node in graph.walk()
        if node.op == "python.call"
    }
    return registered(sorted(targets))


def new_token() -> str:
    """What makes the keys of one run distinct from those of every other."""
    return uuid.uuid4().hex


@dataclass
class Inputs:
    """Where the inputs of a run are.

    Attributes:
        sources: by ref.
        futures: keep them for as long as a graph that reads the inputs may be submitted.
    """

    sources: dict[str, Source] = field(default_factory=dict)
    futures: list[Future] = field(default_factory=list)


@dataclass
class Residuals:
    """What a forward run left on the workers; alive as long as this object."""

    sources: dict[str, Source]
    futures: list[Future]


class Run:
    """A forward run under way on workers; its results are fetched as soon as they are there."""

    def __init__(self, pool: Pool, futures: Sequence[Future], wanted: Sequence[Found], device: torch.device) -> None:
        self._pool, self._futures, self._wanted, self._device = pool, futures, wanted, device
        self._fetching = pool.fetch(futures)
        self._fetching.add_done_callback(lambda _: [future.release() for future in futures])

    def outputs(self) -> Tensors:
        """Wait for the results. Raises what the run raised, or WorkerLostError; nothing goes on then."""
        try:
            fetched = self._pool.wait(self._fetching, self._futures)
        except BaseException:
            self.cancel()  # a traceback may hold the futures
            raise
        results = dict(zip((str(future.key) for future in self._futures), fetched, strict=True))
        return tuple(_of(results, found).to(self._device) for found in self._wanted)

    def cancel(self) -> None:
        """Stop what has not begun, and forget the rest; the fetching ends with its futures."""
        self._pool.cancel(self._futures)


class DaskExecutor:
    """Plans a program for a pool of workers, or for this process's Dask scheduler, and runs it there."""

    def __init__(
        self,
        primal: Program,
        wrt: Sequence[str] | None,
        pool: Pool | None,
        shipments: Shipments | None = None,
        **options: Any,
    ) -> None:
        """``shipments``: of the model's tensors, shared by the executors of its programs."""
        cluster = pool.cluster if pool else cluster_of([cpu_device(0)])
        self._inference = wrt is not None and not wrt
        self.plan: Plan = plan_model(primal, cluster, wrt=wrt, training=not self._inference, **options)
        self.program = self.plan.program
        self.pool = pool
        self.key = program_key(self.program)
        self._shipments = shipments or Shipments()
        self._copies = Copies()
        if pool is None:
            know(self.key, self.program)
            weakref.finalize(self, unknow, self.key)
        else:
            pool.ship(self.key, self.program, opaque_functions(self.program))
            weakref.finalize(self, pool.forget, self.key)

    def forward(self, inputs: Tensors) -> tuple[Tensors, Residuals]:
        token = new_token()
        emission, given = self.forward_tasks(inputs, token)
        # The backward reads what calls made, and inputs.
        kept = () if self._inference else [key for key in emission.tasks if key in emission.calls or _is_input(key)]
        run, residuals = self._submit(emission, token, kept, device_of(inputs))
        try:
            return run.outputs(), Residuals(given.sources | emission.outputs, [*residuals, *given.futures])
        except BaseException:
            self._pool.cancel(residuals)
            raise

    def begin(self, inputs: Tensors, held: Inputs) -> Run:
        """Begin a forward run; ``held``: where the model's own tensors are, by :meth:`place`."""
        token = new_token()
        emission, _ = self.forward_tasks(inputs, token, held)
        return self._submit(emission, token, (), device_of(inputs))[0]

    def _submit(
        self, emission: Emission, token: str, kept: Sequence[str], device: torch.device
    ) -> tuple[Run, list[Future]]:
        """Submit a forward run; the futures of what is kept of it are given too."""
        wanted = add_collection(emission, self.program.forward, RESULTS, token)
        collectors = sorted({found.key for found in wanted.values()})
        futures = self._pool.submit(emission, [*collectors, *kept])
        ports = [port for port in self.program.forward.outputs if port.kind != "residual"]
        run = Run(self._pool, futures[: len(collectors)], [wanted[port.ref] for port in ports], device)
        return run, futures[len(collectors) :]

    def backward(self, residuals: Residuals, inputs: Tensors, cotangents: Tensors) -> Tensors:
        token = new_token()
        emission, sent = self.backward_tasks(residuals.sources, cotangents, token)
        wanted = add_collection(emission, self.program.backward, ("grad",), token)
        collectors = sorted({found.key for found in wanted.values()})
        futures = self._pool.submit(emission, collectors)
        del sent  # the workers have them for as long as tasks will read them
        try:
            results = dict(zip(collectors, self._pool.gather(futures), strict=True))
        except WorkerLostError:
            self._pool.cancel([*futures, *residuals.futures])  # or Dask would wait for ever to make them again
            raise
        except BaseException:
            self._pool.cancel(futures)
            raise
        device = device_of(inputs)
        return tuple(_of(results, wanted[port.ref]).to(device) for port in self.program.backward.outputs)

    @property
    def _pool(self) -> Pool:
        assert self.pool is not None, "without workers the local executor runs"
        return self.pool

    def forward_tasks(self, inputs: Tensors, token: str, held: Inputs | None = None) -> tuple[Emission, Inputs]:
        """The tasks of a forward run, which may come later, and where its inputs are, as they are now.

        Args:
            held: where the model's own tensors are, if they were placed before.
        """
        graph = self.program.forward
        given = held or self.place(inputs)
        sources, data = dict(given.sources), Emission()
        sent: list[tuple[str, torch.Tensor, str]] = []
        for number, (port, tensor) in enumerate(zip(graph.inputs, inputs, strict=True)):
            if port.ref in sources:
                continue
            key, device = f"daggc.in-{token}-{number}", str(port.value.type.device)
            sources[port.ref] = Found(key)
            if port.kind in HELD:
                add_data(data, key, self._copies.of(tensor), device)
            else:
                sent.append((key, tensor, device))
        futures = add_inputs(data, self.pool, sent)
        emission = merged(emit(graph, self.key, token, sources, run_task), data)
        return emission, Inputs(sources, [*given.futures, *futures])

    def backward_tasks(
        self, sources: Mapping[str, Source], cotangents: Tensors, token: str
    ) -> tuple[Emission, list[Future]]:
        """The tasks of a backward run that reads what a forward run left, and futures of what was sent for it."""
        graph = self.program.backward
        forward_refs = {port.ref for port in self.program.forward.inputs}
        read = {p.ref: sources[p.ref] for p in graph.inputs if p.kind == "residual" or p.ref in forward_refs}
        given = [port for port in graph.inputs if port.ref not in read]
        keys = {port.ref: f"daggc.ct-{token}-{number}" for number, port in enumerate(given)}
        data = Emission()
        futures = add_inputs(
            data,
            self.pool,
            [(keys[p.ref], ct, str(p.value.type.device)) for p, ct in zip(given, cotangents, strict=True)],
        )
        found = {ref: Found(key) for ref, key in keys.items()}
        return merged(emit(graph, self.key, token, read | found, run_task), data), futures

    def place(self, inputs: Tensors) -> Inputs:
        """Where on workers the model's own tensors are, of those among the inputs: sent if they are not, or changed."""
        if self.pool is None:
            return Inputs()
        held: dict[str, dict[str, torch.Tensor]] = {}
        for port, tensor in zip(self.program.forward.inputs, inputs, strict=True):
            if port.kind in HELD:
                held.setdefault(str(port.value.type.device), {})[port.ref] = tensor
        placed = Inputs()
        for device, tensors in held.items():
            sources, futures = self._shipments.place(self.pool, device, tensors)
            placed.sources |= sources
            placed.futures += futures
        return placed


def merged(emission: Emission, data: Emission) -> Emission:
    """``emission`` with the data tasks it reads."""
    emission.tasks |= data.tasks
    emission.device |= data.device
    return emission


def _is_input(key: str) -> bool:
    return key.startswith("daggc.in-")


def _of(results: Mapping[str, Any], found: Found) -> Any:
    result = results[found.key]
    return result if found.index is None else result[found.index]
