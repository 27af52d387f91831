"""Workers on hosts of their own: network, processes and host name are apart, as namespaces of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import dask
import pytest
from cluster import SETTINGS
from distributed import Client, LocalCluster

_TOOLS = ("ip", "unshare", "hostname")
_WORKER = "{python} -m distributed.cli.dask_worker {scheduler} --host {own} --nthreads 1 --no-nanny --no-dashboard"


@contextmanager
def hosts(count: int, log: Path) -> Iterator[Client]:
    """A client of one worker on each of so many hosts, which a bridge connects; skips where it may not make them."""
    if os.geteuid() or not all(map(shutil.which, _TOOLS)):
        pytest.skip(f"hosts are made by root, with {', '.join(_TOOLS)}")
    tag = f"{os.getpid() % 100_000}"
    bridge, net = f"dgb{tag}", f"10.{77 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
    with ExitStack() as made, dask.config.set(SETTINGS):
        try:
            _run(f"ip link add {bridge} type bridge")
            made.callback(_run, f"ip link delete {bridge}")
            _run(f"ip addr add {net}.1/24 dev {bridge}", f"ip link set {bridge} up")
            for index in range(count):
                host = f"dg{tag}-{index}"
                _run(f"ip netns add {host}")
                made.callback(_run, f"ip netns delete {host}")
                _run(
                    f"ip link add v{tag}{index} type veth peer name eth0 netns {host}",
                    f"ip link set v{tag}{index} master {bridge} up",
                    f"ip -n {host} addr add {net}.{index + 2}/24 dev eth0",
                    f"ip -n {host} link set eth0 up",
                    f"ip -n {host} link set lo up",
                )
        except subprocess.CalledProcessError as wrong:
            pytest.skip(f"hosts cannot be made here: {wrong.stderr}")
        cluster = made.enter_context(LocalCluster(n_workers=0, host=f"{net}.1", dashboard_address=None))
        for index in range(count):
            worker = _WORKER.format(
                python=sys.executable, scheduler=cluster.scheduler_address, own=f"{net}.{index + 2}"
            )
            apart = "unshare --pid --fork --kill-child --mount-proc --ipc --uts"
            command = f"ip netns exec dg{tag}-{index} {apart} sh -c".split()
            out = made.enter_context((log / f"host{index}.log").open("w"))
            process = subprocess.Popen([*command, f"hostname host{index}; exec {worker}"], stdout=out, stderr=out)
            made.callback(_end, process)
        client = made.enter_context(Client(cluster, set_as_default=False, timeout=60))
        client.wait_for_workers(count, timeout=60)
        yield client


def _run(*commands: str) -> None:
    for command in commands:
        subprocess.run(command.split(), check=True, capture_output=True, text=True, timeout=30)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
    time.sleep(0.1)  # its network goes with its last process
