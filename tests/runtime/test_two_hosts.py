"""Workers that share neither memory nor an address, and workers behind TLS: the numbers are those of one host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cluster import processes
from distributed import Client
from distributed.security import Security
from hosts import hosts
from torch import nn

import daggc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WIDTH, SAMPLES, STEPS = 512, 64, 4  # 64 kB in a message of a microbatch: more than goes inside it


def losses_of(client: Client | None, **options: Any) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4))
    batches = torch.randn(STEPS, SAMPLES, WIDTH), torch.randint(4, (STEPS, SAMPLES))
    step = daggc.compile(model, client=client).train_step(
        nn.CrossEntropyLoss(), torch.optim.AdamW(model.parameters(), lr=1e-3), **options
    )
    return [float(loss) for loss in [step(x, y) for x, y in zip(*batches, strict=True)]]


def on_two_workers(client: Client) -> None:
    """Train as a graph of tasks and in lanes; compare with this process."""
    graph, lanes = (
        losses_of(client, execution=how, stages=2, microbatches=2, force_microbatches=True)
        for how in ("graph", "lanes")
    )
    assert lanes == graph == pytest.approx(losses_of(None), rel=1e-5)


def test_messages_between_hosts_go_over_the_network(tmp_path: Path) -> None:
    def shared() -> tuple[int, bool]:
        """How many blocks of memory a worker has of others, and whether it knows that others take none of its own."""
        from daggc.runtime.channel import channel

        return len(channel().mappings), bool(channel()._apart)

    with hosts(2, tmp_path) as client:
        on_two_workers(client)
        found: Any = client.run(shared)
    assert set(found.values()) == {(0, True)}


def test_workers_behind_tls() -> None:
    with processes(2, security=Security.temporary(), protocol="tls://") as client:
        assert str(client.scheduler_info()["address"]).startswith("tls://")
        on_two_workers(client)
