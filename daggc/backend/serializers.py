"""How tensors travel between workers, and how big Dask believes they are.

Dask's own handler goes through ``tensor.numpy()``, which refuses bf16 and CUDA tensors (the transfer then
hangs), and counts every tensor as 80 bytes. Here the bytes go as they are, for every dtype; they arrive
64-byte aligned (kernels give other last bits at odd addresses) and in the layout they had (contiguous or
channels_last). Importing this module registers the handlers, on the client and on each worker.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextvars import ContextVar
from typing import Any

import distributed.protocol.torch  # noqa: F401  # Dask's handlers register first, then ours replace them
import torch
from dask.sizeof import sizeof
from distributed.protocol import dask_deserialize, dask_serialize

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


receiver: ContextVar[str] = ContextVar("daggc_receiver", default="")  # for whom tensors are packed, where that is known


class _Sent:
    """Bytes of tensors that this process has packed, by receiver; several threads pack at once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.nbytes: Counter[str] = Counter()

    def add(self, nbytes: int, to: str) -> None:
        with self.lock:
            self.nbytes[to] += nbytes

    def take(self) -> dict[str, int]:
        with self.lock:
            taken, self.nbytes = self.nbytes, Counter()
        return dict(taken)


_sent = _Sent()


def count_sent(nbytes: int, to: str) -> None:
    """Count bytes of tensors that go to a worker without being packed here."""
    _sent.add(nbytes, to)


def take_sent() -> float:
    """Bytes of tensors that this process has packed to send since the last call."""
    return float(sum(_sent.take().values()))


def take_sent_to() -> dict[str, int]:
    """The same by receiver; see :func:`daggc.runtime.traffic.tell_receivers`."""
    return _sent.take()


@sizeof.register(torch.Tensor)
def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    return 80 + tensor.numel() * tensor.element_size()


@dask_serialize.register((torch.Tensor, torch.nn.Parameter))
def serialize_tensor(tensor: torch.Tensor) -> tuple[dict[str, Any], list[memoryview]]:
    """Header and bytes. Tensors that have no plain bytes (sparse, meta, quantized) are left to pickle."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise NotImplementedError  # Dask tries its next way; with any other error the transfer would hang
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.device.type != "cpu":  # also a copy to where it is lets another thread take the interpreter, for 5 ms
        plain = plain.cpu()
    plain = laid_out(plain)
    channels_last = not plain.is_contiguous()
    header = {
        "dtype": str(plain.dtype).removeprefix("torch."),
        "shape": tuple(plain.shape),
        "channels_last": channels_last,
        "requires_grad": tensor.requires_grad,
        "parameter": isinstance(tensor, torch.nn.Parameter),
    }
    if channels_last:
        plain = plain.permute(0, *range(2, plain.dim()), 1)
    flat = plain.reshape(-1)
    _sent.add(plain.nbytes, receiver.get())
    if flat.numel() == 0:
        return header, []
    return header, [flat.view(torch.uint8).numpy().data]


def laid_out(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as it arrives elsewhere: in channels_last if it is in that, else contiguous."""
    channels_last = _FORMATS.get(tensor.dim())
    if channels_last is not None and tensor.is_contiguous(memory_format=channels_last):
        return tensor
    return tensor.contiguous()


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own, made by this thread alone.

    ``clone`` shares a large one among torch's threads, which wait for each other where workers on the same machine have
    the cores: 3 MB of a batch took 18 ms so.
    """
    if (
        tensor.device.type != "cpu"
        or tensor.layout != torch.strided
        or not tensor.is_contiguous()
        or not tensor.numel()
    ):
        return tensor.detach().clone()
    if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return tensor.detach().clone()
    copy = torch.empty_like(tensor, requires_grad=False)
    copy.reshape(-1).view(torch.uint8).numpy()[:] = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return copy


@dask_deserialize.register((torch.Tensor, torch.nn.Parameter))
def deserialize_tensor(header: dict[str, Any], frames: list[Any]) -> torch.Tensor:
    """The tensor, in fresh memory of torch's allocator: writable and 64-byte aligned."""
    shape = tuple(header["shape"])
    stored = (shape[0], *shape[2:], shape[1]) if header["channels_last"] else shape
    tensor = torch.empty(stored, dtype=getattr(torch, header["dtype"]))
    if tensor.numel():
        target = tensor.reshape(-1).view(torch.uint8).numpy().data
        at = 0
        for frame in frames:
            view = memoryview(frame).cast("B")
            target[at : at + len(view)] = view
            at += len(view)
    if header["channels_last"]:
        tensor = tensor.permute(0, len(shape) - 1, *range(1, len(shape) - 1))
    if header["parameter"]:
        return torch.nn.Parameter(tensor, requires_grad=header["requires_grad"])
    return tensor.requires_grad_() if header["requires_grad"] else tensor


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its memory starts at a 64-byte boundary, else a copy that does."""
    return tensor if tensor.data_ptr() % 64 == 0 or tensor.device.type != "cpu" else tensor.clone()
