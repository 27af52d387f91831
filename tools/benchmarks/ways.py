"""The ways of training that are compared on two processes of one thread: what they run, and the settings tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.contenders import Command
from benchmarks.results import Results

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        title: in tables.
        settings: the best that a search found on a machine of two cores; another search begins with them.
        tries: changes to the settings, in groups; the best of a group is kept when the next is tried.
        like: the way whose losses it must have.
        needs: a program that must be there.
    """

    title: str
    command: Command
    settings: Settings
    tries: Sequence[Sequence[Settings]] = ()
    like: str = "eager-2"
    needs: str = ""


@dataclass(frozen=True)
class Target:
    """What the time of a way may be at most, as a part of another's."""

    way: str
    reference: str
    limit: float


def _pipelined(schedule: str, *cuts: int) -> Settings:
    return {"schedule": schedule, "cuts": list(cuts)}


_PIPELINING = Way(
    "torch.distributed.pipelining, 2 processes",
    Command("pipelining", ranks=2),
    {**_pipelined("ZBVZeroBubble", 3, 5, 7), "microbatches": 4},
    (
        [_pipelined("ZBVZeroBubble", 2, 4, 6), _pipelined("ZBVZeroBubble", 2, 5, 7)],
        [{"microbatches": 8}, {"microbatches": 16}],
        [_pipelined("1F1B", 4), _pipelined("1F1B", 5), _pipelined("GPipe", 4), _pipelined("GPipe", 5)],
        [_pipelined("Interleaved1F1B", 2, 5, 7), _pipelined("InterleavedZeroBubble", 2, 5, 7)],
    ),
)
_BY_HAND = (
    [{"cut": 4}, {"cut": 3}],
    [{"microbatches": 4}, {"microbatches": 16}],
    [{"ahead": 2}, {"ahead": 3}],
)
_AUTO = {"schedule": "auto", "microbatches": "auto"}

# Ways that are compared with one another are near one another: they are timed in groups, in this order.
WAYS: Mapping[str, Mapping[str, Way]] = {
    "gpt": {
        "eager-2": Way("eager, 2 threads", Command("eager"), {"threads": 2}),
        "pipelining": _PIPELINING,
        "dask": Way(
            "Dask by hand, default settings", Command("dask_by_hand", ("default",), allocator=False),
            {"cut": 5, "microbatches": 8}, _BY_HAND,
        ),
        "dask-tuned": Way(
            "Dask by hand, allocator and threads tuned", Command("dask_by_hand", ("tuned",)),
            {"cut": 5, "microbatches": 8}, _BY_HAND,
        ),
        "daggc-pipeline": Way(
            "daggc, a pipeline", Command("daggc_workers", ("2",)),
            {"replicas": 1, "schedule": "zb-2p", "microbatches": 8},
            (
                [{"schedule": name} for name in ("zb-v", "zb-h2", "zb-h1", "1f1b")],
                [{"microbatches": 4}, {"schedule": "zb-v", "microbatches": 4}],
                [_AUTO],
            ),
        ),
        "daggc-any": Way(
            "daggc, any plan", Command("daggc_workers", ("2",)), {"replicas": 2, "schedule": "1f1b", "microbatches": 2},
            ([{"microbatches": 4}], [{"replicas": "auto", **_AUTO}]),
        ),
        "daggc-pipeline-auto": Way(
            "daggc, a pipeline, automatic", Command("daggc_workers", ("2",)), {"replicas": 1, **_AUTO}
        ),
        "daggc-auto": Way(
            "daggc, any plan, automatic", Command("daggc_workers", ("2",)), {"replicas": "auto", **_AUTO}
        ),
        "eager-1": Way("eager, 1 thread", Command("eager"), {"threads": 1}),
        "compile-2": Way(
            "torch.compile, 2 threads", Command("eager"), {"threads": 2, "compiled": True}, needs="g++"
        ),
        "ddp": Way("DistributedDataParallel, 2 processes", Command("ddp", ranks=2), {}),
    },
    "resnet18": {
        "eager-2": Way("eager, 2 threads", Command("eager"), {"threads": 2}),
        "eager-1": Way("eager, 1 thread", Command("eager"), {"threads": 1}),
        "daggc-1": Way("daggc, 1 worker", Command("daggc_workers", ("1",)), {}),
        "ddp": Way("DistributedDataParallel, 2 processes", Command("ddp", ranks=2), {}, like="ddp"),
        "daggc-replicas": Way(
            "daggc, 2 workers, 2 replicas", Command("daggc_workers", ("2",)),
            {"replicas": 2, "microbatches": 2, "force_microbatches": True}, like="ddp",
        ),
    },
}  # fmt: skip

TARGETS: Mapping[str, Sequence[Target]] = {
    "gpt": [
        Target("daggc-pipeline", "eager-2", 1.15),
        Target("daggc-pipeline", "pipelining", 0.92),
        Target("daggc-pipeline", "dask-tuned", 0.88),
        Target("daggc-pipeline", "dask", 0.72),
        Target("daggc-any", "eager-2", 1.08),
    ],
    "resnet18": [Target("daggc-replicas", "daggc-1", 0.65), Target("daggc-replicas", "eager-1", 0.65)],
}

STEPS: Mapping[str, int] = {"gpt": 3, "resnet18": 10}
"""So many are timed together: some seconds of them."""

REFERENCE = "eager-2"
"""Timed in every run, whatever ways are asked for: figures of several runs are compared through it."""


def settings_of(way: Way, name: str, results: Results) -> Settings:
    """Those that the search found, else those it would begin with."""
    return results.chosen.get(name, way.settings)


def in_words(settings: Settings) -> str:
    """Settings as a user would read them."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())
