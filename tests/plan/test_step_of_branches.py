"""Training steps whose stages are no chain: two towers and their join, parallel branches."""

from __future__ import annotations

import numpy as np
import pytest

from daggc.interp import interpret, interpret_graph
from daggc.ir.graph import Graph, Program
from daggc.ir.types import TensorType
from daggc.ir.verifier import verify
from daggc.ops import REGISTRY
from daggc.passes.microbatch import microbatched, rewrite_like
from daggc.passes.vjp import differentiate, simplify, vjp
from daggc.plan.bodies import Group
from daggc.plan.device import Device, Link, cluster_of
from daggc.plan.outline import outline
from daggc.plan.plan import plan_model
from daggc.plan.schedule import split_batch
from daggc.plan.step import Part, step_graph

WIDTH = 6
CLUSTER = cluster_of(
    [Device(f"cpu:{i}", "cpu", {"elementwise": 1e6}, 1e12, 1e9, overhead=0.0, launch=0.0) for i in range(2)],
    Link(0.0, 1e12),
)


def _towers(batch: int) -> Graph:
    """Towers of two layers each, one bias added to both of them, and the mean of their product."""
    b = REGISTRY.builder("forward")
    shared = b.input(TensorType("f64", (WIDTH,)), "param", "shared.bias")
    tops = []
    for index in range(2):
        x = b.input(TensorType("f64", (batch, WIDTH)), "input", str(index))
        for layer in range(2):
            name = f"towers.{index}.{layer}"
            w = b.input(TensorType("f64", (WIDTH, WIDTH)), "param", f"{name}.weight")
            bias = shared if layer else b.input(TensorType("f64", (WIDTH,)), "param", f"{name}.bias")
            with b.at(path=name):
                x = b.emit("tanh", b.emit("linear", x, w, bias))
        tops.append(x)
    return _with_loss(b, b.emit("mul", *tops))


def _branches(batch: int) -> Graph:
    b = REGISTRY.builder("forward")
    x = b.input(TensorType("f64", (batch, WIDTH)), "input", "0")
    w = b.input(TensorType("f64", (WIDTH, WIDTH)), "param", "stem.weight")
    with b.at(path="stem"):
        x = b.emit("tanh", b.emit("linear", x, w))
    total = None
    for index in range(4):
        w = b.input(TensorType("f64", (WIDTH, WIDTH)), "param", f"branches.{index}.weight")
        bias = b.input(TensorType("f64", (WIDTH,)), "param", f"branches.{index}.bias")
        with b.at(path=f"branches.{index}"):
            y = b.emit("linear", b.emit("tanh", b.emit("linear", x, w)), w, bias)
        with b.at(path="join"):
            total = y if total is None else b.emit("add", total, y)
    assert total is not None
    return _with_loss(b, total)


def _with_loss(b, x) -> Graph:
    with b.at(path="join"):
        b.output(b.emit("mean", x, dims=(0, 1), keepdim=False), "output", "0")
    return b.build()


@pytest.mark.parametrize("build", [_towers, _branches])
@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("split_backward", [False, True])
def test_steps_of_stages_that_are_no_chain(build, microbatches: int, schedule: str, split_backward: bool) -> None:
    batch = 6
    whole = build(batch)
    inputs = tuple(port.target for port in whole.inputs_of("input"))
    wrt = [port.ref for port in whole.inputs_of("param")]
    pins = {"towers.0": "cpu:0", "towers.1.0": "cpu:1"} if build is _towers else {"branches.[13]": "cpu:1"}
    plan = plan_model(Program({"forward": whole}), CLUSTER, wrt=wrt, partition="list", pins=pins)
    devices = [stage.device for stage in plan.stages]
    assert set(devices) == {"cpu:0", "cpu:1"}
    parts: dict[int, Part] = {}
    sizes = split_batch(batch, microbatches)
    analysed = microbatched(whole, inputs, "0", build(batch + 1))
    for size in sizes:
        result = rewrite_like(build(size), whole, analysed) if microbatches > 1 else None
        forward = result.forward if result else whole
        # the rewritten loss has a node more, which goes where the mean is
        last = max(plan.stage_of.values())
        stage_of = {node.outputs[0].name: plan.stage_of.get(node.outputs[0].name, last) for node in forward.nodes}
        main, bodies = outline(simplify(differentiate(forward, wrt)), forward, stage_of, split_backward=split_backward)
        parts[size] = Part(main, bodies, result.denominators if result else None, inputs)
    names = tuple(ref.removeprefix("param:") for ref in wrt)
    step = step_graph(parts, sizes, [Group("0", names, "sgd")], devices, schedule=schedule)
    verify(step.program, REGISTRY)
    rng = np.random.default_rng(0)
    arrays = {port.ref: rng.normal(size=port.value.type.shape) for port in whole.inputs}
    given = []
    for port in step.graph.inputs:
        target, _, microbatch = port.target.partition("#")
        if port.kind == "input":
            at = int(microbatch or 0)
            given.append(arrays[f"input:{target}"][sum(sizes[:at]) : sum(sizes[: at + 1])])
        elif port.kind == "scalar":
            fraction = sizes[int(microbatch)] / batch if target == "fraction" else 0
            given.append(np.asarray({"lr:0": 0.1, "step": 1.0}.get(target, fraction)))
        else:
            given.append(arrays[port.ref])
    results = interpret_graph(step.graph, given, step.program)
    got = {port.ref: array for port, array in zip(step.graph.outputs, results, strict=True)}
    wanted = interpret(vjp(Program({"forward": whole}), wrt), {**arrays, "cotangent:output:0": np.ones(())})
    np.testing.assert_allclose(got["output:0"], wanted["output:0"], rtol=1e-12)
    homes = {port.ref: port.value.type.device for port in step.graph.inputs_of("param")}
    for port in step.graph.outputs_of("param"):
        expected = arrays[port.ref] - 0.1 * wanted[f"grad:{port.ref}"]
        np.testing.assert_allclose(got[port.ref], expected, rtol=1e-10, atol=1e-12)
        assert port.value.type.device == homes[port.ref], "an update stays with its parameter"
