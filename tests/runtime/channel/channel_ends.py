"""Two workers that send each other tensors of every kind."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from distributed import Client, Future

from daggc.runtime.channel import channel, install

PATIENCE = 60  # seconds
HELD: dict[str, Any] = {}  # what a worker keeps from one task to the next

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex32, torch.complex64, torch.complex128, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def numbers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3
    if not dtype.is_signed:
        values = values.abs()
    return values.to(torch.complex128 if dtype.is_complex else torch.float64).to(dtype)


def tensors() -> dict[str, torch.Tensor]:
    f32 = torch.float32
    return {
        **{str(dtype).removeprefix("torch."): numbers(dtype, 5, 7) for dtype in DTYPES},
        **{f"{dtype} transposed".removeprefix("torch."): numbers(dtype, 5, 7).T for dtype in DTYPES},
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "of no elements inside": torch.empty(2, 0, 3, 4).permute(3, 0, 1, 2),
        "channels_last": numbers(f32, 2, 3, 4, 5).to(memory_format=torch.channels_last),
        "channels_last_3d": numbers(f32, 2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
        "one channel": numbers(f32, 2, 1, 4, 5).to(memory_format=torch.channels_last),
        "odd strides where they do not count": torch.as_strided(numbers(f32, 6), (1, 3, 1, 2), (77, 2, 5, 1)),
        "permuted": numbers(f32, 2, 3, 4, 5).permute(2, 0, 3, 1),
        "with gaps": numbers(torch.bfloat16, 6, 8)[::2, 1::3],
        "complex128 with gaps": numbers(torch.complex128, 6, 8)[::2, 1::3],
        "expanded": numbers(f32, 1, 4).expand(3, 4),
        "expanded scalar": torch.tensor(2.0).expand(3, 4),
        "windows that overlap": numbers(f32, 10).unfold(0, 4, 2),
        "view at an odd place": numbers(f32, 101)[3:90],
        "conj": numbers(torch.complex64, 3, 3).conj(),
        "imaginary of conj": numbers(torch.complex64, 3, 3).conj().imag,
        "parameter": torch.nn.Parameter(numbers(f32, 3)),
        "has history": (numbers(torch.float64, 3).requires_grad_() * 2).tanh(),
        "nan and signed zero": torch.tensor([float("nan"), -0.0, float("inf")]),
        "large": numbers(f32, 700, 1000),
        "large transposed": numbers(torch.bfloat16, 700, 1000).T,
        "large with gaps": numbers(f32, 700, 1000)[:, ::3],
    }


def facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    plain = tensor.detach().resolve_conj().resolve_neg()
    flat = plain.contiguous().reshape(-1)
    bits = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return plain.dtype, tuple(plain.shape), plain.stride(), bits


class Ends:
    """Tasks on two workers that send to each other."""

    def __init__(self, client: Client) -> None:
        client.run(install)
        self.client = client
        self.a, self.b = sorted(client.scheduler_info()["workers"])

    def turned(self) -> Ends:
        """The same workers, the other way round."""
        turned = Ends(self.client)
        turned.a, turned.b = self.b, self.a
        return turned

    def on(self, address: str, function: Any, *args: Any) -> Future:
        return self.client.submit(function, *args, workers=[address], allow_other_workers=False, pure=False, retries=0)

    def send(self, run: str, tag: str, make: Any, to: str | None = None) -> None:
        def task() -> None:
            channel().send(run, to or self_b, tag, make())

        self_b = self.b
        self.on(self.a, task).result(PATIENCE)

    def receiving(self, run: str, tag: str, source: str | None = None) -> Future:
        def task() -> list[Any]:
            return [(facts(got), got.data_ptr() % 64) for got in channel().receive(run, tag, self_a)]

        self_a = source or self.a
        return self.on(self.b, task)

    def receive(self, run: str, tag: str) -> list[Any]:
        return self.receiving(run, tag).result(PATIENCE)

    def kept(self, address: str) -> int:
        return self.on(address, lambda: sum(map(len, channel().inbox._kept.values()))).result(PATIENCE)


def one() -> list[torch.Tensor]:
    return [torch.ones(3)]


def until(done: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.05)


def kill(ends: Ends, address: str) -> None:
    os.kill(ends.client.run(os.getpid, workers=[address])[address], signal.SIGKILL)
