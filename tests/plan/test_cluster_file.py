"""Cluster files: what they describe, and what is wrong with the ones that describe nothing."""

from __future__ import annotations

import json
import pickle

import pytest

from daggc.errors import PlanError
from daggc.plan.cluster_file import load_cluster, read_cluster
from daggc.plan.device import Cluster, Link

THOUSAND = """
[[devices]]
kind = "cuda"
count = 1024
per_host = 8
memory = 80e9
bandwidth = 2.0e12
flops = { gemm = 3.12e14, elementwise = 1e13 }

[links]
within_host = { latency = 5e-6, bandwidth = 3e11 }
between_hosts = { latency = 1e-5, bandwidth = 2.5e10 }

[[links.pairs]]
between = ["gpu:0", "gpu:9"]
bandwidth = 5e10
"""


def test_a_thousand_devices_have_links_by_rule():
    cluster = read_cluster(THOUSAND)
    assert len(cluster.devices) == 1024 and cluster.names[1023] == "gpu:1023"
    assert [cluster.device(f"gpu:{i}").host for i in (0, 7, 8, 1023)] == ["host-0", "host-0", "host-1", "host-127"]
    assert cluster.between("gpu:0", "gpu:7") == Link(5e-6, 3e11)
    assert cluster.between("gpu:7", "gpu:8") == Link(1e-5, 2.5e10)
    assert cluster.between("gpu:9", "gpu:0") == Link(1e-5, 5e10)
    assert len(cluster.links) == 1 and cluster.device("gpu:5").rate("gemm") == 3.12e14


def test_a_mixed_cluster():
    cluster = read_cluster(
        """
        [[devices]]
        kind = "cpu"
        count = 2
        threads = 2
        host = "here"
        [[devices]]
        kind = "cuda"
        host = "here"
        [[devices]]
        kind = "cpu"
        memory = 1e9
        [hosts]
        cores = { "here-0" = 4 }
        """
    )
    assert cluster.names == ("cpu:0", "cpu:1", "gpu:0", "cpu:2")
    assert [device.host for device in cluster.devices] == ["here-0", "here-0", "here-0", "host-2"]
    assert cluster.cores == {"here-0": 4} and cluster.device("cpu:1").threads == 2
    assert cluster.device("cpu:2").memory == 1e9 and cluster.link_within_host is None


def test_round_trip_through_json(tmp_path):
    cluster = read_cluster(THOUSAND + "[hosts]\ncores = 96\n")
    data = json.loads(json.dumps(cluster.to_json()))
    assert Cluster.from_json(data) == cluster
    assert pickle.loads(pickle.dumps(cluster)) == cluster
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps(data))
    assert load_cluster(path) == cluster


WRONG = {
    "[[devices]]\nkind = 'tpu'": r"c.toml:2: devices\[0\].kind: expected one of cpu, cuda, got 'tpu'",
    "[[devices]]\nkind='cpu'\n[[devices]]\nkind='cpu'\nmemory=-1": r"c.toml:5: devices\[1\].memory: .* above 0, got -1",
    "[[devices]]\nkind='cpu'\ncout=3": r"c.toml:3: devices\[0\].cout: not a key that is known",
    "[[devices]]\nkind='cpu'\ncount=1.5": r"c.toml:3: devices\[0\].count: expected an integer above 0, got 1.5",
    "[[devices]]\nkind='cpu'\ncount=true": r"expected an integer above 0, got True",
    "[[devices]]\nkind='cpu'\nname=3": r"c.toml:3: devices\[0\].name: expected a text, got 3",
    "[[devices]]\nkind='cpu'\nflops={gemm=1e9}": r"c.toml:3: devices\[0\].flops: .* at least 'elementwise'",
    "[[devices]]\nkind='cpu'\nflops={elementwise='fast'}": r"flops: elementwise: expected a number above 0",
    "[[devices]]\nkind='cpu'\n[links]\nwithin_host={speed=1}": r"c.toml:4: links.within_host: expected a table of",
    "[[devices]]\nkind='cpu'\n[links]\nwithin_host={bandwidth=0}": r"c.toml:4: links.within_host: .* got 0",
    "[[devices]]\nkind='cpu'\n[[links.pairs]]\nbetween=['cpu:0','cpu:9']": r"c.toml:4: .* there is no device 'cpu:9'",
    "[[devices]]\nkind='cpu'\n[[links.pairs]]\nbetween=['cpu:0']": r"c.toml:4: .* expected two names of devices",
    "[[devices]]\nkind='cpu'\n[hosts.cores]\nelsewhere=4": r"c.toml:4: hosts.cores.elsewhere: there is no host",
    "[hosts]\ncores=4": r"c.toml: devices: expected at least one \[\[devices\]\] table",
    "devices=3": r"c.toml:1: devices: expected at least one",
    "[[devices]\nkind='cpu'": r"c.toml: not TOML: .*line 1",
    "[[devices]]\nkind='cpu'\n[network]": r"c.toml:3: network: not a key that is known",
}


@pytest.mark.parametrize("text", WRONG)
def test_errors_name_line_and_key(text):
    with pytest.raises(PlanError, match=WRONG[text]):
        read_cluster(text, "c.toml")


def test_files_that_are_not_there_or_not_json(tmp_path):
    with pytest.raises(PlanError, match="cannot be read"):
        load_cluster(tmp_path / "none.toml")
    path = tmp_path / "broken.json"
    for text in ("{", "{}", "[]", '{"devices": [3]}'):
        path.write_text(text)
        with pytest.raises(PlanError, match="not a cluster as JSON"):
            load_cluster(path)
