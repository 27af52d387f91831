"""Recurrent layers of torch.nn as programs: every form, beside eager PyTorch, twice differentiated."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from torch import nn

import daggc

FORMS = [
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
    (nn.LSTM, {"batch_first": True, "bias": False}),
    (nn.LSTM, {"num_layers": 2, "dropout": 1.0}),  # all of the first layer's results are dropped
    (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    (nn.GRU, {"batch_first": True, "bias": False}),
    (nn.RNN, {"bidirectional": True}),
    (nn.RNN, {"nonlinearity": "relu", "num_layers": 2}),
    (nn.LSTMCell, {}),
    (nn.GRUCell, {"bias": False}),
    (nn.RNNCell, {"nonlinearity": "relu"}),
]


def tensors(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [x for part in result for x in tensors(part)]


def add_up(numbers: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(numbers)).sum()


def derivatives(model, parameters, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, gradients, and derivatives of the gradients' squared norm."""
    outputs = tensors(model(x))
    loss = add_up(((index + 1) * y * y.detach().sin()).sum() for index, y in enumerate(outputs))
    wanted = [x, *parameters]
    first = torch.autograd.grad(loss, wanted, create_graph=True, materialize_grads=True)
    square = add_up((gradient * gradient).sum() for gradient in first)
    return [*outputs, *first, *torch.autograd.grad(square, wanted, materialize_grads=True)]


@pytest.mark.parametrize(("cls", "options"), FORMS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("batched", [True, False])
def test_equal_to_eager(cls: type[nn.Module], options: dict[str, object], batched: bool):
    torch.manual_seed(0)
    model = cls(3, 4, **options).double()
    shape = (2, 3) if issubclass(cls, nn.RNNCellBase) else (4, 2, 3)
    x = torch.randn(shape if batched else (*shape[:-2], 3), dtype=torch.float64, requires_grad=True)
    mine = copy.deepcopy(model)
    compiled = daggc.compile(mine)
    assert daggc.trace(model, (x,)).portable
    got, wanted = derivatives(compiled, list(mine.parameters()), x), derivatives(model, list(model.parameters()), x)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_dropout_between_layers_draws_from_the_key():
    model = nn.GRU(3, 4, num_layers=2, dropout=0.5)
    x = torch.randn(5, 2, 3)
    program = daggc.trace(model, (x,))
    assert program.portable and [node.op for node in program.forward.nodes].count("bernoulli") == 1
    assert not daggc.trace(model.eval(), (x,)).forward.inputs_of("key")


def test_packed_sequences_are_refused():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return self.rnn(nn.utils.rnn.pack_padded_sequence(x, lengths))[1]

    with pytest.raises(daggc.CaptureError, match="pack_padded_sequence"):
        daggc.trace(Packed(), (torch.randn(5, 2, 3), torch.tensor([5, 3])))
