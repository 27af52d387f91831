"""``daggc doctor``: a table with what to set, plain data, and the exit status."""

from __future__ import annotations

import json

import dask
import pytest
import yaml
from click.testing import CliRunner
from distributed import LocalCluster

from daggc.cli import main
from daggc.runtime.local_workers import dask_settings


def test_this_machine_lacks_settings_which_are_printed_as_yaml() -> None:
    with dask.config.set({"distributed.worker.profile.enabled": True}):  # other tests turn it off for all
        result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "warn" in result.stdout and "configuration" in result.stdout
    printed = yaml.safe_load(result.stdout[result.stdout.index("distributed:\n") :])
    with dask.config.set(printed):
        assert all(dask.config.get(key) == value for key, value in dask_settings().items())
        again = CliRunner().invoke(main, ["doctor", "--json"])
    assert again.exit_code == 0
    assert json.loads(again.stdout)["level"] == "ok"


@pytest.mark.timeout(120)
def test_something_bad_is_exit_status_1() -> None:
    with LocalCluster(n_workers=0, dashboard_address=":0", processes=False, protocol="tcp") as cluster:
        result = CliRunner().invoke(main, ["doctor", "--json", "--scheduler", cluster.scheduler_address])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["level"] == "bad"
    assert [check["check"] for check in found["checks"]] == ["workers"]


@pytest.mark.slow
def test_a_scheduler_that_is_not_there() -> None:
    result = CliRunner().invoke(main, ["doctor", "--scheduler", "tcp://127.0.0.1:1"])
    assert result.exit_code == 1
    assert "no Dask scheduler answers" in result.stderr
