"""Functions of linear algebra and statistics that look at data, in a form that does not.

``cov`` checks its weights, ``lstsq`` gives residuals only of matrices of full rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("daggc", "FRAGMENT")
_library.define("lstsq(Tensor a, Tensor b, float? rcond, *, str? driver) -> (Tensor, Tensor, Tensor, Tensor)")


def _fake_lstsq(a: Tensor, b: Tensor, rcond: float | None, *, driver: str | None) -> tuple[Tensor, ...]:
    """Shapes for matrices of full rank. Raises RuntimeError where torch does."""
    columns = b.unsqueeze(-1) if b.dim() == a.dim() - 1 else b
    driver = driver or "gelsy"
    if a.dim() < 2 or a.dim() != columns.dim() or a.shape[-2] != columns.shape[-2] or a.dtype != b.dtype:
        raise RuntimeError(f"linalg.lstsq: {a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)} are not a system")
    lead = torch.broadcast_shapes(a.shape[:-2], columns.shape[:-2])
    rows, size = a.shape[-2:]
    told = rows > size and driver != "gelsy"
    residuals = a.new_empty((*lead, columns.shape[-1])) if told else a.new_empty(0)
    rank = a.new_empty(0 if driver == "gels" else lead, dtype=torch.int64)
    sizes = a.new_empty((*lead, min(rows, size))) if driver in ("gelsd", "gelss") else a.new_empty(0)
    solution = a.new_empty((*lead, size, columns.shape[-1]))
    return solution.squeeze(-1) if columns is not b else solution, residuals, rank, sizes


torch.library.register_fake("daggc::lstsq", _fake_lstsq, lib=_library)


def lstsq(
    input: Tensor, b: Tensor, rcond: float | None = None, *, driver: str | None = None, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.linalg.lstsq`` of real matrices; residuals of matrices of lower rank are NaN, where eager's are empty."""
    result_type = torch.return_types.linalg_lstsq  # pyright: ignore  # made at run time
    return result_type(torch.ops.daggc.lstsq.default(input, b, rcond, driver=driver))


def cov(
    input: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None
) -> Tensor:
    """``torch.cov``; where eager raises an error for negative weights or a sum of 0, the result is NaN."""
    if input.dim() > 2:
        raise RuntimeError(f"cov(): expected input to have two or fewer dimensions, got {input.dim()}")
    rows = input.reshape(1, -1) if input.dim() < 2 else input
    count = rows.shape[1]
    weights = fweights if aweights is None else aweights if fweights is None else fweights * aweights
    if weights is None:
        mean, freedom = rows.sum(1) / count, max(0, count - correction)
        centred = rows - mean.unsqueeze(1)
        return torch.true_divide(torch.mm(centred, centred.t().conj()), freedom).squeeze()
    for given in (fweights, aweights):
        if given is not None and given.shape != (count,):
            raise RuntimeError(f"cov(): {count} weights are required, got a tensor of shape {tuple(given.shape)}")
    total = weights.sum()
    mean = (rows * weights).sum(1) / total
    freedom = total - correction
    if aweights is not None and correction != 0:
        freedom = total - correction * (weights * aweights).sum() / total
    freedom = torch.where(freedom <= 0, torch.zeros_like(freedom), freedom)
    centred = rows - mean.unsqueeze(1)
    result = torch.true_divide(torch.mm(centred, (centred * weights).t().conj()), freedom).squeeze()
    bad = total == 0
    for given in (fweights, aweights):
        bad = bad if given is None else bad | (given < 0).any()
    return torch.where(bad, math.nan, result)


def corrcoef(input: Tensor) -> Tensor:
    """``torch.corrcoef`` of real numbers."""
    if input.is_complex():
        raise NotImplementedError("corrcoef of complex numbers")
    covariance = cov(input)
    if covariance.dim() == 0:
        return (covariance / covariance).detach() + (covariance - covariance)  # 1 or NaN, with derivative 0
    deviation = torch.sqrt(covariance.diag())
    return (covariance / deviation.view(-1, 1) / deviation.view(1, -1)).clip(-1, 1)


IN_PLACE_OF = {
    torch.linalg.lstsq: lstsq,
    torch.cov: cov,
    Tensor.cov: cov,
    torch.corrcoef: corrcoef,
    Tensor.corrcoef: corrcoef,
}
