"""Hypothesis profiles: the default one is small and repeatable, ``--hypothesis-profile=deep`` searches on."""

from __future__ import annotations

import importlib
import os
import pkgutil

import pytest
import torch
from hypothesis import HealthCheck, settings

import daggc

_QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)

settings.register_profile("quick", max_examples=25, derandomize=True, deadline=None, suppress_health_check=_QUIET)
settings.register_profile("deep", max_examples=2000, deadline=None, suppress_health_check=_QUIET, print_blob=True)
settings.load_profile("quick")

# Hypothesis also draws from the constants of the package's modules that are loaded. All are, so that an example does
# not depend on which tests ran before in the same process.
for module in pkgutil.walk_packages(daggc.__path__, "daggc."):
    importlib.import_module(module.name)

torch.set_num_threads(1)
os.environ.setdefault("DAGGC_CALIBRATE", "off")  # tests that measure say so; others would differ from day to day


@pytest.fixture(scope="session")
def two_workers():
    """A Dask client of two worker processes with one thread each, shared by all tests that need no more."""
    from cluster import processes  # most tests need no cluster

    with processes(2) as client:
        yield client
