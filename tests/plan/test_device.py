"""Devices, links and clusters."""

from __future__ import annotations

import json
import pickle

import pytest

from daggc.errors import PlanError
from daggc.plan.device import Cluster, Device, Link, cpu_device, gpu_device


def test_an_unknown_device_is_named_with_those_that_exist() -> None:
    cluster = Cluster((cpu_device(0), gpu_device(0)))
    assert cluster.device("gpu:0").kind == "cuda"
    with pytest.raises(PlanError, match="no device 'gpu:1'; there are cpu:0, gpu:0"):
        cluster.device("gpu:1")
    with pytest.raises(PlanError, match="no device 'cpu:9'"):
        Cluster((cpu_device(0),), links={("cpu:0", "cpu:9"): Link()})


def test_bad_devices_are_refused() -> None:
    with pytest.raises(PlanError, match="at least one device"):
        Cluster(())
    with pytest.raises(PlanError, match="two devices are named 'cpu:0'"):
        Cluster((cpu_device(0), cpu_device(0)))
    with pytest.raises(PlanError, match="a kind is one of cpu, cuda, got 'tpu'"):
        Device("x", "tpu", {"elementwise": 1.0}, 1.0, 1.0)
    with pytest.raises(PlanError, match="'elementwise'"):
        Device("x", "cpu", {"gemm": 1.0}, 1.0, 1.0)


def test_links() -> None:
    fast = Link(1e-6, 1e11)
    cluster = Cluster((cpu_device(0), cpu_device(1), cpu_device(2)), links={("cpu:0", "cpu:1"): fast})
    assert cluster.between("cpu:1", "cpu:0") is fast
    assert cluster.between("cpu:1", "cpu:2") == cluster.link
    assert cluster.between("cpu:1", "cpu:1").seconds(1e9) == 0
    assert Link(0.5, 100).seconds(200) == 2.5
    assert Link(0.5, 100).seconds(0) == 0


def test_a_device_travels() -> None:
    device = gpu_device(3)
    assert pickle.loads(pickle.dumps(device)) == device
    assert device.rate("gemm") > device.rate("elementwise") == device.rate("view")
    assert json.loads(json.dumps(Cluster((device,)).to_json()))["devices"][0]["name"] == "gpu:3"
