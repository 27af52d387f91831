"""Training on two processes of one thread each: daggc beside other ways, in turn.

Every way has processes of its own, which are stopped while another is timed. The settings of a way are
the best that a search has found, which tries each of them for a few steps.
"""

from __future__ import annotations

import math
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from benchmarks.contenders import Contender, WayError, in_turn
from benchmarks.results import Results
from benchmarks.ways import REFERENCE, WAYS, Settings, Way, in_words, settings_of

Say = Callable[[str], None]
_MOST_AT_ONCE = 6  # of a case: each holds one or two GB
_FIRST, _SECOND = 1e-4, 1e-3  # by which losses may differ: before, and after an update of rounded gradients
_TRIED = 2  # steps of a search


class LossError(RuntimeError):
    """A way computes something else: its losses are not those of the way it is compared with."""


def compare(case: str, names: Sequence[str], results: Results, rounds: int, steps: int, say: Say) -> None:
    """Time some ways, in groups of a few, with the settings that are chosen; adds to the results.

    Raises:
        WayError, LossError: a way failed, hung, or gave other losses.
    """
    ways = WAYS[case]
    names = [name for name in names if not _missing(ways[name], results, name, say)]
    for group in groups(names):
        with ExitStack() as stack, ended_by_signals():
            contenders = []
            for name in group:
                own = stack.enter_context(Contender(name, ways[name].command, case))
                answer = own.make(settings_of(ways[name], name, results))
                own.rest()
                results.losses[name], results.notes[name] = list(answer.losses), answer.note
                say(f"{name}: ready, losses {', '.join(f'{loss:.6f}' for loss in answer.losses)}")
                check_losses(case, name, results)
                contenders.append(own)
            for at in range(rounds):
                seconds = in_turn(contenders, steps, at)
                results.rounds.append(seconds)
                say("  ".join(f"{name} {seconds[name]:.3f}" for name in group))


def search(case: str, name: str, results: Results, say: Say) -> None:
    """Find the best settings of a way; settings it cannot run with are noted, with the reason.

    What was tried in a run before is not tried again: a search that was cut off goes on.
    """
    way = WAYS[case][name]
    if _missing(way, results, name, say) or not way.tries:
        return
    tried = results.tried.setdefault(name, [])
    with _searching(case, name) as attempt:

        def cost(settings: Settings) -> float:
            for one in tried:
                if one["settings"] == settings:
                    return math.inf if one["why"] else one["seconds"]
            seconds, why = attempt(settings)
            tried.append({"settings": dict(settings), "seconds": None if why else seconds, "why": why})
            say(f"{name} {in_words(settings)}: {why.splitlines()[-1] if why else f'{seconds:.3f}'}")
            return seconds

        best, least = dict(way.settings), cost(way.settings)
        for group in way.tries:
            for settings in [{**best, **change} for change in group]:
                seconds = cost(settings)
                if seconds < least:
                    best, least = settings, seconds
    if math.isinf(least):
        raise WayError(f"{name} ran with none of its settings: {tried[0]['why']}")
    results.chosen[name] = best


@contextmanager
def _searching(case: str, name: str) -> Iterator[Callable[[Settings], tuple[float, str]]]:
    """A function that tries settings: seconds a step, and why it could not if so. Processes that fail are replaced."""
    command = WAYS[case][name].command
    with ended_by_signals(), ExitStack() as stack:
        running: list[Contender] = []

        def attempt(settings: Settings) -> tuple[float, str]:
            if not running:
                running.append(stack.enter_context(Contender(name, command, case)))
            try:
                running[0].make(settings)
                return running[0].run(_TRIED).seconds / _TRIED, ""
            except WayError as error:
                running.pop().__exit__()
                return math.inf, str(error)

        yield attempt


def groups(names: Sequence[str]) -> list[list[str]]:
    """Ways to time together: few enough for memory, each group with the reference."""
    others = [name for name in names if name != REFERENCE]
    count = max(1, math.ceil(len(others) / (_MOST_AT_ONCE - 1)))
    size = math.ceil(len(others) / count) if others else 1
    parts = [others[start : start + size] for start in range(0, len(others), size)] or [[]]
    return [[REFERENCE, *part] for part in parts]


def check_losses(case: str, name: str, results: Results) -> None:
    """Raises LossError if the first losses are not those of the way that this one must be like."""
    like = WAYS[case][name].like
    expected = results.losses.get(like)
    if expected is None:
        return
    for step, (own, known, most) in enumerate(zip(results.losses[name], expected, (_FIRST, _SECOND), strict=True)):
        if not abs(own - known) <= most * abs(known):
            raise LossError(f"{name}: the loss of step {step} is {own}, that of {like} {known}: it is another training")


def _missing(way: Way, results: Results, name: str, say: Say) -> bool:
    gone = bool(way.needs) and shutil.which(way.needs) is None
    if gone:
        results.notes[name] = f"not run: there is no {way.needs}"
        say(f"{name}: {results.notes[name]}")
    return gone


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Make a request to end raise SystemExit, so that processes are ended too."""

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
