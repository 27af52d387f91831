"""daggc on worker processes of one thread, as its documentation has it."""

from __future__ import annotations

import math
import sys
from typing import Any

from distributed import Client

import daggc
from benchmarks.models import CASES
from benchmarks.peers.serve import Training, serve
from daggc.runtime.local_workers import local_workers


def make(client: Client, case: str, **settings: Any) -> Training:
    """A train step with the settings given; steps are submitted as they come, losses are read at the end."""
    own = CASES[case]
    model, batch = own.make()
    assert own.optimizer is not None
    step = daggc.compile(model, client=client).train_step(
        own.loss, own.optimizer(model.parameters()), seed=0, **settings
    )

    def run(steps: int) -> list[float]:
        losses = [step(*batch) for _ in range(steps)]
        return [float(loss) for loss in losses]

    def note() -> str:
        program = step.step_program
        return str(program.tried[0].choice) if program and program.tried else ""

    return Training(run, note, step.close)


def main() -> None:
    case, count = sys.argv[1:]
    with local_workers(int(count)) as client:
        scheduler: Any = client.cluster.scheduler  # pyright: ignore
        scheduler.worker_ttl = math.inf  # they are stopped while others are timed
        serve(lambda **settings: make(client, case, **settings))


if __name__ == "__main__":
    main()
