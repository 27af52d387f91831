"""Runs a program's forward and backward as Dask tasks, for ``compile``, ``lazy`` and ``vjp``.

The client has the parameters; those that changed since the last run (by autograd's version counter) are
shipped to the worker that uses them. Residuals stay in the results of forward tasks, on their workers.
"""

from __future__ import annotations

import hashlib
import uuid
import weakref
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from distributed import Future

from daggc.backend.dask_graph import Emission, Found, Source, add_collection, add_data, emit
from daggc.errors import WorkerLostError
from daggc.frontend.opaque import registered
from daggc.ir.graph import Port, Program
from daggc.ir.printer import print_program
from daggc.plan.device import cluster_of, cpu_device
from daggc.plan.plan import Plan, plan_model
from daggc.runtime.devices import device_of
from daggc.runtime.executor import Tensors, places_of_reads
from daggc.runtime.pool import Pool
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
class Residuals:
    """What a forward run left on the workers; alive as long as this object."""

    sources: dict[str, Source]
    futures: list[Future]


@dataclass
class _Shipped:
    """The model's tensors on one worker: which futures hold them, and of which version they are."""

    sources: dict[str, Found] = field(default_factory=dict)
    futures: dict[str, Future] = field(default_factory=dict)
    stamps: dict[str, _Stamp] = field(default_factory=dict)


@dataclass(frozen=True)
class _Stamp:
    """What a tensor was when it was shipped.

    Holds the tensor: the next one could otherwise get its address and be taken for it. The version counter does
    not see writes through ``.data``; where it and the address are unchanged, a checksum tells.
    """

    tensor: torch.Tensor
    address: int
    version: int
    checksum: int

    @staticmethod
    def of(tensor: torch.Tensor) -> _Stamp:
        return _Stamp(tensor, tensor.data_ptr(), tensor._version, checksum(tensor))

    def fits(self, tensor: torch.Tensor) -> bool:
        same = tensor is self.tensor and tensor.data_ptr() == self.address and tensor._version == self.version
        return same and checksum(tensor) == self.checksum


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's elements (about 6 GB/s)."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(plain.view(torch.uint8).numpy().data) if plain.numel() else 0


class DaskExecutor:
    """Plans a program for a pool of workers, or for this process's Dask scheduler, and runs it there."""

    def __init__(self, primal: Program, wrt: Sequence[str] | None, pool: Pool | None, **options: Any) -> None:
        cluster = pool.cluster if pool else cluster_of([cpu_device(0)])
        inference = wrt is not None and not wrt
        self.plan: Plan = plan_model(primal, cluster, wrt=wrt, training=not inference, **options)
        self.program = self.plan.program
        self.pool = pool
        self.key = program_key(self.program)
        self._reads = () if inference else places_of_reads(self.program)
        self._shipped: dict[str, _Shipped] = {}
        self._copies: dict[str, tuple[_Stamp, torch.Tensor]] = {}
        if pool is None:
            know(self.key, self.program)
            weakref.finalize(self, unknow, self.key)
        else:
            pool.ship(self.key, self.program, opaque_functions(self.program))
            weakref.finalize(self, pool.forget, self.key)

    def forward(self, inputs: Tensors) -> tuple[Tensors, Residuals]:
        assert self.pool is not None, "without workers the local executor runs"
        token = new_token()
        emission, sources = self.forward_tasks(inputs, token)
        wanted = add_collection(emission, self.program.forward, RESULTS, token)
        kept = [key for key in emission.tasks if key in emission.calls or key.startswith("daggc.in-")]
        collectors = sorted({found.key for found in wanted.values()})
        futures = self.pool.submit(emission, [*collectors, *kept])
        try:
            results = dict(zip(collectors, self.pool.gather(futures[: len(collectors)]), strict=True))
        except BaseException:
            self.pool.cancel(futures)  # a traceback may hold them; nothing shall go on
            raise
        ports = [port for port in self.program.forward.outputs if port.kind != "residual"]
        device = device_of(inputs)
        outputs = tuple(_of(results, wanted[port.ref]).to(device) for port in ports)
        kept_futures = [*futures[len(collectors) :], *self.held_futures()]
        return outputs, Residuals(sources | emission.outputs, kept_futures)

    def backward(self, residuals: Residuals, inputs: Tensors, cotangents: Tensors) -> Tensors:
        assert self.pool is not None, "without workers the local executor runs"
        token = new_token()
        emission = self.backward_tasks(residuals.sources, cotangents, token)
        wanted = add_collection(emission, self.program.backward, ("grad",), token)
        collectors = sorted({found.key for found in wanted.values()})
        futures = self.pool.submit(emission, collectors)
        try:
            results = dict(zip(collectors, self.pool.gather(futures), strict=True))
        except WorkerLostError:
            self.pool.cancel([*futures, *residuals.futures])  # or Dask would wait for ever to make them again
            raise
        except BaseException:
            self.pool.cancel(futures)
            raise
        device = device_of(inputs)
        return tuple(_of(results, wanted[port.ref]).to(device) for port in self.program.backward.outputs)

    def forward_tasks(self, inputs: Tensors, token: str, freeze: bool = False) -> tuple[Emission, dict[str, Source]]:
        """The tasks of a forward run, and where its inputs are.

        Args:
            freeze: the run comes later, and must not see changes of the tensors until then.
        """
        graph = self.program.forward
        held: dict[str, dict[str, torch.Tensor]] = {}
        data = Emission()
        sources: dict[str, Source] = {}
        for port, tensor in zip(graph.inputs, inputs, strict=True):
            device = str(port.value.type.device)
            if port.kind in HELD and self.pool is not None:
                held.setdefault(device, {})[port.ref] = tensor
            else:
                plain = self._frozen(port, tensor) if freeze else _plain(tensor)
                sources[port.ref] = add_data(data, f"daggc.in-{token}-{len(sources)}", plain, device)
        for device, tensors in held.items():
            sources |= self._ship(device, tensors)
        return merged(emit(graph, self.key, token, sources, run_task), data), sources

    def backward_tasks(self, sources: Mapping[str, Source], cotangents: Tensors, token: str) -> Emission:
        """The tasks of a backward run that reads what a forward run left."""
        graph = self.program.backward
        forward_refs = {port.ref for port in self.program.forward.inputs}
        given = iter(cotangents)
        data = Emission()
        inputs: dict[str, Source] = {}
        for port in graph.inputs:
            if port.kind == "residual" or port.ref in forward_refs:
                inputs[port.ref] = sources[port.ref]
            else:
                key = f"daggc.ct-{token}-{len(inputs)}"
                inputs[port.ref] = add_data(data, key, _plain(next(given)), str(port.value.type.device))
        return merged(emit(graph, self.key, token, inputs, run_task), data)

    def held_futures(self) -> list[Future]:
        """Futures that a submitted graph refers to: keep them while it may run."""
        return [future for shipped in self._shipped.values() for future in shipped.futures.values()]

    def _frozen(self, port: Port, tensor: torch.Tensor) -> torch.Tensor:
        """A copy; of the model's own tensors one for each of their versions."""
        if port.kind not in HELD:
            return tensor.detach().clone()
        known = self._copies.get(port.ref)
        if known is None or not known[0].fits(tensor):
            known = self._copies[port.ref] = (_Stamp.of(tensor), tensor.detach().clone())
        return known[1]

    def _ship(self, device: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Source]:
        """Send what changed; returns where everything is."""
        assert self.pool is not None, "only workers are shipped to"
        shipped = self._shipped.setdefault(device, _Shipped())
        changed = {
            ref: _plain(tensor)
            for ref, tensor in tensors.items()
            if ref not in shipped.stamps or not shipped.stamps[ref].fits(tensor)
        }
        if changed:
            future = self.pool.scatter(changed, device)
            shipped.futures[str(future.key)] = future
            shipped.sources.update((ref, Found(str(future.key), ref)) for ref in changed)
            shipped.stamps.update((ref, _Stamp.of(tensors[ref])) for ref in changed)
            used = {found.key for found in shipped.sources.values()}
            shipped.futures = {key: future for key, future in shipped.futures.items() if key in used}
        return {ref: shipped.sources[ref] for ref in tensors}


def merged(emission: Emission, data: Emission) -> Emission:
    """``emission`` with the data tasks it reads."""
    emission.tasks |= data.tasks
    emission.device |= data.device
    return emission


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Without autograd history, as a plain tensor."""
    return tensor.detach()


def _of(results: Mapping[str, Any], found: Found) -> Any:
    result = results[found.key]
    return result if found.index is None else result[found.index]
