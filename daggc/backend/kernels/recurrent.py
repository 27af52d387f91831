"""One layer of a recurrent net in one direction, by torch's own layers (oneDNN on CPUs, cuDNN on GPUs)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LAYERS = {"lstm": torch.lstm, "gru": torch.gru, "tanh": torch.rnn_tanh, "relu": torch.rnn_relu}


def recurrent_layer(
    inputs: Sequence[Tensor], *, cell: str, bias: bool, projected: bool, reverse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """y [T, N, P], and for an lstm the last cell state [N, H].

    Args:
        inputs: x [T, N, I], h [N, P][, c [N, H]], w_ih, w_hh[, b_ih, b_hh][, w_hr].
    """
    y, *c = _run(inputs, cell, bias, reverse, train=False)
    return (y, c[0]) if c else y


def recurrent_layer_backward(
    inputs: Sequence[Tensor], *, cell: str, bias: bool, projected: bool, reverse: bool
) -> tuple[Tensor, ...]:
    """Cotangents of the layer's inputs, from those of its outputs followed by its inputs; it runs the layer anew."""
    outputs = 2 if cell == "lstm" else 1
    twice = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    with torch.enable_grad():
        # Views, so that a tensor given as two inputs gets a cotangent for each.
        leaves = [(x if x.requires_grad else x.detach().requires_grad_()).view_as(x) for x in inputs[outputs:]]
        results = _run(leaves, cell, bias, reverse, train=True)
        return torch.autograd.grad(results, leaves, inputs[:outputs], create_graph=twice)


def _run(inputs: Sequence[Tensor], cell: str, bias: bool, reverse: bool, train: bool) -> tuple[Tensor, ...]:
    """(y,) or (y, c). ``train`` keeps what the kernels need to be differentiated."""
    x, *states = inputs[: 3 if cell == "lstm" else 2]
    weights = list(inputs[1 + len(states) :])
    x = x.flip(0) if reverse else x
    first = [state.unsqueeze(0).contiguous() for state in states]
    y, *last = _LAYERS[cell](
        x.contiguous(), first if cell == "lstm" else first[0], weights, bias, 1, 0.0, train, False, False
    )
    y = y.flip(0) if reverse else y
    return (y, last[1].squeeze(0)) if cell == "lstm" else (y,)
