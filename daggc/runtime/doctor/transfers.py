"""Whether tensors of every kind arrive at another worker as they were; one that does not travel can hang for ever."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from daggc.backend import serializers  # noqa: F401  # registers how tensors travel, on this side and that

KINDS = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "uint8",
    "bool",
    "complex64",
    "complex128",
    "float32 channels_last",
    "bfloat16 channels_last",
)
_HUNG = 3  # kinds that did not arrive, after which no more are tried


def made(kind: str) -> torch.Tensor:
    """A small tensor of a kind, the same in every process."""
    dtype, _, layout = kind.partition(" ")
    numbers = torch.arange(120).reshape(2, 3, 4, 5) % (2 if dtype == "bool" else 16)
    tensor = numbers.to(getattr(torch, dtype))
    return tensor.contiguous(memory_format=torch.channels_last) if layout else tensor


def differs(kind: str, tensor: Any) -> str:
    """What is wrong with the tensor of a kind that arrived; empty if it is as it was."""
    expected = made(kind)
    if not isinstance(tensor, torch.Tensor):
        return f"{type(tensor).__name__} arrived"
    if (tensor.dtype, tensor.shape) != (expected.dtype, expected.shape):
        return f"{tensor.dtype}{list(tensor.shape)} arrived"
    if tensor.stride() != expected.stride():
        return f"it arrived with strides {tensor.stride()}, not {expected.stride()}"
    return "" if _bits(tensor) == _bits(expected) else "it arrived with other numbers"


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def transfers(client: Any, addresses: Sequence[str], seconds: float) -> Iterator[tuple[str, str]]:
    """For each kind what is wrong with it, or nothing: from the first worker to the second, or to here.

    Args:
        seconds: to wait for each.
    """
    hung = 0
    for kind in KINDS:
        if hung == _HUNG:
            return
        source = client.submit(made, kind, workers=addresses[:1], pure=False, retries=0)
        try:
            if len(addresses) > 1:
                arrived = client.submit(differs, kind, source, workers=addresses[1:2], pure=False, retries=0)
                yield kind, arrived.result(timeout=seconds)
            else:
                yield kind, differs(kind, source.result(timeout=seconds))
        except TimeoutError:
            hung += 1
            yield kind, f"it did not arrive within {seconds:g} s"
        except Exception as wrong:  # of any serializer, or of Dask
            yield kind, f"{type(wrong).__name__}: {wrong}"
