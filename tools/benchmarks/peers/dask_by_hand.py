"""Dask futures as one would write them without daggc: two stages of a GPT pinned to two workers of one thread.

Where a backward and a forward could both run, the backward does.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import dask
from distributed import Client, Future, LocalCluster

from benchmarks.models import CASES
from benchmarks.peers.dask_tasks import backward, forward, forward_backward, start, update
from benchmarks.peers.serve import Training, serve
from daggc.runtime.local_workers import worker_environment


def make(client: Client, case: str, cut: int, microbatches: int, ahead: int | None = None) -> Training:
    """Steps are submitted one after the other without waiting.

    Args:
        ahead: how many microbatches may have gone forward but not yet backward; any number if None.
    """
    _, batch = CASES[case].make()
    parts = list(zip(*(tensor.chunk(microbatches) for tensor in batch), strict=True))
    one, two = sorted(client.scheduler_info()["workers"])
    for number, worker in enumerate((one, two)):
        client.submit(start, case, number, cut, workers=[worker], pure=False).result()

    def submit(function: Any, *arguments: Any, worker: str, priority: int = 0) -> Future:
        return client.submit(function, *arguments, workers=[worker], pure=False, priority=priority)

    def step(after: tuple[Future, ...]) -> tuple[Future, Future]:
        """The updates of both stages, after those of the step before."""
        first, last = after[:1], after[1:]
        back: list[Future] = []
        ends: list[Future] = []
        for number, (tokens, target) in enumerate(parts):
            wait = back[number - ahead :][:1] if ahead and number >= ahead else []
            out = submit(forward, number, tokens, *first, *wait, worker=one)
            ends.append(submit(forward_backward, out, target, len(parts), *last, worker=two))
            back.append(submit(backward, number, ends[-1], worker=one, priority=1))
        return submit(update, *back, worker=one), submit(update, *ends, worker=two)

    def run(steps: int) -> list[float]:
        done: list[tuple[Future, Future]] = []
        for _ in range(steps):
            done.append(step(done[-1] if done else ()))
        client.gather(done[-1][0])
        return [last.result() for _, last in done]

    return Training(run)


def main() -> None:
    case, settings = sys.argv[1:]
    tuned = {"distributed.nanny.pre-spawn-environ": worker_environment(1)} if settings == "tuned" else {}
    with (
        dask.config.set(tuned),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        scheduler: Any = client.cluster.scheduler  # pyright: ignore[reportOptionalMemberAccess]
        scheduler.worker_ttl = math.inf  # they are stopped while others are timed
        serve(lambda **choice: make(client, case, **choice))


if __name__ == "__main__":
    main()
