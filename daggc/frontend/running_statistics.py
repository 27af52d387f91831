"""Normalisations whose running statistics ``torch.export`` would lose or could not follow, in a form that it can.

Instance norm writes to statistics that its schema calls constant; batch norm with ``momentum=None`` reads the count of
batches as a Python number. Both become batch norms that average what they write by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from daggc.frontend.opaque import capturing


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.instance_norm``; running statistics become the mean over samples of what each would have made of them."""
    if not use_input_stats or running_mean is None or running_var is None:
        return functional.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    n, channels = x.shape[:2]
    mean, variance = running_mean.repeat(n), running_var.repeat(n)
    weight, bias = (None if param is None else param.repeat(n) for param in (weight, bias))
    merged = x.reshape(1, n * channels, *x.shape[2:])
    y = functional.batch_norm(merged, mean, variance, weight, bias, True, momentum, eps)
    with torch.no_grad():
        running_mean.copy_(mean.view(n, channels).mean(0))
        running_var.copy_(variance.view(n, channels).mean(0))
    return y.view(x.shape)


def _torch_instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    """``torch.instance_norm``, whose arguments come in another order."""
    return instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


_IN_PLACE_OF = {functional.instance_norm: instance_norm, torch.instance_norm: _torch_instance_norm}


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _IN_PLACE_OF.get(func, func)(*args, **(kwargs or {}))


def _counting_forward(module: _BatchNorm, x: Tensor) -> Tensor:
    """The forward of a batch norm whose statistics are the means over all batches so far.

    With a momentum of 1, batch norm writes the statistics of the batch itself.
    """
    count, running_mean, running_var = module.num_batches_tracked, module.running_mean, module.running_var
    assert count is not None and running_mean is not None and running_var is not None
    module._check_input_dim(x)
    mean, variance = torch.zeros_like(running_mean), torch.zeros_like(running_var)
    y = functional.batch_norm(x, mean, variance, module.weight, module.bias, True, 1.0, module.eps)
    with torch.no_grad():
        count.add_(1)
        for running, new in ((running_mean, mean), (running_var, variance)):
            share = 1 / count.to(running.dtype)
            running.copy_((1 - share) * running + share * new)
    return y


@contextmanager
def functional_statistics() -> Iterator[None]:
    """While capturing in this thread: running statistics are written where export sees it."""
    original = _BatchNorm.forward

    def forward(self: _BatchNorm, input: Tensor) -> Any:
        counts = self.momentum is None and self.training and self.num_batches_tracked is not None
        if capturing() and counts and self.running_mean is not None:
            return _counting_forward(self, input)
        return original(self, input)

    _BatchNorm.forward = forward
    try:
        with _Functions():
            yield
    finally:
        _BatchNorm.forward = original
