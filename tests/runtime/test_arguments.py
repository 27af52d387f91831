"""Arguments that mean nothing are refused before anything is captured, by what was required."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import Client
from training import adamw, mlp

import daggc
from daggc.errors import CaptureError, RunError


@pytest.mark.parametrize(
    ("given", "required"),
    [
        ({"microbatches": 2.5}, "microbatches is a whole number, at least 1"),
        ({"microbatches": None}, "microbatches is a whole number"),
        ({"replicas": 0}, "replicas is a whole number"),
        ({"max_grad_norm": "1"}, "max_grad_norm is a positive number"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm is a positive number"),
        ({"stages": 1.5}, "stages is a whole number"),
        ({"replan_after": 0}, "replan_after is a number of steps"),
    ],
    ids=str,
)
def test_of_a_train_step(given: dict[str, Any], required: str) -> None:
    model = mlp()
    with pytest.raises(RunError, match=required):
        daggc.compile(model).train_step(F.cross_entropy, adamw(model), **given)


def test_of_a_train_step_by_place() -> None:
    model = mlp()
    with pytest.raises(RunError, match="loss_fn is a function"):
        daggc.compile(model).train_step("mse", adamw(model))  # pyright: ignore[reportArgumentType]
    with pytest.raises(RunError, match=r"optimizer is an object of torch\.optim"):
        daggc.compile(model).train_step(F.cross_entropy, torch.optim.SGD)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("given", "required"),
    [
        ({"client": "tcp://127.0.0.1:1"}, r"open one: Client\('tcp://127.0.0.1:1'\)"),
        ({"stages": 0}, "stages is a whole number, at least 1"),
        ({"devices": "cpu:0"}, r"one device: \['cpu:0'\]"),
        ({"devices": []}, "there is no client"),
        ({"pins": [("0", "cpu:0")]}, "pins is a dict"),
        ({"codegen": "c"}, "codegen is"),
    ],
    ids=str,
)
def test_of_compile(given: dict[str, Any], required: str) -> None:
    with pytest.raises(RunError, match=required):
        daggc.compile(mlp(), **given)


def test_an_asynchronous_client() -> None:
    async def refused() -> None:
        options = {"processes": False, "n_workers": 0, "dashboard_address": None, "asynchronous": True}
        async with Client(set_as_default=False, **options) as client:
            with pytest.raises(RunError, match="without asynchronous=True"):
                daggc.compile(mlp(), client=client)

    asyncio.run(refused())


def test_a_compiled_model() -> None:
    with pytest.raises(CaptureError, match="the model is compiled already"):
        daggc.compile(daggc.compile(mlp()))
    with pytest.raises(CaptureError, match="'1' of the model is compiled already"):
        daggc.compile(torch.nn.Sequential(torch.nn.Tanh(), daggc.compile(mlp())))
