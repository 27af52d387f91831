"""Ways of doing the same timed in turn: medians, and medians of the ratios within a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

Run = Callable[[], float]  # does it once, gives a number that all ways should agree on


@dataclass(frozen=True)
class Times:
    """Seconds of each way by round, in the order they were taken; and what each way gave first."""

    seconds: Mapping[str, list[float]]
    first: Mapping[str, float]

    def median(self, way: str) -> float:
        return median(self.seconds[way])

    def ratio(self, way: str, reference: str) -> float:
        """The median over rounds of this way's time by the reference's in the same round."""
        pairs = zip(self.seconds[way], self.seconds[reference], strict=True)
        return median(own / base for own, base in pairs)


def paired(ways: Mapping[str, Run], rounds: int, warm: int = 2) -> Times:
    """Time each way once a round; the order turns, so that none always follows the same one."""
    first = {name: run() for name, run in ways.items()}
    for _ in range(warm - 1):
        for run in ways.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for at in range(rounds):
        for name in names[at % len(names) :] + names[: at % len(names)]:
            start = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - start)
    return Times(seconds, first)
