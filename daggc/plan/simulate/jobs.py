"""What the simulator runs: jobs, and what the machinery that runs them takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to run.

    Attributes:
        place: the device, or ``a->b`` for a transfer.
        seconds: how long it keeps its place busy.
        delay: seconds from its end until others can use its result.
        needs: indices of jobs whose results it waits for.
        uses: of resources that places share, how much it takes while it runs: ``(("cores node-0", 2.0),)``.
    """

    name: str
    place: str
    seconds: float
    needs: tuple[int, ...] = ()
    delay: float = 0.0
    transfer: bool = False
    stage: int | None = None
    phase: str = ""
    microbatch: int | None = None
    uses: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Timed:
    """A job and its seconds since the start."""

    job: Job
    start: float
    end: float


@dataclass(frozen=True)
class Runtime:
    """What running tasks takes beside the tasks. The defaults take nothing; Dask takes about a millisecond of each.

    Attributes:
        submit: seconds before anything begins, for each task of the graph (the client packs them, the scheduler
            takes them in).
        dispatch: seconds of the scheduler, of which there is one for all, for each task that has ended: it works
            them off one after another, and what waits for a task begins after that.
        begin: seconds from the end of the step before to the first task.
        message: seconds from a worker to the scheduler and back to a worker, beside ``dispatch``. The latency of a
            link counts from the end of a task, so it has this in it.
        per_device: seconds of a core that a step takes for each device with a part of it, beside tasks and messages.
        transfer_cores: cores that a transfer keeps busy at each of its ends while it lasts.
        barrier: updates wait until everything else has run, on all devices.
        versions: versions of parameters and buffers that a worker keeps: with 2, the one before the current too.
        slack: bytes that a CPU's process holds for each byte of its values, at their peak.
        holes: further bytes for each byte that it allocates in a step: an allocator cannot use all that is free.
        most_holes: the most that they come to, as a part of the values at their peak.
        shares: bytes from which on a message between processes of one host lies in memory that both have; None: none
            does.
        ahead: steps whose inputs are on the workers already while a step runs.
        process: bytes that it holds to run any program at all: code, records of tasks.
        in_place: updates write the new parameters where the old ones are.
        whole_results: what a task returns is freed as one, once all that read any of it have ended.
    """

    submit: float = 0.0
    dispatch: float = 0.0
    begin: float = 0.0
    message: float = 0.0
    per_device: float = 0.0
    transfer_cores: float = 0.0
    barrier: bool = False
    versions: int = 1
    slack: float = 1.0
    holes: float = 0.0
    most_holes: float = 1.0
    shares: int | None = None
    process: float = 0.0
    in_place: bool = False
    ahead: int = 0
    whole_results: bool = True


IDEAL = Runtime()
