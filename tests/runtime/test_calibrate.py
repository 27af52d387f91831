"""Calibration of real workers: what it measures, what it keeps, and that it predicts what steps take."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from distributed import Client
from torch import nn

import daggc
from daggc.errors import RunError
from daggc.plan.device import Cluster, Device, Link
from daggc.report.devices import cluster_text
from daggc.runtime import calibrate as module
from daggc.runtime.calibrate import calibrate_program, calibrated, measured_pool
from daggc.runtime.calibration.cache import VERSION, cache_directory, read_entry, write_entry
from daggc.runtime.calibration.refine import MeasuredTask, measured_tasks, predicted_seconds, refined
from daggc.runtime.calibration.session import Shared, kept, restored
from daggc.runtime.pool import Pool, pool_of

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield cache_directory()


@pytest.fixture(scope="module")
def pool(two_workers: Client) -> Pool:
    return pool_of(two_workers)


@pytest.fixture(scope="module")
def cluster(pool: Pool, cache: Path) -> Cluster:
    return calibrated(pool, seconds=0.1)


def test_two_workers(cluster: Cluster, pool: Pool) -> None:
    assert cluster.names == pool.cluster.names == ("cpu:0", "cpu:1")
    first, second = cluster.devices
    assert first.host == second.host != ""
    assert first.threads == second.threads == 1
    assert cluster.cores[first.host] >= 1
    assert {"matmul", "conv", "attention_backward", "adamw_update", "elementwise", "copy"} <= set(first.curves)
    assert first.rate("gemm") > first.rate("elementwise") > 1e6
    assert 0 < first.overhead < 1
    assert min(first.slowdown.values()) >= 1
    link = cluster.between("cpu:0", "cpu:1")
    assert 0 < link.latency < 5
    assert link.bandwidth > 1e6
    assert "curves" in cluster_text(cluster)
    assert "cpu:0 - cpu:1" in cluster_text(cluster)
    assert Cluster.from_json(json.loads(json.dumps(cluster.to_json()))) == cluster


def test_what_is_known_is_not_measured_again(cluster: Cluster, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibrated(pool) is cluster  # of this client
    monkeypatch.setattr(module, "_CALIBRATED", {})
    assert calibrated(pool, measure=False) == cluster  # of an earlier process
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere/at/all")
    ordinary = calibrated(pool, measure=False)
    assert not ordinary.devices[0].curves
    assert ordinary.devices[0].host == cluster.devices[0].host


def test_damaged_and_foreign_files_are_ignored(cluster: Cluster, pool: Pool, cache: Path) -> None:
    (path,) = cache.glob("device-*.json")
    whole = path.read_text()
    identity = json.loads(whole)["identity"]
    entry = read_entry("device", identity)
    plain = pool.cluster.devices[0]
    made = restored(plain, entry)
    assert made is not None
    assert kept(made) == entry
    for text in (
        whole[: len(whole) // 2],
        "[" * 100_000,
        "null",
        whole.replace(f'"version": {VERSION}', '"version": 0'),
        json.dumps({**json.loads(whole), "identity": {**identity, "host": "elsewhere"}}),
    ):
        path.write_text(text)
        assert read_entry("device", identity) is None
    path.write_bytes(b"\xff\xfe\x00")
    assert read_entry("device", identity) is None
    path.write_text(whole)
    assert read_entry("device", identity) == entry
    for wrong in (
        None,
        [],
        {},
        {**entry, "bandwidth": "fast"},
        {**entry, "bandwidth": True},
        {**entry, "launch": -1.0},
        {**entry, "overhead": float("nan")},
        {**entry, "curves": {"matmul": []}},
        {**entry, "curves": {"matmul": [[1, 2]]}},
        {**entry, "curves": [1]},
        {**entry, "flops": {}},
        {**entry, "name": "cpu:9"},
    ):
        assert restored(plain, wrong) is None
    assert Shared.from_json({"links": [["cpu:0", "cpu:9", 1, 1]], "slowdown": {}}, pool.cluster.names) is None
    assert Shared.from_json({"links": [["cpu:0", "cpu:1", 0, 1]], "slowdown": {}}, pool.cluster.names) is None
    assert Shared.from_json(7, pool.cluster.names) is None


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "daggc").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_entry("device", 1, 2)
    assert read_entry("device", 1) is None
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "daggc" / "calibration"
    write_entry("device", (1, "x"), {"a": 0.1})
    assert read_entry("device", (1, "x")) == {"a": 0.1}


def test_many_links_have_typical_ones() -> None:
    def device(index: int, host: str) -> Device:
        return Device(f"cpu:{index}", "cpu", {"elementwise": 1.0}, 1.0, 1.0, host=host)

    cluster = Cluster(tuple(device(index, "ab"[index // 2]) for index in range(4)))
    near, far = Link(1.0, 2.0), Link(3.0, 4.0)
    made = Shared({"a": {"gemm": 1.5}}, {("cpu:0", "cpu:1"): near, ("cpu:1", "cpu:2"): far}).connect(cluster)
    assert made.between("cpu:2", "cpu:3") == near
    assert made.between("cpu:0", "cpu:3") == far
    assert [dict(own.slowdown) for own in made.devices] == [{"gemm": 1.5}] * 2 + [{}] * 2


def test_the_switch(pool: Pool, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGGC_CALIBRATE", "off")
    assert measured_pool(pool) is pool
    monkeypatch.setenv("DAGGC_CALIBRATE", "")
    assert measured_pool(pool).cluster is cluster
    monkeypatch.setenv("DAGGC_CALIBRATE", "cached")
    assert measured_pool(pool).cluster is cluster
    monkeypatch.setenv("DAGGC_CALIBRATE", "yes")
    with pytest.raises(RunError, match="DAGGC_CALIBRATE is auto, cached or off, got 'yes'"):
        measured_pool(pool)


def test_without_a_client() -> None:
    with pytest.raises(RunError, match="there is no client"):
        daggc.calibrate()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [256, 512, 384, 512, 10]
        pairs = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.GELU())]
        self.layers = nn.Sequential(*pairs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_a_step_is_predicted_and_refined(cluster: Cluster, pool: Pool, two_workers: Client) -> None:
    torch.manual_seed(0)
    model = Net()
    step = daggc.compile(model, client=two_workers).train_step(F.cross_entropy, torch.optim.AdamW(model.parameters()))
    for _ in range(6):
        float(step(torch.randn(256, 256), torch.randint(0, 10, (256,))))
    program = step.step_program
    assert program is not None
    tasks = measured_tasks(program.step.graph, program.step.program, step.records(), skip=2)
    assert {task.device for task in tasks} == {
        node.attrs["device"] for node in program.step.graph.nodes if node.op == "call"
    }
    large = [task for task in tasks if task.seconds > 2e-3]
    assert large
    profiled = calibrate_program(replace(pool, cluster=cluster), program.step.program, 0.0)
    assert len(profiled.devices[0].profile) > 20
    assert dict(profiled.devices[0].profile) == dict(profiled.devices[1].profile)
    begin = time.perf_counter()
    again = calibrate_program(replace(pool, cluster=cluster), program.step.program, 60.0)
    assert time.perf_counter() - begin < 30  # it is read from the cache
    assert again == profiled
    for task in large:  # others may use the machine, by which a task takes longer but not shorter
        for known in (cluster, profiled):
            assert 0.01 < predicted_seconds(known, task) / task.seconds < 10
    corrected = refined(cluster, large)
    for task in large:
        usual = predicted_seconds(cluster, task)
        wanted = min(max(task.seconds, 0.2 * usual), 5 * usual)  # what is further off was disturbed
        assert predicted_seconds(corrected, task) == pytest.approx(wanted, rel=0.5)
    step.close()


def test_refinement_gives_the_measured_time_back(cluster: Cluster) -> None:
    device = cluster.devices[0]
    program = daggc.trace(Net(), (torch.ones(8, 256),))
    usual = predicted_seconds(cluster, MeasuredTask(device.name, program.forward, 1.0))
    task = MeasuredTask(device.name, program.forward, 2 * usual)
    corrected = refined(cluster, [task])
    assert predicted_seconds(corrected, task) == pytest.approx(2 * usual)
    assert corrected.devices[1] == cluster.devices[1]
    wild = refined(cluster, [replace(task, seconds=1e6 * usual)])
    assert predicted_seconds(wild, task) == pytest.approx(5 * usual, rel=0.1)
    assert refined(cluster, []) == cluster
