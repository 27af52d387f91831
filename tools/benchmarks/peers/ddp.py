"""DistributedDataParallel over gloo: a process of one thread for each part of the batch."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel

from benchmarks.models import CASES
from benchmarks.peers.ranks import join
from benchmarks.peers.serve import Training, floats, serve


def make(case: str, rank: int, count: int, bucket: int = 25) -> Training:
    """Each process has the whole model and its part of every batch; gradients are averaged during backward."""
    own = CASES[case]
    model, batch = own.make()
    *inputs, target = (tensor.chunk(count)[rank] for tensor in batch)
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True, bucket_cap_mb=bucket)
    assert own.loss is not None and own.optimizer is not None
    loss_fn, optimizer = own.loss, own.optimizer(replica.parameters())

    def run(steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_fn(replica(*inputs), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return floats(losses)  # of this part of the batch: the step's is the mean over the processes

    return Training(run)


if __name__ == "__main__":
    case, rank, count = join()
    serve(lambda **settings: make(case, rank, count, **settings))
