"""Constants of the program's text, made once a device."""

from __future__ import annotations

from functools import lru_cache

import torch

from daggc.frontend.dtypes import TO_TORCH


@lru_cache(maxsize=1024)
def constant(digits: str, dtype: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The tensor whose bytes are ``digits`` in hexadecimal. Shared by all callers: nobody writes to it."""
    data = bytearray.fromhex(digits)
    if not data:
        return torch.empty(shape, dtype=TO_TORCH[dtype], device=device)
    return torch.frombuffer(data, dtype=torch.uint8).clone().view(TO_TORCH[dtype]).reshape(shape).to(device)
