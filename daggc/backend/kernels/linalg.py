"""Linear algebra where one ATen call does not do."""

from __future__ import annotations

import torch


def permutation(pivots: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """The permutation matrices of LAPACK's pivots."""
    packed = torch.empty((*pivots.shape[:-1], size, pivots.shape[-1]), dtype=dtype, device=pivots.device)
    inside = pivots.clamp(1, max(size, 1)).contiguous()  # torch writes where they point
    return torch.lu_unpack(packed, inside, unpack_data=False)[0]


def cdist_backward(
    ct: torch.Tensor, x: torch.Tensor, y: torch.Tensor, distances: torch.Tensor, p: float
) -> torch.Tensor:
    """The cotangent of x; the kernel reads memory as if it were contiguous."""
    tensors = [tensor.contiguous() for tensor in (ct, x, y)]
    return torch.ops.aten._cdist_backward(*tensors, p, distances.contiguous())


def ldl_solve(factors: torch.Tensor, pivots: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Solve with factors of ``ldl_factor``; pivots that point elsewhere would make LAPACK write there."""
    places = torch.arange(1, pivots.shape[-1] + 1, dtype=pivots.dtype, device=pivots.device)
    inside = pivots.abs().clamp(max=pivots.shape[-1]).maximum(places) * pivots.sign()
    return torch.linalg.ldl_solve(factors, inside, b)


def lstsq(a: torch.Tensor, b: torch.Tensor, rcond: float, driver: str) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """The solution, or the solution, ranks and singular values, as far as the driver tells them."""
    result = torch.linalg.lstsq(a, b, rcond=rcond, driver=driver)
    if driver == "gels":
        return result.solution
    return (result.solution, result.rank, result.singular_values)[: 2 if driver == "gelsy" else 3]
