"""State goes to workers, and comes from them, in pieces: a worker that it just fits never holds it twice."""

from __future__ import annotations

import pytest
import torch
from distributed import Client
from torch import nn

import daggc
from daggc.runtime import resident
from daggc.runtime.resident import _pieces

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("room", [1, 100, 400, 1 << 20])
def test_pieces_are_small_and_have_everything_in_order(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "_PIECE", room)
    tensors = {f"param:{index}": torch.zeros(index % 5 * 20) for index in range(17)}
    found = _pieces(list(tensors), tensors)
    assert [ref for piece in found for ref in piece] == list(tensors)
    assert all(len(piece) == 1 or sum(tensors[ref].nbytes for ref in piece) <= room for piece in found)
    assert _pieces([], tensors) == [[]]


@pytest.mark.parametrize("execution", ["graph", "lanes"])
def test_training_is_the_same(two_workers: Client, execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> tuple[list[float], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        step = daggc.compile(model, client=two_workers).train_step(
            nn.MSELoss(), optimizer, microbatches=2, execution=execution
        )
        losses = []
        for index in range(4):
            generator = torch.Generator().manual_seed(index)
            losses.append(float(step(torch.randn(8, 8, generator=generator), torch.randn(8, 1, generator=generator))))
            if index == 1:  # to the model and back
                step.sync()
                step.load_from_model()
        step.sync()
        step.close()
        state = {f"{i}.{name}": value for i, own in enumerate(optimizer.state.values()) for name, value in own.items()}
        return losses, {**model.state_dict(), **state}

    wanted = trained()
    monkeypatch.setattr(resident, "_PIECE", 300)
    got = trained()
    assert got[0] == wanted[0] and got[1].keys() == wanted[1].keys()
    assert all(torch.equal(got[1][name], tensor) for name, tensor in wanted[1].items())
