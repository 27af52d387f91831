"""``daggc.compile``: where a model is bound to this process or to the workers of a client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distributed import Client
from torch import nn

from daggc.errors import RunError
from daggc.ir.graph import Program
from daggc.runtime.arguments import check_compile
from daggc.runtime.calibrate import measured_pool
from daggc.runtime.dask_executor import DaskExecutor
from daggc.runtime.executor import Executor, LocalExecutor
from daggc.runtime.module import CompiledModule
from daggc.runtime.pool import current_client, pool_of
from daggc.runtime.shipping import Shipments


def compile(
    model: nn.Module,
    *,
    client: Client | None = None,
    devices: Sequence[str] | None = None,
    stages: int | None = None,
    pins: Mapping[str, str] | None = None,
    split_backward: bool = False,
    codegen: str = "torch",
) -> CompiledModule:
    """A module that runs ``model`` as a compiled program: in this process, or on the workers of a client.

    Nothing is captured yet: that happens at the first call, once for each signature. The result is a drop-in
    ``nn.Module`` with the model's own parameters, buffers and state_dict keys; ``loss.backward()`` and any
    ``torch.optim`` work as before.

    Args:
        client: a Dask client; by default the one that is open in this process, if any. Without one
            everything runs in this process. A cluster is never started.
        devices: names of the devices (``cpu:0``) or workers to use; by default all workers.
        stages: into how many stages to cut the model; by default one for each device.
        pins: patterns of module paths (``blocks.0*``) -> device names.
        split_backward: make gradients of weights tasks of their own, so that gradients of activations leave
            a stage sooner.
        codegen: ``inductor`` passes the code of each task through ``torch.compile``, here and on workers: faster
            where elementwise ops take the time, equal to eager to rounding. It takes a C++ compiler, and seconds to
            minutes at the first run. What cannot be compiled runs as usual; a warning says so.

    Raises:
        RunError: the client has no workers, its cluster does not answer, or an argument means nothing.
        PlanError: a device does not exist.
    """
    check_compile(client, devices, stages, pins, codegen)
    client = client or current_client()
    if client is None:
        if devices is not None or pins or (stages or 1) > 1:
            raise RunError(
                "devices=, stages= and pins= place work on Dask workers, and there is no client: "
                "open one first, as in client = distributed.Client(LocalCluster(n_workers=2))"
            )
        return CompiledModule(model, LocalExecutor, None, codegen)
    pool = measured_pool(pool_of(client, devices))
    shipments = Shipments()

    def make_executor(program: Program, wrt: Sequence[str] | None) -> Executor:
        return DaskExecutor(program, wrt, pool, shipments, stages=stages, pins=pins, split_backward=split_backward)

    return CompiledModule(model, make_executor, pool, codegen)
