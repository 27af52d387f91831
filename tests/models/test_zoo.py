"""Every model of the zoo beside eager PyTorch: in this process, and on two worker processes."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import zoo
from distributed import Client
from versus_eager import make, tensors_of, versus_eager

import daggc

MODES = {"train": True, "eval": False}
DTYPES = {"f64": torch.float64, "f32": torch.float32}
FAST_IN_F32 = {("gpt2", "train"), ("t5", "eval"), ("resnet", "train"), ("cnn", "train"), ("tied", "train")}
FAST_ON_WORKERS = {("gpt2", "train"), ("t5", "eval"), ("cnn", "train"), ("custom", "eval"), ("tied", "train")}


def _cross(fast: dict[str, set[tuple[str, str]] | None]) -> list[Any]:
    """All models, modes and dtypes; those not in ``fast`` (None: all of a dtype) are marked slow."""
    cases = []
    for name, mode, dtype in product(zoo.ZOO, MODES, DTYPES):
        chosen = fast[dtype]
        marks = () if chosen is None or (name, mode) in chosen else pytest.mark.slow
        cases.append(pytest.param(name, mode, dtype, marks=marks))
    return cases


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("name", "mode", "dtype"), _cross({"f64": None, "f32": FAST_IN_F32}))
def test_equals_eager_here(name: str, mode: str, dtype: str) -> None:
    versus_eager(name, MODES[mode], DTYPES[dtype], daggc.compile)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("name", "mode", "dtype"), _cross({"f64": FAST_ON_WORKERS, "f32": set()}))
def test_equals_eager_on_two_workers(two_workers: Client, name: str, mode: str, dtype: str) -> None:
    compiled = versus_eager(name, MODES[mode], DTYPES[dtype], partial(daggc.compile, client=two_workers))[1]
    shares = compiled.plan.shares()
    assert len(compiled.plan.stages) >= 2
    assert len(shares) == 2
    assert min(shares.values()) >= 0.25, compiled.plan.explain()


@pytest.mark.timeout(120)
def test_opaque_layers_run_on_both_workers(two_workers: Client) -> None:
    two_workers.run(lambda: __import__("zoo").PLACES.clear())
    case = make("opaque", True, torch.float64)
    daggc.compile(case.model, client=two_workers)(*case.args).sum().backward()
    places = two_workers.run(lambda: __import__("zoo").PLACES)
    assert all(set(ran) == {address} for address, ran in places.items())
    assert len(places) == 2


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["gpt2", "t5", "cnn"])
def test_inference_without_gradients(name: str) -> None:
    case = make(name, False, torch.float64)
    with torch.no_grad():
        result = daggc.compile(case.model)(*case.args, **case.kwargs)
        expected = case.model(*case.args, **case.kwargs)
    for (_, mine), (path, theirs) in zip(tensors_of(result), tensors_of(expected), strict=True):
        assert not mine.requires_grad
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10, msg=path)
