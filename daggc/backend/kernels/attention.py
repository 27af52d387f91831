"""Attention on torch tensors: torch's fused kernels where they take the case, else matrix products.

All paths give the logsumexp of the scores, 0 or inf for a row that is all -inf, so that the backward may take
another path than the forward did. Which path runs depends on dtype and shape only.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_LSE_ALIGNMENT = 32  # rows of logsumexp in memory-efficient attention
_BIAS_ALIGNMENT = 8  # elements of a row of its mask


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """(out [.., T, Dv], logsumexp [.., T] in f32, or f64 for f64) of q [.., T, D], k [.., S, D], v [.., S, Dv]."""
    path = _path(q, k, v, mask, causal)
    q, k, v = _unit_stride(q, k, v)
    if path == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
    if path == "flash":
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    if path == "efficient":
        out, logsumexp, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, _bias(q, k, mask), True, 0.0, causal, scale=scale
        )
        return out, logsumexp[..., : q.shape[-2]]
    return _attention(q, k, v, mask, scale, causal)


def attention_backward(
    ct: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    *,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of q, k and v."""
    path = _path(q, k, v, mask, causal)
    ct, q, k, v, out = _unit_stride(ct, q, k, v, out)
    if path == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            ct, q, k, v, out, logsumexp, 0.0, causal, attn_mask=mask, scale=scale
        )
    if path == "flash":
        none = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the random state, unread without dropout
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            ct, q, k, v, out, logsumexp.contiguous(), None, None, q.shape[-2], k.shape[-2], 0.0, causal, none, none,
            scale=scale,
        )  # fmt: skip
    if path == "efficient":
        none = torch.zeros((), dtype=torch.int64, device=q.device)
        padding = -logsumexp.shape[-1] % _LSE_ALIGNMENT
        padded = torch.nn.functional.pad(logsumexp, (0, padding), value=float("inf"))
        return torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            ct, q, k, v, _bias(q, k, mask), out, padded, none, none, 0.0, [True, True, True, False], causal, scale=scale
        )[:3]
    ct_scores, weights, ct_wide, q_wide, k_wide = _score_cotangent(ct, q, k, v, mask, out, logsumexp, scale, causal)
    cts = (ct_scores @ k_wide * scale, ct_scores.mT @ q_wide * scale, weights.mT @ ct_wide)
    return cts[0].to(q.dtype), cts[1].to(k.dtype), cts[2].to(v.dtype)


def attention_mask_grad(
    ct: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    *,
    scale: float,
    causal: bool,
) -> Tensor:
    """The cotangent of the scores [.., T, S], in the mask's dtype; the fused CPU kernel does not give it."""
    return _score_cotangent(ct, q, k, v, mask, out, logsumexp, scale, causal)[0].to(mask.dtype)


def _path(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> str:
    """cpu, flash, efficient or math: the conditions of torch's dispatch that depend on types alone."""
    if q.dim() != 4 or 0 in (*q.shape, *k.shape, *v.shape) or not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return "math"
    if q.device.type == "cpu":
        return "cpu"
    aligned = q.shape[-1] % 8 == 0
    if q.device.type != "cuda" or not aligned or q.dtype not in (torch.float32, *_HALF):
        return "math"
    major = torch.cuda.get_device_capability(q.device)[0]
    square = not causal or q.shape[-2] == k.shape[-2]  # flash aligns the diagonal at the other end
    if mask is None and q.dtype in _HALF and square and q.shape[-1] <= 256 and major >= 8:
        return "flash"
    fits = major >= 8 or q.dtype != torch.bfloat16
    return "efficient" if fits and (mask is None or mask.dtype == q.dtype) else "math"


def _unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _bias(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as memory-efficient attention wants it: every row starts at an aligned address."""
    if mask is None:
        return None
    columns = k.shape[-2]
    mask = mask.expand(*mask.shape[:-1], columns)
    mask = torch.nn.functional.pad(mask, (0, -columns % _BIAS_ALIGNMENT))[..., :columns]
    return mask.expand(*q.shape[:-1], columns)


def _wide(x: Tensor) -> Tensor:
    """16-bit floats are computed in f32, as torch's own math path does."""
    return x.float() if x.dtype in _HALF else x


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Both factors take a root of the scale, which keeps products in range (torch does so too)."""
    root = abs(scale) ** 0.5
    scores = (q * (root if scale >= 0 else -root)) @ (k * root).mT
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    if causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~keep, float("-inf"))
    return scores


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    scores = _scores(_wide(q), _wide(k), mask, scale, causal)
    logsumexp = torch.logsumexp(scores, -1)
    logsumexp = logsumexp.masked_fill(logsumexp == float("-inf"), 0.0)
    return (torch.ops.aten._safe_softmax(scores, -1) @ _wide(v)).to(q.dtype), logsumexp


def _score_cotangent(
    ct: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(cotangent of the scores, weights, ct, q, k), all in the wide dtype."""
    ct, q, k, v, out = (_wide(x) for x in (ct, q, k, v, out))
    weights = torch.exp(_scores(q, k, mask, scale, causal) - logsumexp.unsqueeze(-1))
    delta = (ct * out).sum(-1, keepdim=True)
    return weights * (ct @ v.mT - delta), weights, ct, q, k
