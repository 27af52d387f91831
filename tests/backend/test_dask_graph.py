"""A placed graph as Dask tasks: pure, the same under every hash seed, one task a call."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import daggc
from daggc.backend.dask_graph import Found, Resident, add_collection, emit
from daggc.errors import PlanError
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.call import declare
from daggc.plan.place import place
from daggc.plan.plan import Plan


def plan() -> Plan:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.Tanh())))
    program = daggc.vjp(daggc.trace(model, (torch.ones(4, 16),)))
    return daggc.plan(program, [daggc.cpu_device(0), daggc.cpu_device(1)])


def run(*_: object) -> None:
    """The entry point of tasks; never called here."""


def inputs(placed: Plan) -> dict[str, Found]:
    return {port.ref: Found(f"in-{port.ref}") for port in placed.program.forward.inputs}


def described() -> str:
    made = plan()
    forward = made.program.forward
    emission = emit(forward, "hash", "token", inputs(made), run)
    add_collection(emission, forward, ("output",), "token")
    lines = [
        f"{key} {sorted(map(str, task.dependencies))} {emission.device[key]} {emission.priority[key]} {task.args[:1]}"
        for key, task in emission.tasks.items()
    ]
    return "\n".join([*lines, *(f"{ref} {found}" for ref, found in emission.outputs.items())])


def test_one_task_for_each_call_pinned_to_its_device() -> None:
    made = plan()
    forward = made.program.forward
    emission = emit(forward, "hash", "token", inputs(made), run)
    calls = [node for node in forward.nodes if node.op == "call"]
    assert len(emission.calls) == len(calls) >= 2
    assert [emission.device[key] for key in emission.calls] == [node.attrs["device"] for node in calls]
    assert all(
        key.startswith(f"daggc.{node.attrs['callee']}-token-") for key, node in zip(emission.calls, calls, strict=True)
    )
    assert {port.ref for port in forward.outputs} == set(emission.outputs)


def test_only_what_is_transferred_crosses_devices() -> None:
    made = plan()
    emission = emit(made.program.forward, "hash", "token", inputs(made), run)
    for key in emission.calls:
        for dependency in emission.tasks[key].dependencies:
            if dependency in emission.device and emission.device[dependency] != emission.device[key]:
                assert dependency.startswith("daggc.send-")


def test_emission_does_not_depend_on_the_hash_seed() -> None:
    code = "import sys; sys.path[:0] = sys.argv[1:]; import test_dask_graph; print(test_dask_graph.described())"
    here = os.path.dirname(__file__)
    texts = {
        subprocess.run(
            [sys.executable, "-c", code, here],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("0", "4711")
    }
    assert len(texts) == 1
    assert "daggc." in texts.pop()


def test_an_input_without_a_source_is_named() -> None:
    made = plan()
    with pytest.raises(PlanError, match=r"nothing was given for input 'param:0\.weight'"):
        emit(made.program.forward, "hash", "token", {}, run)


def test_a_resident_value_cannot_move() -> None:
    made = plan()
    resident = {port.ref: Resident(port.ref) for port in made.program.forward.inputs}
    forward = made.program.forward
    transfers = [node for node in forward.nodes if node.op == "transfer"]
    moved = {port.value.name for port in forward.inputs} & {node.inputs[0].name for node in transfers}
    if moved:
        with pytest.raises(PlanError, match="would have to move"):
            emit(forward, "hash", "token", resident, run)
    else:
        assert emit(forward, "hash", "token", resident, run).calls


def test_what_goes_the_same_way_goes_as_one() -> None:
    """Two parameters of a store, and two results of a call, that one call on another device reads: two tasks."""
    vector = TensorType("f32", (4,))
    b = REGISTRY.builder("main")
    given = [b.input(vector, kind, name, name=name) for kind, name in (("input", "x"), ("param", "w"), ("param", "v"))]
    x, w, v = given
    two = declare([vector, vector])
    first = b.emit_many("call", x, callee="first", stage=0, **two)
    b.output(b.emit("call", *first, w, v, callee="second", stage=1, **declare([vector])), "output", "0")
    homes = {"param:w": "cpu:0", "param:v": "cpu:0"}
    placed = place(b.build(), lambda node: f"cpu:{node.attrs['stage']}", lambda port: homes.get(port.ref))
    sources = {"input:x": Found("in-x"), "param:w": Resident("param:w"), "param:v": Resident("param:v")}
    emission = emit(placed, "hash", "token", sources, run, read=read, after={"cpu:0": Found("update")})
    assert len(emission.tasks) == 4
    (fetch,) = (task for key, task in emission.tasks.items() if key.startswith("daggc.fetch"))
    assert fetch.args[0] == ("param:w", "param:v") and fetch.dependencies == {"update"}
    (send,) = (task for key, task in emission.tasks.items() if key.startswith("daggc.send"))
    assert send.args[1] == (0, 1)
    assert emission.tasks[emission.calls[1]].dependencies == {fetch.key, send.key}


def read(*_: object) -> None:
    """The entry point of tasks that read a store; never called here."""
