"""Random numbers on torch tensors: drawn by NumPy exactly as the interpreter draws them, then moved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from daggc.ops import random as draw


def bernoulli(
    key: torch.Tensor, stream: int, shape: Sequence[int], p: float, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Ones with probability ``p``; ``key`` is an i64[2]."""
    return _tensor(draw.draw_bernoulli(_host(key), stream, shape, p), dtype, device)


def uniform(
    key: torch.Tensor,
    stream: int,
    shape: Sequence[int],
    low: float,
    high: float,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Uniform in [low, high)."""
    return _tensor(draw.draw_uniform(_host(key), stream, shape, low, high, _NAMES[dtype]), dtype, device)


def normal(
    key: torch.Tensor,
    stream: int,
    shape: Sequence[int],
    mean: float,
    std: float,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Normal."""
    return _tensor(draw.draw_normal(_host(key), stream, shape, mean, std, _NAMES[dtype]), dtype, device)


def randint(
    key: torch.Tensor, stream: int, shape: Sequence[int], low: int, high: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Integers in [low, high)."""
    return _tensor(draw.draw_randint(_host(key), stream, shape, low, high), dtype, device)


def randperm(key: torch.Tensor, stream: int, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A permutation of 0 ... size-1."""
    return _tensor(draw.draw_randperm(_host(key), stream, size), dtype, device)


_NAMES = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def _host(key: torch.Tensor) -> np.ndarray:
    return key.detach().cpu().numpy()


def _tensor(array: np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape).to(device=device, dtype=dtype)
