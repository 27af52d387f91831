"""torch.distributed.pipelining over gloo: the stages of a GPT in processes of one thread."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from benchmarks.models import CASES
from benchmarks.peers.ranks import join
from benchmarks.peers.serve import Training, floats, serve
from benchmarks.peers.stages import stages_of


def make(case: str, rank: int, count: int, schedule: str, cuts: Sequence[int], microbatches: int) -> Training:
    """The stages of this rank and a schedule of PyTorch's; more stages than processes are dealt as it wants them."""
    own = CASES[case]
    model, (tokens, target) = own.make()
    modules = stages_of(model, cuts)
    turn = [*range(count), *reversed(range(count))] if schedule == "ZBVZeroBubble" else [*range(count)]
    mine = [number for number in range(len(modules)) if turn[number % len(turn)] == rank]
    device = torch.device("cpu")
    stages = [PipelineStage(modules[number], number, len(modules), device) for number in mine]
    kind = get_schedule_class(schedule)
    single = issubclass(kind, PipelineScheduleSingle)
    pipeline = kind(stages[0] if single else stages, microbatches, loss_fn=own.loss)  # pyright: ignore
    assert own.optimizer is not None
    optimizer = own.optimizer([p for number in mine for p in modules[number].parameters()])
    given = (tokens,) if stages[0].is_first else ()
    last = any(stage.is_last for stage in stages)

    def run(steps: int) -> list[float]:
        means: list[torch.Tensor] = []
        for _ in range(steps):
            optimizer.zero_grad()
            losses: list[torch.Tensor] = []
            pipeline.step(*given, target=target if last else None, losses=losses, return_outputs=False)
            optimizer.step()
            if last:
                means.append(torch.stack([loss.detach() for loss in losses]).mean())
        return floats(means)

    return Training(run)


if __name__ == "__main__":
    case, rank, count = join()
    serve(lambda **settings: make(case, rank, count, **settings))
