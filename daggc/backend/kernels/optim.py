"""Optimizer updates by torch's fused kernels; those without a final underscore leave the parameter as it is.

Scalars (``lr``, ``step``) are 0-d f64 tensors and best kept in host memory: reading one from a GPU waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_FUSED_DTYPES = (torch.float32, torch.float64)
_FUSED_DEVICES = ("cpu", "cuda")


def _fused(param: Tensor, others: Sequence[Tensor]) -> bool:
    """16-bit tensors take torch's single-tensor steps, which round each result as eager does."""
    tensors = (param, *others)
    return (
        param.device.type in _FUSED_DEVICES and param.dtype in _FUSED_DTYPES and all(x.is_contiguous() for x in tensors)
    )


def _own(states: Sequence[Tensor], donate: bool) -> list[Tensor]:
    """State that may be written to: the old one's memory if it was given away."""
    return [state if donate else state.clone() for state in states]


def sgd_update(param: Tensor, *rest: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """``(new param, new momentum buffer if any)``; see :func:`sgd_update_`."""
    return sgd_update_(param.clone(), *rest, **options)


def adamw_update(param: Tensor, *rest: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """``(new param, exp_avg, exp_avg_sq, max_exp_avg_sq if amsgrad)``; see :func:`adamw_update_`."""
    return adamw_update_(param.clone(), *rest, **options)


def sgd_update_(
    new: Tensor,
    grad: Tensor,
    *rest: Tensor,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    maximize: bool,
    donate: bool,
) -> tuple[Tensor, ...]:
    """Writes the new parameter where the old is, and gives it and the momentum buffer; see ``torch.optim.SGD``."""
    *given, lr, step = rest
    rate, first = float(lr), float(step) == 1
    states = _own(given, donate)
    if _fused(new, (grad, *states)):
        torch.ops.aten._fused_sgd_(
            [new], [grad], states, weight_decay=weight_decay, momentum=momentum, lr=rate, dampening=dampening,
            nesterov=nesterov, maximize=maximize, is_first_step=first,
        )  # fmt: skip
        return (new, *states)
    grad = -grad if maximize else grad
    if weight_decay:
        grad = grad.add(new, alpha=weight_decay)
    if states:
        (buffer,) = states
        buffer = buffer.copy_(grad) if first else buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
        grad = grad.add(buffer, alpha=momentum) if nesterov else buffer
    return (new.add_(grad, alpha=-rate), *states)


def adamw_update_(
    new: Tensor,
    grad: Tensor,
    *rest: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
    donate: bool,
) -> tuple[Tensor, ...]:
    """Writes the new parameter where the old is, and gives it and the moments; see ``torch.optim.AdamW``."""
    *given, lr, step = rest
    rate, count = float(lr), float(step)
    states = _own(given, donate)
    if _fused(new, (grad, *states)):
        update = torch.ops.aten._fused_adamw_ if decoupled else torch.ops.aten._fused_adam_
        counts = [torch.tensor(count, dtype=torch.float32, device=new.device)]
        update(
            [new], [grad], [states[0]], [states[1]], states[2:], counts, lr=rate, beta1=beta1, beta2=beta2,
            weight_decay=weight_decay, eps=eps, amsgrad=amsgrad, maximize=maximize,
        )  # fmt: skip
        return (new, *states)
    grad = -grad if maximize else grad
    if weight_decay and decoupled:
        new.mul_(1 - rate * weight_decay)
    elif weight_decay:
        grad = grad.add(new, alpha=weight_decay)
    exp_avg, exp_avg_sq = states[0], states[1]
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    second = torch.maximum(states[2], exp_avg_sq, out=states[2]) if amsgrad else exp_avg_sq
    denominator = (second.sqrt() / (1 - beta2**count) ** 0.5).add_(eps)
    return (new.addcdiv_(exp_avg, denominator, value=-rate / (1 - beta1**count)), *states)


def squared_norm(x: Tensor) -> Tensor:
    """The square of the Euclidean norm, f64[]; the norm is computed in x's dtype (f32 for 16 bits)."""
    dtype = torch.float32 if x.dtype.itemsize == 2 else None
    return torch.linalg.vector_norm(x, dtype=dtype).to(torch.float64).square()
