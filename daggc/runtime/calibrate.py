"""Calibration: what a pool's workers are, measured where they compute, as the cluster that plans are made for.

One worker of each kind (:func:`~daggc.runtime.calibration.measure.environment`) runs the suite alone. Then all run a
part of it at once: they share memory and caches, so all take longer; one that takes much longer than its like is
measured by itself. Last come the overheads of tasks, and links. What was measured is kept on disk for the same kind.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from daggc.errors import RunError
from daggc.ir.graph import Program
from daggc.plan.device import Cluster, Device
from daggc.runtime.calibration.cache import read_entry, write_entry
from daggc.runtime.calibration.measure import ROUNDS, environment, on_workers, time_there
from daggc.runtime.calibration.programs import pieces
from daggc.runtime.calibration.rows import profile_of
from daggc.runtime.calibration.session import Session
from daggc.runtime.dask_executor import opaque_functions
from daggc.runtime.pool import Pool, current_client, pool_of

SWITCH = "DAGGC_CALIBRATE"  # environment variable; see measured_pool
_CALIBRATED: WeakKeyDictionary[Any, dict[Any, Cluster]] = WeakKeyDictionary()  # of this process's clients


def calibrate(
    client: Any = None,
    devices: Sequence[str] | None = None,
    *,
    seconds: float = 2.0,
    threads: int = 0,
    fresh: bool = False,
) -> Cluster:
    """Measure the workers of a Dask client, or give what was measured before; see :func:`calibrated`.

    Args:
        client: by default the one that is open in this process.
        devices: use only these.

    Raises:
        RunError: there is no client, it has no workers, or they do not answer.
    """
    client = client or current_client()
    if client is None:
        raise RunError("workers are calibrated, and there is no client: open one, as in distributed.Client(...)")
    return calibrated(pool_of(client, devices), seconds=seconds, threads=threads, fresh=fresh)


def calibrated(
    pool: Pool, *, seconds: float = 2.0, threads: int = 0, fresh: bool = False, measure: bool = True
) -> Cluster:
    """A pool's cluster with measured rates, overheads and links.

    Args:
        seconds: for which a worker of each kind runs the suite, if that is enough for four rounds.
        threads: torch threads inside a task, as of ``train_step(threads=...)``; 0 leaves them as they are.
        fresh: measure even what is known.
        measure: where False, devices and links that are not known keep ordinary values.

    Raises:
        RunError, WorkerLostError: workers do not answer, or are gone.
    """
    known = _CALIBRATED.setdefault(pool.client, {})
    key = (tuple(pool.addresses.items()), threads)
    if fresh or key not in known:
        cluster = Session(pool, seconds, threads, fresh).cluster(measure)
        if not measure:
            return cluster
        known[key] = cluster
    return known[key]


def measured_pool(pool: Pool) -> Pool:
    """The pool with its cluster calibrated.

    The environment variable ``DAGGC_CALIBRATE`` is ``auto`` (the default: measure what is not known), ``cached``
    (use what is known, measure nothing) or ``off`` (ordinary rates).

    Raises:
        RunError: the variable has another value, or workers do not answer.
    """
    mode = os.environ.get(SWITCH) or "auto"
    if mode not in ("auto", "cached", "off"):
        raise RunError(f"the environment variable {SWITCH} is auto, cached or off, got {mode!r}")
    return pool if mode == "off" else replace(pool, cluster=calibrated(pool, measure=mode == "auto"))


def calibrate_program(
    pool: Pool, program: Program, seconds: float = 2.0, *, threads: int = 0, opaque: bool = False, fresh: bool = False
) -> Cluster:
    """The pool's cluster with measured times of every distinct node of a program, on each kind of worker.

    Args:
        program: a captured one (``@forward`` alone is differentiated first), or the program of a plan or a step.
        seconds: for which one worker of each kind runs it, if that is enough for four rounds.
        opaque: run Python functions of the user's too, on random inputs.

    Raises:
        RunError, WorkerLostError: workers do not answer, or are gone.
    """
    names = pool.cluster.names
    kinds = dict(zip(names, on_workers(pool, names, environment, threads), strict=True))
    functions = opaque_functions(program) if opaque else {}
    devices: list[Device] = []
    known: dict[str, dict[str, float]] = {}
    for device in pool.cluster.devices:
        graphs = pieces(program, device.memory / 8, opaque)
        identity = [kinds[device.name], [graph.structure() for graph in graphs]]
        times = known.get(repr(identity)) or (None if fresh else _times_of(read_entry("program", identity)))
        if times is None:
            (found,) = on_workers(pool, [device.name], time_there, graphs, seconds, ROUNDS, threads, functions)
            times = profile_of((g, own.seconds) for g, own in zip(graphs, found, strict=True) if own.seconds)
            write_entry("program", identity, times)
        known[repr(identity)] = times
        devices.append(replace(device, profile={**device.profile, **times}))
    return replace(pool.cluster, devices=tuple(devices))


def _times_of(entry: Any) -> dict[str, float] | None:
    """Measured times as they were kept, if they are."""
    if not isinstance(entry, Mapping) or not all(type(value) is float and 0 < value < 1e6 for value in entry.values()):
        return None
    return {str(key): value for key, value in entry.items()}
