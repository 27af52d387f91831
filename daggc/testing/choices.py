"""Where a generated program's choices come from: Hypothesis, a seed, or a recorded list of numbers.

A generator asks for one number at a time, so that a failure found from a seed can be shrunk as a list of numbers:
see :func:`shrink`.
"""

from __future__ import annotations

import random
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Protocol, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")


class Choices(Protocol):
    """A source of decisions. Smaller numbers should mean simpler programs: shrinking moves towards zero."""

    def below(self, count: int) -> int:
        """A number in ``[0, count)``."""
        ...

    def part(self, make: Callable[[Choices], T]) -> T:
        """What ``make`` makes of choices that belong together: they are dropped together where a program shrinks."""
        ...


@st.composite
def _part(draw: st.DrawFn, make: Callable[[Choices], T]) -> T:
    return make(Drawn(draw))


class Drawn:
    """Choices by Hypothesis, which shrinks them itself."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def below(self, count: int) -> int:
        return self._draw(st.integers(0, count - 1)) if count > 1 else 0

    def part(self, make: Callable[[Choices], T]) -> T:
        return self._draw(_part(make))


class Seeded:
    """Choices by a random generator, the same for one seed everywhere; ``numbers`` records them."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.numbers: list[int] = []

    def below(self, count: int) -> int:
        number = self._random.randrange(count) if count > 1 else 0
        self.numbers.append(number)
        return number

    def part(self, make: Callable[[Choices], T]) -> T:
        return make(self)


class Replayed:
    """Choices from a list; too large ones are cut to what is allowed, and after the last come zeros."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers
        self.used = 0

    def below(self, count: int) -> int:
        number = self._numbers[self.used] if self.used < len(self._numbers) else 0
        self.used += 1
        return min(number, count - 1)

    def part(self, make: Callable[[Choices], T]) -> T:
        return make(self)


def pick(choices: Choices, items: Sequence[T]) -> T:
    """One of the items; the first is the simplest."""
    return items[choices.below(len(items))]


def pick_weighted(choices: Choices, weights: Mapping[T, int]) -> T:
    """A key, as often as its weight says."""
    sums = list(accumulate(weights.values()))
    return list(weights)[bisect_right(sums, choices.below(sums[-1]))]


def shrink(
    numbers: Sequence[int],
    fails: Callable[[Sequence[int]], bool],
    seconds: float = 60,
    clock: Callable[[], float] = time.process_time,
) -> list[int]:
    """A shorter, smaller list of choices that still fails.

    Drops runs of choices, longest first, then lowers single ones, until nothing helps or the time is over.

    Args:
        numbers: choices for which ``fails`` holds.
        fails: whether the program that these choices make still has the failure looked for.
        seconds: of CPU time that this may take, by ``clock``.
    """
    best, end = list(numbers), clock() + seconds

    def better(trial: list[int]) -> bool:
        nonlocal best
        if trial != best and clock() < end and fails(trial):
            best = trial
            return True
        return False

    improved = True
    while improved and clock() < end:
        improved = False
        size = max(len(best) // 2, 1)
        while size:
            at = len(best) - size
            while at >= 0:
                improved |= better(best[:at] + best[at + size :])
                at = min(at - 1 if size == 1 else at - size // 2, len(best) - size)
            size //= 2
        at = 0
        while at < len(best):
            for number in (0, best[at] // 2, best[at] - 1):
                if 0 <= number < best[at] and better([*best[:at], number, *best[at + 1 :]]):
                    improved = True
                    break
            at += 1
    return best
