"""Batches streamed through a compiled module: in order, few at a time, and nothing left of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cluster import processes
from distributed import Client
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import daggc
from daggc.errors import CaptureError, RunError, WorkerLostError
from daggc.runtime.pool import Pool

pytestmark = pytest.mark.timeout(120)


@daggc.opaque(out=lambda x: torch.empty_like(x))
def fragile(x: torch.Tensor) -> torch.Tensor:
    """Passes its input on; its first number tells it to take its time, to raise, or to end its process."""
    told = float(x.reshape(-1)[0])
    if told == 500:
        time.sleep(0.3)
    if told == 1000:
        raise ValueError("the 13th sample is bad")
    if told == 2000:
        os._exit(7)
    return x * 1.0


class Net(nn.Module):
    """Two like halves; `fragile` is in the second."""

    def __init__(self, fragile: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.second = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.fragile = fragile

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        hidden = self.first(x)
        if self.fragile:
            hidden = fragile(torch.cat([x[:, :1], hidden[:, 1:]], 1))
        out = self.second(hidden)
        return {"out": out if scale is None else out * scale, "hidden": hidden}


PINS = {"first*": "cpu:0", "second*": "cpu:1"}


def batches(count: int, rows: int = 6, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 16, generator=generator) for _ in range(count)]


def telling(x: torch.Tensor, number: float) -> torch.Tensor:
    told = x.clone()
    told[0, 0] = number
    return told


def assert_same(got: Any, wanted: Any) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor)
        assert not got[name].requires_grad


def tasks_of(client: Any) -> set[str]:
    return client.run_on_scheduler(lambda dask_scheduler: {str(key) for key in dask_scheduler.tasks})


def assert_settles_to(client: Client, before: set[str], seconds: float = 10.0) -> None:
    """The scheduler knows no task of ours but those of before; releases arrive asynchronously."""
    end = time.monotonic() + seconds
    while left := {key for key in tasks_of(client) - before if "daggc" in key}:
        assert time.monotonic() < end, left
        time.sleep(0.1)


class Counted:
    """An endless stream that counts what was read of it."""

    def __init__(self, number: float = 0.0) -> None:
        self.read = 0
        self.number = number

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            self.read += 1
            yield telling(torch.full((4, 16), float(self.read)), self.number)


@pytest.fixture(params=["workers", "here"])
def client(request: pytest.FixtureRequest) -> Client | None:
    return request.getfixturevalue("two_workers") if request.param == "workers" else None


def compiled_for(client: Client | None, net: nn.Module) -> Any:
    return daggc.compile(net, client=client, pins=PINS if client else None)


def test_results_are_eagers_in_order(client: Client | None) -> None:
    net = Net().eval()
    compiled = compiled_for(client, net)
    scale = torch.tensor(0.5)
    given = batches(9)
    ways: list[Any] = [
        x if i % 3 == 0 else (x, scale) if i % 3 == 1 else {"scale": scale, "x": x} for i, x in enumerate(given)
    ]
    with torch.no_grad():
        wanted = [net(x) if i % 3 == 0 else net(x, scale) for i, x in enumerate(given)]
    for in_flight in (None, 1, 3):
        got = list(compiled.map(ways, in_flight=in_flight))
        assert len(got) == len(wanted)
        for result, expected in zip(got, wanted, strict=True):
            assert_same(result, expected)


def test_a_data_loader_and_a_smaller_last_batch(client: Client | None) -> None:
    net = Net().eval()
    data = torch.cat(batches(5))
    loader = DataLoader(TensorDataset(data), batch_size=8)
    with torch.no_grad():
        wanted = [net(part) for part in data.split(8)]
    got = list(compiled_for(client, net).map(loader))
    assert [len(result["out"]) for result in got] == [8, 8, 8, 6]
    for result, expected in zip(got, wanted, strict=True):
        assert_same(result, expected)


def test_a_stream_is_read_only_as_far_as_is_in_flight(client: Client | None) -> None:
    net = Net().eval()
    stream = Counted()
    in_flight = 3
    results = compiled_for(client, net).map(stream, in_flight=in_flight)
    assert stream.read == 0
    for number, result in zip(range(1, 8), results, strict=False):
        with torch.no_grad():
            assert_same(result, net(telling(torch.full((4, 16), float(number)), 0.0)))
        ahead = stream.read - number
        assert ahead == (in_flight - 1 if client else 0)
    results.close()


def test_memory_that_is_filled_anew_for_each_batch(client: Client | None) -> None:
    net = Net().eval()
    compiled = compiled_for(client, net)
    for rows in (4, 6000):  # inside the graph, and straight to the worker
        given = batches(5, rows)
        memory = torch.empty(rows, 16)
        with torch.no_grad():
            wanted = [net(x) for x in given]
        for result, expected in zip(compiled.map(memory.copy_(x) for x in given), wanted, strict=True):
            assert_same(result, expected)


def test_leaving_early_cancels_and_releases(two_workers: Client) -> None:
    net = Net(fragile=True).eval()
    compiled = daggc.compile(net, client=two_workers, pins=PINS)
    list(compiled.map(batches(1, 4)))
    before = tasks_of(two_workers)
    slow = Counted(500)
    start = time.monotonic()
    for number, _ in enumerate(compiled.map(slow, in_flight=6)):
        if number == 1:
            break
    assert time.monotonic() - start < 5
    assert_settles_to(two_workers, before)
    assert slow.read <= 8
    stream = compiled.map(slow, in_flight=4)
    next(stream)
    stream.close()
    assert_settles_to(two_workers, before)
    assert len(list(compiled.map(batches(3, 4)))) == 3


def test_results_leave_their_workers_while_the_user_is_busy(two_workers: Client) -> None:
    compiled = daggc.compile(Net().eval(), client=two_workers, pins=PINS)
    list(compiled.map(batches(1)))
    before = tasks_of(two_workers)
    results = compiled.map(batches(8), in_flight=4)
    next(results)
    assert_settles_to(two_workers, before)
    assert len(list(results)) == 7


@pytest.mark.parametrize("where", ["task", "stream", "capture"])
def test_an_error_in_the_middle(client: Client | None, where: str) -> None:
    """The results before it are given, those after it cancelled."""
    net = Net(fragile=True).eval()
    compiled = compiled_for(client, net)
    given = batches(8)
    list(compiled.map(given[:1]))
    before = tasks_of(client) if client else set()
    kinds: dict[str, tuple[type[Exception], str]] = {
        "task": (RunError, "13th sample is bad"),
        "stream": (KeyError, "no fifth batch"),
        "capture": (CaptureError, "first.0"),
    }

    def stream() -> Iterator[torch.Tensor]:
        for number, x in enumerate(given):
            if number == 4 and where == "stream":
                raise KeyError("no fifth batch")
            yield x if number != 4 else telling(x, 1000) if where == "task" else x[:, :7]

    error, match = kinds[where]
    got: list[Any] = []
    with pytest.raises(error, match=match):
        got.extend(compiled.map(stream(), in_flight=6))  # as far as it comes
    assert len(got) == 4
    with torch.no_grad():
        for x, result in zip(given, got, strict=False):
            assert_same(result, net(x))
    if client:
        assert_settles_to(client, before)
    assert len(list(compiled.map(given))) == 8


def test_a_worker_that_dies() -> None:
    with processes(2) as client:
        net = Net(fragile=True).eval()
        compiled = daggc.compile(net, client=client, pins=PINS)
        given = batches(9)
        given[4] = telling(given[4], 2000)
        got: list[Any] = []
        start = time.monotonic()
        with pytest.raises(WorkerLostError, match="cpu:1"):
            got.extend(compiled.map(given, in_flight=3))
        assert time.monotonic() - start < 30
        assert len(got) <= 4
        with pytest.raises(WorkerLostError), torch.no_grad():
            list(compiled.map(batches(2, 6000)))  # sent straight to the worker that is gone


def test_parameters_are_sent_once_for_all_shapes(two_workers: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    scatter = Pool.scatter

    def watched(self: Pool, tensors: Any, device: str) -> Any:
        sent.extend(tensors)
        return scatter(self, tensors, device)

    monkeypatch.setattr(Pool, "scatter", watched)
    net = Net().eval()
    compiled = daggc.compile(net, client=two_workers, pins=PINS)
    list(compiled.map([*batches(3, 6), *batches(2, 5), *batches(2, 6)]))
    assert sorted(sent) == sorted(f"param:{name}" for name, _ in net.named_parameters())
    sent.clear()
    with torch.no_grad():
        compiled(batches(1, 5)[0])
        assert not sent
        net.second[2].bias.add_(1)  # pyright: ignore
        (result,) = compiled.map(batches(1, 5))
        assert sent == ["param:second.2.bias"]
        assert_same(result, net(batches(1, 5)[0]))


def test_a_model_that_leaves_something_behind_takes_one_batch_after_another(client: Client | None) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))

    mine, eager = net(), net()
    compiled = daggc.compile(mine, client=client)
    stream = Counted()
    with torch.no_grad():
        for number, got in zip(range(1, 5), compiled.map(stream), strict=False):
            assert torch.equal(got, eager(telling(torch.full((4, 16), float(number)), 0.0)))
            assert stream.read == number
            for name, buffer in eager.named_buffers():
                assert torch.equal(mine.get_buffer(name), buffer)
    compiled.eval()
    eager.eval()
    with torch.no_grad():
        for x, got in zip(batches(3), compiled.map(batches(3)), strict=True):
            assert torch.equal(got, eager(x))


def test_random_numbers_are_those_of_one_call_after_another(two_workers: Client) -> None:
    compiled = daggc.compile(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)), client=two_workers)
    with torch.no_grad():
        compiled(batches(1)[0])
        torch.manual_seed(7)
        wanted = [compiled(x) for x in batches(4)]
    torch.manual_seed(7)
    for got, expected in zip(compiled.map(batches(4)), wanted, strict=True):
        assert torch.equal(got, expected)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.small, self.large = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.large(x) if x.abs().max() > 10 else self.small(x)


def test_decisions_that_hang_on_a_batch(client: Client | None) -> None:
    net = Router().eval()
    given = [x * (100 if i in (2, 3) else 1) for i, x in enumerate(batches(6))]
    memory = torch.empty_like(given[0])
    with torch.no_grad():
        wanted = [net(x) for x in given]
    for got, expected in zip(
        daggc.compile(net, client=client).map(memory.copy_(x) for x in given), wanted, strict=True
    ):
        assert torch.equal(got, expected)


def test_the_users_grad_mode_is_left_alone(client: Client | None) -> None:
    def stream() -> Iterator[torch.Tensor]:
        for x in batches(3):
            assert torch.is_grad_enabled()
            yield x

    for result in compiled_for(client, Net()).map(stream()):
        assert torch.is_grad_enabled()
        assert not result["out"].requires_grad


def test_what_map_does_not_do_is_refused() -> None:
    compiled = daggc.compile(Net())
    with pytest.raises(RunError, match="in_flight is at least 1, got 0"):
        compiled.map([], in_flight=0)
    compiled.register_forward_hook(lambda *_: None)
    with pytest.raises(RunError, match="hooks"):
        compiled.map([])
