"""What the comparison on two workers has found so far; runs of parts of it add to the same file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


@dataclass
class Results:
    """Of one case.

    Attributes:
        rounds: seconds a step by way; a round has those that were timed in turn.
        chosen: the settings of each way that has been searched; those it begins with otherwise.
        tried: what the search found of each way: settings and seconds a step, or why not.
        losses: of the first two steps.
        notes: what a way said of itself.
    """

    rounds: list[dict[str, float]] = field(default_factory=list)
    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)
    tried: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def forget(self, ways: Iterable[str]) -> None:
        """Drop what was measured of these ways: they have changed."""
        for way in ways:
            self.tried.pop(way, None)
            self.chosen.pop(way, None)
            for one in self.rounds:
                one.pop(way, None)

    def seconds(self, way: str) -> float | None:
        """The median; None if the way was not timed."""
        return self._median(lambda one: one[way], way)

    def ratio(self, way: str, reference: str) -> float | None:
        """The median over the rounds that have both."""
        return self._median(lambda one: one[way] / one[reference], way, reference)

    def count(self, *ways: str) -> int:
        """Rounds that have all of these."""
        return sum(set(ways) <= one.keys() for one in self.rounds)

    def _median(self, figure: Callable[[Mapping[str, float]], float], *ways: str) -> float | None:
        own = [figure(one) for one in self.rounds if set(ways) <= one.keys()]
        return median(own) if own else None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
