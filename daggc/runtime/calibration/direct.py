"""What messages take that workers send each other directly: a ball between two of them, thrown back and forth.

One of the two has both clocks, so clocks of different hosts are never compared.
"""

from __future__ import annotations

import time
from statistics import median

import torch

from daggc.errors import RunError
from daggc.plan.device import Link
from daggc.runtime.channel import channel
from daggc.runtime.dask_executor import new_token
from daggc.runtime.pool import Pool

_THROWS = 24
_LARGE = 1 << 20  # elements of f32: 4 MiB
_SHORTEST = 1e-6  # no time is taken for less, whatever noise there was
_PATIENCE = 20.0  # seconds in which all throws are over


def direct_link(pool: Pool, source: str, target: str) -> Link:
    """Latency, bandwidth and CPU time of direct messages between the workers of two devices.

    Raises:
        WorkerLostError, RunError: a worker is gone, or they cannot reach each other.
    """
    run = f"calibration-{new_token()[:8]}"
    addresses = pool.addresses[source], pool.addresses[target]
    futures = [
        pool.run_on(source, throw, run, addresses[1], True),
        pool.run_on(target, throw, run, addresses[0], False),
    ]
    (small, large, spent, spent_large), (_, _, others, others_large) = pool.gather(futures, timeout=2 * _PATIENCE)
    return Link(
        latency=max(small, _SHORTEST),
        bandwidth=4 * _LARGE / max(large - small, _SHORTEST),
        handling=max((spent + others) / 2, 0.0),
        copying=max((spent_large + others_large - spent - others) / 2 / (4 * _LARGE), 0.0),
    )


def throw(run: str, peer: str, first: bool) -> tuple[float, float, float, float]:
    """One end of the exchange; runs on a worker.

    Returns:
        Seconds that an empty message and one of 4 MiB take one way, and this process's CPU seconds for either.
    """
    own, began = channel(), time.monotonic()

    def check() -> None:
        if time.monotonic() - began > _PATIENCE:
            raise RunError(f"{peer} did not answer for {_PATIENCE:g} seconds")

    found: list[tuple[float, float]] = []
    for kind, tensors in (("small", ()), ("large", (torch.zeros(_LARGE),))):
        took: list[float] = []
        spent = time.process_time()
        for number in range(_THROWS):
            start = time.perf_counter()
            if first:
                own.send(run, peer, f"{kind} {number}", tensors)
            own.receive(run, f"{kind} {number if not first else -1 - number}", peer, check)
            if not first:
                own.send(run, peer, f"{kind} {-1 - number}", tensors)
            took.append((time.perf_counter() - start) / 2)
        found.append((median(took), (time.process_time() - spent) / (2 * _THROWS)))
    own.end(run)
    (small, spent_small), (large, spent_large) = found
    return small, large, spent_small, spent_large
