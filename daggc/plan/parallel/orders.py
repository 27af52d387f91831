"""The order of tasks on each rank of a pipeline, as Megatron-LM has it, and one order of all that respects it.

Rank r of p, with v chunks a rank and m microbatches, runs some forwards to warm up, then a forward and a backward in
turn, then the backwards that are left. With one chunk it warms up with ``p - 1 - r`` forwards (1F1B); with more, which
come in groups of p microbatches, with ``2 (p - 1 - r) + (v - 1) p`` (Narayanan et al. 2021).

:mod:`daggc.plan.schedule` makes the same orders, and many others, by rules that hold for any graph of stages. Here are
hundreds of thousands of tasks, so they are written down.
"""

from __future__ import annotations

FORWARD, BACKWARD = 0, 1
Step = tuple[int, int, int]  # chunk, phase, microbatch


def rank_order(pipeline: int, rank: int, chunks: int, microbatches: int) -> list[Step]:
    """The tasks of a rank, in order. With several chunks, ``pipeline`` divides ``microbatches``."""
    total = microbatches * chunks
    if chunks == 1:
        forwards = [(rank, FORWARD, k) for k in range(microbatches)]
        backwards = [(rank, BACKWARD, k) for k in range(microbatches)]
        warm = min(pipeline - 1 - rank, total)
    else:
        turns = [
            (group * pipeline + k, turn)
            for group in range(microbatches // pipeline)
            for turn in range(chunks)
            for k in range(pipeline)
        ]
        forwards = [(turn * pipeline + rank, FORWARD, k) for k, turn in turns]
        backwards = [((chunks - 1 - turn) * pipeline + rank, BACKWARD, k) for k, turn in turns]
        warm = min(2 * (pipeline - 1 - rank) + (chunks - 1) * pipeline, total)
    steady = [step for pair in zip(forwards[warm:], backwards, strict=False) for step in pair]
    return [*forwards[:warm], *steady, *backwards[total - warm :]]


def pipeline_order(pipeline: int, chunks: int, microbatches: int) -> list[tuple[Step, tuple[int, ...]]]:
    """All tasks, each after those it needs and after those before it on its rank, with the places of what it needs."""
    last = pipeline * chunks - 1
    orders = [rank_order(pipeline, rank, chunks, microbatches) for rank in range(pipeline)]
    at = [0] * pipeline
    place: dict[Step, int] = {}
    found: list[tuple[Step, tuple[int, ...]]] = []
    waiting: dict[Step, int] = {}  # a task that is not there yet -> the rank that waits for it
    runnable = list(range(pipeline - 1, -1, -1))
    while runnable:
        rank = runnable.pop()
        order = orders[rank]
        while at[rank] < len(order):
            step = order[at[rank]]
            missing = next((source for source in _needs(step, last) if source not in place), None)
            if missing is not None:
                waiting[missing] = rank
                break
            found.append((step, tuple([place[source] for source in _needs(step, last)])))
            place[step] = len(place)
            at[rank] += 1
            if step in waiting:
                runnable.append(waiting.pop(step))
    assert len(found) == 2 * microbatches * pipeline * chunks, "the orders of ranks wait for each other"
    return found


def _needs(step: Step, last: int) -> tuple[Step, ...]:
    chunk, phase, k = step
    if phase == FORWARD:
        return ((chunk - 1, FORWARD, k),) if chunk else ()
    return ((chunk, FORWARD, k), (chunk + 1, BACKWARD, k)) if chunk < last else ((chunk, FORWARD, k),)
