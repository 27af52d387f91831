"""The doctor: nothing to say of a cluster that daggc starts, what to set on others, and never a hang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import dask
import pytest
import torch
import yaml
from cluster import processes
from distributed import Client, LocalCluster

import daggc
from daggc.runtime.doctor import Check, Diagnosis
from daggc.runtime.doctor.checks import (
    check_allocator,
    check_gpus,
    check_replicas,
    check_streams,
    check_threads,
    check_transfers,
    check_versions,
)
from daggc.runtime.doctor.facts import SchedulerFacts, WorkerFacts, this_process
from daggc.runtime.doctor.transfers import KINDS, differs, made
from daggc.runtime.local_workers import dask_settings, local_workers, worker_environment
from daggc.runtime.pool import pool_of
from daggc.runtime.streams import AT_ONCE, DASK

pytestmark = pytest.mark.timeout(180)

PROCESS = this_process()
SCHEDULER = SchedulerFacts(PROCESS.versions, False, 30.0, 60.0, AT_ONCE, ())


def worker(name: str = "0", **changes: Any) -> WorkerFacts:
    """A worker as daggc starts them, but for these changes of its process."""
    process = replace(PROCESS, **changes)
    environment: Any = {"device": "cpu"}
    return WorkerFacts(
        f"tcp://{name}", name, process, 2, 0.0, {}, False, 0.0, 4080, "daggc.backend.serializers", environment
    )


def by_name(diagnosis: Diagnosis) -> dict[str, Check]:
    return {check.name: check for check in diagnosis.checks}


@contextmanager
def in_process() -> Iterator[Client]:
    """A client of a cluster in this process, with Dask's own settings but for the memory limit."""
    with (
        dask.config.set({"distributed.worker.profile.enabled": True}),  # other tests turn it off for all
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, processes=False) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.mark.slow
def test_nothing_to_say_of_workers_that_daggc_starts() -> None:
    with local_workers(2) as client:
        found = by_name(daggc.doctor(client))
        assert {name: check.level for name, check in found.items() if check.level != "ok" and name != "threads"} == {}
        assert "14 kinds of tensors arrive as they were, from worker to worker" in found["transfers"].found
        assert "daggc sets them when it takes the cluster into use" in found["streams"].fix
        pool_of(client)
        assert by_name(daggc.doctor(client))["streams"].found == "messages are sent at once"


def test_a_cluster_as_dask_makes_it_gets_the_settings_it_lacks() -> None:
    with in_process() as client:
        diagnosis = daggc.doctor(client)
    found = by_name(diagnosis)
    warned = {name for name, check in found.items() if check.level == "warn"}
    assert warned >= {"threads of Dask", "work stealing", "profile", "worker-ttl", "no-workers-timeout"}
    assert diagnosis.level == "warn"
    assert found["transfers"].level == found["versions"].level == found["sizes and serializers"].level == "ok"
    distributed = yaml.safe_load(diagnosis.yaml)["distributed"]
    assert distributed["scheduler"] == {
        "work-stealing": False,
        "worker-ttl": "30s",
        "no-workers-timeout": "60s",
    }
    assert distributed["worker"]["profile"] == {"enabled": False}


def test_the_settings_it_prints_are_those_of_daggc() -> None:
    """Of every setting that it prints, the value is that of clusters which daggc starts."""
    with in_process() as client:
        checks = daggc.doctor(client).checks
    own = dask_settings(PROCESS.threads)
    assert all(own[key] == value for check in checks for key, value in check.settings.items() if key in own)


def test_without_a_cluster_this_machine_is_looked_at() -> None:
    diagnosis = daggc.doctor()
    assert set(by_name(diagnosis)) == {"versions", "cores", "GPUs", "configuration"}
    assert diagnosis.level == "warn"
    with dask.config.set(dask_settings()):
        assert daggc.doctor().level == "ok"
        assert daggc.doctor().yaml == ""


@pytest.mark.slow
def test_a_worker_that_hangs_is_a_finding() -> None:
    with processes(2) as client:
        pool_of(client)  # torch is imported
        stopped = client.run(os.getpid)
        address, pid = next(iter(stopped.items()))
        os.kill(pid, signal.SIGSTOP)
        try:
            start = time.monotonic()
            diagnosis = daggc.doctor(client, seconds=4)
            assert time.monotonic() - start < 60
        finally:
            os.kill(pid, signal.SIGCONT)
    assert diagnosis.level == "bad"
    (silent,) = (check for check in diagnosis.checks if address in check.name)
    assert silent.found == "it does not answer within 4 s"
    assert by_name(diagnosis)["transfers"].level == "ok"


def test_a_closed_client_is_a_finding() -> None:
    with in_process() as client:
        client.close()
        diagnosis = daggc.doctor(client)
    assert diagnosis.level == "bad" and "closed" in diagnosis.checks[0].found


def test_no_workers_is_a_finding() -> None:
    with (
        LocalCluster(n_workers=0, dashboard_address=None, processes=False) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        assert by_name(daggc.doctor(client))["workers"].level == "bad"


@pytest.mark.parametrize(
    ("versions", "level"),
    [
        ({}, "ok"),
        ({"torch": PROCESS.versions["torch"].partition("+")[0] + "+cu999"}, "ok"),
        ({"torch": "1.0.0"}, "bad"),
        ({"python": "3.1.0"}, "bad"),
        ({"dask": "2020.1.0"}, "warn"),
    ],
)
def test_versions_that_must_agree(versions: dict[str, str], level: str) -> None:
    other = worker("7", versions={**PROCESS.versions, **versions})
    check = check_versions(PROCESS, SCHEDULER, [worker(), other])
    assert check.level == level
    assert (level == "ok") == ("worker" not in check.found) or "7 (tcp://7)" in check.found


def test_threads_beyond_the_cores_of_a_host() -> None:
    def level(*threads: int) -> str:
        return check_threads([worker(str(i), threads=n, cores=4) for i, n in enumerate(threads)]).level

    assert (level(2, 2), level(4, 1), level(1), level(1, 1)) == ("ok", "warn", "warn", "ok")


def test_an_allocator_that_gives_memory_back() -> None:
    own = worker_environment()
    assert check_allocator([worker(variables=own, glibc=True)]).level == "ok"
    larger = {**own, "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "GLIBC_TUNABLES": f"a=1:{own['GLIBC_TUNABLES']}"}
    assert check_allocator([worker(variables=larger, glibc=True)]).level == "ok"
    assert check_allocator([worker(variables={"LD_PRELOAD": "libjemalloc.so.2"}, glibc=True)]).level == "ok"
    assert check_allocator([worker(variables={}, glibc=False)]).level == "ok"
    check = check_allocator([worker(variables={**own, "MALLOC_TRIM_THRESHOLD_": "65536"}, glibc=True)])
    assert check.level == "warn" and check.found == "MALLOC_TRIM_THRESHOLD_=65536 on worker 0"
    assert list(check.settings) == ["distributed.nanny.pre-spawn-environ"]


def test_a_gpu_that_torch_does_not_see() -> None:
    assert check_gpus([("a", replace(PROCESS, has_gpu=True, gpus=()))]).level == "warn"
    assert check_gpus([("a", replace(PROCESS, has_gpu=True, gpus=("H100",)))]).found == "a: H100"


def test_streams_that_daggc_cannot_set() -> None:
    slow = replace(SCHEDULER, intervals=DASK)
    assert check_streams(slow, [worker()], 0.01, "on").level == "ok"
    assert check_streams(slow, [worker()], 0.01, "off").level == "warn"
    forbidden = replace(slow, blocked=("register_scheduler_plugin",))
    check = check_streams(forbidden, [worker()], 0.01, "on")
    assert check.level == "warn" and "distributed.scheduler.blocked-handlers" in check.fix


def test_a_tensor_that_arrives_otherwise() -> None:
    assert [differs(kind, made(kind)) for kind in KINDS] == [""] * len(KINDS)
    assert "strides" in differs("float32 channels_last", made("float32"))
    assert "other numbers" in differs("float32", made("float32") + 1)
    assert "float16" in differs("bfloat16", made("float16"))
    assert "list" in differs("bool", [torch.ones(1)])
    assert check_transfers([("bool", ""), ("bfloat16", "gone")], "here").level == "bad"


def test_copies_of_values_are_dropped_only_where_plugins_are_forbidden() -> None:
    assert check_replicas(SCHEDULER).found == "those of steps are kept"
    dropping = replace(SCHEDULER, drops_replicas=True)
    found = check_replicas(dropping)
    assert found.level == "ok" and "daggc keeps its own" in found.fix and not found.settings
    found = check_replicas(replace(dropping, blocked=("register_scheduler_plugin",)))
    assert found.level == "warn" and found.settings == {"distributed.scheduler.active-memory-manager.start": False}
