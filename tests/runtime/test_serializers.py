"""Tensors on their way between workers: every dtype and layout arrives as it left, aligned, and counted right."""

from __future__ import annotations

import pytest
import torch
from dask.sizeof import sizeof
from distributed import Client
from distributed.protocol import deserialize, serialize

from daggc.backend.serializers import aligned, copied, take_sent

pytestmark = pytest.mark.timeout(60)

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def numbers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3
    return values.to(torch.complex128 if dtype.is_complex else torch.float64).to(dtype)


TENSORS = {
    **{str(dtype).removeprefix("torch."): numbers(dtype, 5, 7) for dtype in DTYPES},
    "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
    "empty": torch.empty(0, 3),
    "one of no elements inside": torch.empty(2, 0, 3, 4),
    "channels_last": numbers(torch.float32, 2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": numbers(torch.float32, 2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    "one channel": numbers(torch.float32, 2, 1, 4, 5).to(memory_format=torch.channels_last),
    "transposed": numbers(torch.float32, 5, 7).T,
    "strided": numbers(torch.bfloat16, 6, 8)[::2, 1::3],
    "expanded": numbers(torch.float32, 1, 4).expand(3, 4),
    "view at an odd place": numbers(torch.float32, 101)[3:90],
    "conj": numbers(torch.complex64, 3, 3).conj(),
    "imaginary of conj": numbers(torch.complex64, 3, 3).conj().imag,
    "parameter": torch.nn.Parameter(numbers(torch.float32, 3)),
    "frozen parameter": torch.nn.Parameter(numbers(torch.float32, 3), requires_grad=False),
    "requires grad": numbers(torch.float64, 3).requires_grad_(),
    "has history": (numbers(torch.float64, 3).requires_grad_() * 2).tanh(),
    "nan and signed zero": torch.tensor([float("nan"), -0.0, float("inf")]),
    "large": numbers(torch.float32, 700, 1000),
}


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def assert_same(got: torch.Tensor, sent: torch.Tensor) -> None:
    assert (got.dtype, got.shape, got.requires_grad) == (sent.dtype, sent.shape, sent.requires_grad)
    assert isinstance(got, torch.nn.Parameter) == isinstance(sent, torch.nn.Parameter)
    assert bits(got) == bits(sent)
    assert got.data_ptr() % 64 == 0
    for layout in (torch.channels_last, torch.channels_last_3d):
        if sent.dim() == (4 if layout is torch.channels_last else 5) and not sent.is_contiguous():
            assert got.is_contiguous(memory_format=layout) == sent.is_contiguous(memory_format=layout)
    with torch.no_grad():
        got.zero_()  # it is writable


@pytest.mark.parametrize("name", TENSORS)
def test_round_trip(name: str) -> None:
    header, frames = serialize(TENSORS[name], serializers=("dask",), on_error="raise")
    assert_same(deserialize(header, [bytes(frame) for frame in frames]), TENSORS[name])


def _make(names: list[str]) -> list[torch.Tensor]:
    return [TENSORS[name] for name in names]


def _facts(tensors: list[torch.Tensor]) -> list[tuple[int, bytes, int]]:
    return [(tensor.data_ptr() % 64, bits(tensor), sizeof(tensor)) for tensor in tensors]


def test_between_two_workers_and_back(two_workers: Client) -> None:
    names = list(TENSORS)
    first, second = list(two_workers.scheduler_info()["workers"])
    two_workers.run(__import__, "daggc.runtime.worker")  # as any use of daggc does: registers the handlers
    sent = two_workers.submit(_make, names, workers=[first], pure=False)
    facts = two_workers.submit(_facts, sent, workers=[second], pure=False).result(timeout=30)
    for name, (offset, content, size) in zip(names, facts, strict=True):
        assert offset == 0, name
        assert content == bits(TENSORS[name]), name
        assert size >= TENSORS[name].numel() * TENSORS[name].element_size(), name
    for got, name in zip(sent.result(timeout=30), names, strict=True):
        assert_same(got, TENSORS[name])


def test_dask_knows_how_big_tensors_are_on_workers(two_workers: Client) -> None:
    two_workers.run(__import__, "daggc.runtime.worker")
    future = two_workers.submit(torch.zeros, 1000, 1000, pure=False)
    future.result(timeout=30)
    key = future.key
    size = two_workers.run_on_scheduler(lambda dask_scheduler: dask_scheduler.tasks[key].nbytes)
    assert size >= 4_000_000


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.empty(3, device="meta"),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "meta", "quantized"],
)
def test_what_has_no_plain_bytes_is_pickled(tensor: torch.Tensor) -> None:
    header, frames = serialize(tensor, serializers=("dask", "pickle"), on_error="raise")
    got = deserialize(header, frames)
    assert (got.dtype, got.shape, got.layout, got.device) == (tensor.dtype, tensor.shape, tensor.layout, tensor.device)


def _sparse() -> torch.Tensor:
    return torch.eye(3).to_sparse()


def test_a_sparse_tensor_does_not_hang(two_workers: Client) -> None:
    first, second = list(two_workers.scheduler_info()["workers"])
    two_workers.run(__import__, "daggc.runtime.worker")
    sent = two_workers.submit(_sparse, workers=[first], pure=False)
    there = two_workers.submit(torch.Tensor.to_dense, sent, workers=[second], pure=False)
    assert torch.equal(there.result(timeout=20), torch.eye(3))


def test_aligned_copies_only_what_is_not() -> None:
    whole = torch.zeros(64)
    assert aligned(whole) is whole
    assert aligned(whole[3:]).data_ptr() % 64 == 0


def test_bytes_that_are_sent_are_counted() -> None:
    take_sent()
    serialize((numbers(torch.float32, 10, 10), numbers(torch.bfloat16, 6, 8)[::2, 1::3]))
    assert take_sent() == 400 + 3 * 3 * 2
    assert take_sent() == 0


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS.keys())
def test_a_copy_has_memory_of_its_own_and_no_more_than_it_needs(tensor: torch.Tensor) -> None:
    copy = copied(tensor)
    assert type(copy) is torch.Tensor and not copy.requires_grad
    assert (copy.dtype, copy.shape, bits(copy)) == (tensor.dtype, tensor.shape, bits(tensor))
    assert not tensor.numel() or copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    assert copy.untyped_storage().nbytes() <= max(tensor.untyped_storage().nbytes(), tensor.nbytes)
    if tensor.is_contiguous():
        assert copy.untyped_storage().nbytes() == tensor.nbytes
