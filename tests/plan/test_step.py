"""A step graph, interpreted, is a plain step on the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from batches import CHANNELS, CLASSES, TIME, arrays_for, aten, b_emit, f64, i64
from helpers import to_numpy, to_torch

from daggc.backend.codegen import compile_graph
from daggc.errors import PlanError
from daggc.interp import interpret, interpret_graph
from daggc.ir.builder import Builder
from daggc.ir.graph import Graph, Program, Value
from daggc.ir.parser import parse
from daggc.ir.printer import print_program
from daggc.ir.verifier import verify
from daggc.ops import REGISTRY
from daggc.ops.build import broadcast, reshape
from daggc.ops.optim import SCALAR, adamw_update, sgd_update
from daggc.passes.microbatch import microbatched, rewrite_like
from daggc.passes.vjp import differentiate, simplify, vjp
from daggc.plan.bodies import Group
from daggc.plan.device import cluster_of, cpu_device
from daggc.plan.fuse import fused
from daggc.plan.outline import outline
from daggc.plan.part import Part, Step
from daggc.plan.schedule import split_batch
from daggc.plan.simulate import simulate
from daggc.plan.step import step_graph

Build = Callable[[int], Graph]


def mlp(batch: int) -> Graph:
    b = REGISTRY.builder("forward")
    x, target = b.input(f64(batch, CHANNELS), "input", "0"), b.input(f64(batch, CHANNELS), "input", "1")
    for layer in range(4):
        w = b.input(f64(CHANNELS, CHANNELS), "param", f"{layer}.weight", name=f"w{layer}")
        bias = b.input(f64(CHANNELS), "param", f"{layer}.bias", name=f"b{layer}")
        with b.at(f"layers.{layer}"):
            x = b.emit("tanh", b.emit("linear", x, w, bias))
    b.output(aten(b, "mse_loss.default", x, target, 1), "output", "0")
    return b.build()


def attention(batch: int) -> Graph:
    """Tied embeddings, causal attention, positions that no layer changes, cross entropy with ignored targets."""
    b = REGISTRY.builder("forward")
    ids, labels = b.input(i64(batch, TIME), "input", "ids"), b.input(i64(batch, TIME), "input", "labels")
    table = b.input(f64(CLASSES, CHANNELS), "param", "wte.weight", name="wte")
    unused = b.input(f64(3), "param", "unused")
    place = b.input(f64(TIME, CHANNELS), "param", "wpe.weight", name="wpe")
    x = b.emit("embedding", table, b.emit("maximum_scalar", ids, value=0), padding_idx=None)
    x = b.emit("add", x, broadcast(b, place, x.type.shape))
    for layer in range(2):
        x = _block(b, x, layer, batch)
    scores = reshape(b, b.emit("linear", x, table), (batch * TIME, CLASSES))
    loss = aten(b, "cross_entropy_loss.default", scores, reshape(b, labels, (batch * TIME,)), None, 1, -100)
    b.output(loss, "output", "0")
    b.output(unused, "output", "1")
    return b.build()


def _block(b: Builder, x: Value, layer: int, batch: int) -> Value:
    w = b.input(f64(3 * CHANNELS, CHANNELS), "param", f"h.{layer}.weight", name=f"w{layer}")
    norm = b.input(f64(CHANNELS), "param", f"h.{layer}.norm", name=f"n{layer}")
    with b.at(f"h.{layer}"):
        normed = b.emit_many("layer_norm", x, norm, normalized_shape=(CHANNELS,), eps=1e-5)[0]
        qkv = b.emit_many("split", b.emit("linear", normed, w), sizes=(CHANNELS,) * 3, dim=2)
        q, k, v = (
            b.emit("permute", reshape(b, part, (batch, TIME, 2, CHANNELS // 2)), dims=(0, 2, 1, 3)) for part in qkv
        )
        y = aten(b, "scaled_dot_product_attention.default", q, k, v, None, 0.0, True)
        return b.emit("add", x, reshape(b, b.emit("permute", y, dims=(0, 2, 1, 3)), x.type.shape))


INPUTS = {mlp: ("0", "1"), attention: ("ids", "labels")}


def stages_of(forward: Graph, stages: int) -> dict[str, int]:
    """Equal segments of the graph's own order."""
    count = len(forward.nodes)
    return {node.outputs[0].name: index * stages // count for index, node in enumerate(forward.nodes)}


def step_of(
    build: Build,
    batch: int,
    microbatches: int,
    stages: int,
    groups: Sequence[Group],
    devices: Sequence[str | Sequence[str]] | None = None,
    split_backward: bool = False,
    **options: object,
) -> Step:
    sizes = split_batch(batch, microbatches)
    whole = build(batch)
    parts: dict[int, Part] = {}
    analysed = microbatched(whole, INPUTS[build], "0", build(batch + 3))
    for size in dict.fromkeys(sizes):
        result = rewrite_like(build(size), whole, analysed)
        assert result.exact
        forward = result.forward
        joint = simplify(differentiate(forward, [port.ref for port in forward.inputs_of("param")]))
        main, bodies = outline(joint, forward, stages_of(forward, stages), split_backward=split_backward)
        parts[size] = Part(main, bodies, result.denominators, INPUTS[build])
    devices = devices or [f"cpu:{index}" for index in range(stages)]
    return step_graph(parts, sizes, groups, devices, **options)


def given_to(step: Step, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The inputs of a step in order of its ports: batches are cut, fractions computed."""
    given: list[np.ndarray] = []
    for port in step.graph.inputs:
        target, _, microbatch = port.target.partition("#")
        if port.ref in arrays:
            given.append(arrays[port.ref])
        elif port.kind == "input":
            start = sum(step.sizes[: int(microbatch)])
            given.append(arrays[f"input:{target}"][start : start + step.sizes[int(microbatch)]])
        elif target == "fraction":
            given.append(np.asarray(step.sizes[int(microbatch)] / sum(step.sizes)))
        else:
            raise AssertionError(port.ref)
    return given


def run(step: Step, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    verify(step.program, REGISTRY)
    given = given_to(step, arrays)
    results = interpret_graph(step.graph, given, step.program)
    return {port.ref: array for port, array in zip(step.graph.outputs, results, strict=True)}


def plain_step(
    build: Build, batch: int, groups: Sequence[Group], arrays: dict[str, np.ndarray], clip: bool
) -> dict[str, np.ndarray]:
    """The whole batch at once, gradients clipped and parameters updated one by one."""
    forward = build(batch)
    forward = replace(forward, outputs=forward.outputs[:1])
    program = vjp(Program({"forward": forward}), [port.ref for port in forward.inputs_of("param")])
    found = interpret(program, {**arrays, "cotangent:output:0": np.ones(())})
    wanted = {"output:0": found["output:0"]}
    updated = [name for group in groups for name in group.params if f"grad:param:{name}" in found]
    norm = np.sqrt(sum(np.sum(found[f"grad:param:{name}"] ** 2) for name in updated))
    factor = min(1.0, float(arrays["scalar:clip"]) / (norm + 1e-6)) if clip else 1.0
    if clip:
        wanted["output:grad_norm"] = norm
    for group in groups:
        for name in group.params:
            if name in updated:
                wanted |= _updated(group, name, factor * found[f"grad:param:{name}"], arrays)
    return wanted


def _updated(group: Group, name: str, gradient: np.ndarray, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    b = REGISTRY.builder("update")
    given = [arrays[f"param:{name}"], gradient, *(arrays[f"state:{s}:{name}"] for s in group.states)]
    values = [b.input(f64(*gradient.shape), "input", str(index)) for index in range(len(given))]
    scalars = [b.input(SCALAR, "scalar", "lr"), b.input(SCALAR, "scalar", "step")]
    update = sgd_update if group.kind == "sgd" else adamw_update
    for value in update(b, values[0], values[1], values[2:], *scalars, **group.options):
        b.output(value, "output", value.name)
    results = interpret_graph(b.build(), [*given, arrays[f"scalar:lr:{group.name}"], arrays["scalar:step"]])
    refs = [f"param:{name}", *(f"state:{s}:{name}" for s in group.states)]
    return dict(zip(refs, results, strict=True))


def arrays_of(build: Build, batch: int, groups: Sequence[Group], step: float = 3.0) -> dict[str, np.ndarray]:
    forward = build(batch)
    arrays = arrays_for(forward)
    shapes = {port.target: port.value.type.shape for port in forward.inputs_of("param")}
    rng = np.random.default_rng(7)
    for index, group in enumerate(groups):
        arrays[f"scalar:lr:{group.name}"] = np.asarray(0.1 / (index + 1))
        for name in group.params:
            for state in group.states:
                arrays[f"state:{state}:{name}"] = np.abs(rng.normal(size=shapes[name]))
    return {**arrays, "scalar:step": np.asarray(step), "scalar:clip": np.asarray(0.05)}


def all_params(build: Build) -> tuple[str, ...]:
    return tuple(port.target for port in build(2).inputs_of("param"))


def one_group(build: Build, kind: str, **options: object) -> list[Group]:
    return [Group("0", all_params(build), kind, options)]


def two_groups(build: Build) -> list[Group]:
    params = all_params(build)
    decayed = tuple(name for name in params if name.endswith("weight"))
    rest = tuple(name for name in params if not name.endswith("weight"))
    return [
        Group("decay", decayed, "adamw", {"weight_decay": 0.1, "beta1": 0.8}),
        Group("rest", rest, "sgd", {"momentum": 0.9, "nesterov": True}),
    ]


GROUPS = {
    "adamw": lambda build: one_group(build, "adamw", weight_decay=0.01),
    "adam amsgrad": lambda build: one_group(build, "adamw", decoupled=False, amsgrad=True),
    "sgd": lambda build: one_group(build, "sgd"),
    "momentum": lambda build: one_group(build, "sgd", momentum=0.9, weight_decay=0.1),
    "two groups": two_groups,
}


def assert_equals_plain(build, batch, microbatches, stages, groups, step_number=3.0, **options) -> Step:
    step = step_of(build, batch, microbatches, stages, groups, **options)
    arrays = arrays_of(build, batch, groups, step_number)
    got = run(step, arrays)
    wanted = plain_step(build, batch, groups, arrays, bool(options.get("clip")))
    assert set(got) == set(wanted)
    for ref, array in wanted.items():
        np.testing.assert_allclose(got[ref], array, rtol=1e-9, atol=1e-12, err_msg=ref)
    for ref, array in run(fused(step), arrays).items():
        np.testing.assert_array_equal(got[ref], array, err_msg=ref)
    return step


def tasks_on(step: Step, device: str) -> list[str]:
    return [n.attrs["task"] for n in step.graph.nodes if n.op == "call" and n.attrs["device"] == device]


def test_a_forward_and_its_backward_are_one_task_where_nothing_comes_between():
    groups = GROUPS["adamw"](mlp)
    step = step_of(mlp, 8, 4, 2, groups)
    together = fused(step)
    assert tasks_on(together, "cpu:0") == tasks_on(step, "cpu:0")  # the first stage waits for the second
    assert tasks_on(together, "cpu:1") == ["FB1.0", "FB1.1", "FB1.2", "FB1.3", "loss", "U1"]
    waits = {n.attrs["task"]: n.attrs.get("after", ()) for n in together.graph.nodes if n.op == "call"}
    assert waits["FB1.1"] == ("FB1.0",)
    names = set(together.program.graphs)
    assert {"stage1.forward_backward", "stage1.forward_backward.add"} <= names
    assert not {"stage1.forward", "stage1.backward", "stage1.backward.add"} & names
    moved = [node.output.type.nbytes for node in together.graph.nodes if node.op == "transfer"]
    assert moved == [node.output.type.nbytes for node in step.graph.nodes if node.op == "transfer"]
    assert parse(print_program(together.program)) == together.program


def test_on_one_device_every_microbatch_is_one_task():
    together = fused(step_of(mlp, 8, 4, 1, GROUPS["sgd"](mlp)))
    assert tasks_on(together, "cpu:0") == ["FB0.0", "FB0.1", "FB0.2", "FB0.3", "loss", "U0"]
    (body,) = (together.program[name] for name in ("stage0.forward_backward",))
    kinds = {port.kind for port in body.outputs}
    assert "residual" not in kinds  # they live and die inside


def test_schedules_that_part_them_are_left_as_they_are():
    step = step_of(mlp, 8, 4, 2, GROUPS["sgd"](mlp), schedule="gpipe")
    assert tasks_on(fused(step), "cpu:1") == tasks_on(step, "cpu:1")


def test_a_result_that_another_device_waits_for_is_not_held_up():
    """What stage 0 makes is sent on: its backward, though next but one on its device, stays a task of its own."""
    step = step_of(mlp, 4, 1, 3, GROUPS["sgd"](mlp), ["cpu:0", "cpu:1", "cpu:0"])
    assert tasks_on(fused(step), "cpu:0") == ["F0.0", "FB2.0", "B0.0", "U0"]


@pytest.mark.parametrize("build", [mlp, attention])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("batch", "microbatches", "stages"), [(8, 4, 2), (7, 3, 3), (4, 1, 2)])
def test_step_equals_the_whole_batch(build, schedule, clip, batch, microbatches, stages):
    groups = GROUPS["adamw"](build)
    assert_equals_plain(build, batch, microbatches, stages, groups, schedule=schedule, clip=clip)


@pytest.mark.parametrize("build", [mlp, attention])
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("number", [1.0, 5.0])
def test_every_optimizer(build, name, number):
    assert_equals_plain(build, 5, 2, 2, GROUPS[name](build), number, clip=True)


@pytest.mark.parametrize("build", [mlp, attention])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_split_backward_and_stages_that_share_a_device(build, schedule):
    groups = GROUPS["two groups"](build)
    step = assert_equals_plain(build, 7, 3, 3, groups, schedule=schedule, split_backward=True)
    assert any(node.attrs.get("phase") == "weight_grad" for node in step.graph.nodes)
    for devices in (["cpu:0", "cpu:0", "cpu:1"], ["cpu:0", "cpu:1", "cpu:0"], ["cpu:0"] * 3):
        assert_equals_plain(build, 7, 3, 3, groups, schedule=schedule, devices=devices)


REPLICAS = {
    "all of the model on two": [("cpu:0", "cpu:1")],
    "only the first stage": [("cpu:0", "cpu:1"), "cpu:2"],
    "stages of two and of three": [("cpu:0", "cpu:1"), ("cpu:2", "cpu:3", "cpu:4")],
}


@pytest.mark.parametrize("build", [mlp, attention])
@pytest.mark.parametrize("layout", REPLICAS)
@pytest.mark.parametrize("microbatches", [1, 2, 5])
def test_replicas_add_up_to_the_whole_batch(build, layout, microbatches):
    devices = REPLICAS[layout]
    groups = GROUPS["two groups"](build)
    step = assert_equals_plain(build, 7, microbatches, len(devices), groups, devices=devices, clip=True)
    assert "F0.0" in str(step)


@pytest.mark.parametrize("build", [mlp, attention])
@pytest.mark.parametrize("schedule", ["zb-h1", "zb-1p", "zb-2p", "dag"])
def test_zero_bubble_schedules_and_those_of_a_dag(build, schedule):
    step = assert_equals_plain(build, 8, 4, 2, GROUPS["adamw"](build), schedule=schedule, split_backward=True)
    assert step.schedule.name == schedule
    simulate(step.graph, step.program, cluster_of([cpu_device(0), cpu_device(1)]))


def test_replicas_share_the_updates_and_each_state_lives_once():
    step = step_of(mlp, 8, 4, 1, GROUPS["adamw"](mlp), [("cpu:0", "cpu:1")])
    tasks = {node.attrs["task"]: node.attrs["device"] for node in step.graph.nodes if node.op == "call"}
    assert {tasks[f"B0.{k}"] for k in (0, 2)} == {"cpu:0"} and {tasks[f"B0.{k}"] for k in (1, 3)} == {"cpu:1"}
    assert (tasks["R0"], tasks["U0"], tasks["R0/1"], tasks["U0/1"]) == ("cpu:0", "cpu:0", "cpu:1", "cpu:1")
    homes = {port.ref: port.value.type.device for port in step.graph.inputs_of("param", "state")}
    sizes = dict.fromkeys(("cpu:0", "cpu:1"), 0)
    for port in step.graph.inputs_of("param"):
        sizes[homes[port.ref]] += port.value.type.nbytes
        assert homes[port.ref] == homes[f"state:exp_avg:{port.target}"]
    assert sizes["cpu:0"] == sizes["cpu:1"]
    moved = sum(node.output.type.nbytes for node in step.graph.nodes if node.op == "transfer")
    assert moved < 2.1 * sum(sizes.values())  # every parameter once, every gradient once


def normed(batch: int) -> Graph:
    """Batch norm in training, which mixes samples and changes buffers; dropout after it; two results."""
    b = REGISTRY.builder("forward")
    x = b.input(f64(batch, CHANNELS), "input", "0")
    w = b.input(f64(CHANNELS, CHANNELS), "param", "w", name="w")
    names = ("weight", "bias", "mean", "var")
    stats = [b.input(f64(CHANNELS), "param" if n in names[:2] else "buffer", n) for n in names]
    x = b.emit("linear", x, w)
    normalise = REGISTRY.importers["_native_batch_norm_legit_functional.default"]
    y, _, _, mean, var = normalise(b, x, *stats, True, 0.1, 1e-5)
    y = aten(b, "native_dropout.default", y, 0.25, True)
    b.output(b_emit(b, "mean", b.emit("sin", y)), "output", "0")
    b.output(y, "output", "1")
    b.output(mean, "buffer", "mean")
    b.output(var, "buffer", "var")
    return b.build()


def normed_step(
    sizes: Sequence[int], force: bool, chain: bool = True, devices: Sequence[Sequence[str]] = (("cpu:0",), ("cpu:1",))
) -> tuple[Step, Graph]:
    (size,) = set(sizes)
    result = microbatched(normed(size), ["0"], "0", normed(size + 2), force)
    assert not result.exact
    joint = simplify(differentiate(result.forward, [port.ref for port in result.forward.inputs_of("param")]))
    stages = stages_of(result.forward, len(devices))
    part = Part(*outline(joint, result.forward, stages), result.denominators, ("0",))
    groups = [Group("0", ("w", "weight", "bias"), "sgd", {})]
    return step_graph({size: part}, sizes, groups, devices, chain_buffers=chain), result.forward


def normed_arrays(batch: int, microbatches: int) -> dict[str, np.ndarray]:
    arrays = arrays_for(normed(batch))
    keys = {f"key:#{k}": np.array([11, k], np.int64) for k in range(microbatches)}
    arrays["buffer:var"] = np.abs(arrays["buffer:var"])
    return {**arrays, **keys, "scalar:lr:0": np.asarray(0.1), "scalar:step": np.asarray(1.0)}


def test_a_batch_that_is_not_cut():
    step, forward = normed_step([6], force=False)
    arrays = normed_arrays(6, 1)
    got = run(step, arrays)
    program = vjp(Program({"forward": forward}), ["param:w"])
    found = interpret(program, {**arrays, "key:key": arrays["key:#0"], "cotangent:output:0": np.ones(())})
    for ref in ("output:0", "buffer:mean", "buffer:var"):
        np.testing.assert_allclose(got[ref], found[ref], rtol=1e-12)
    np.testing.assert_allclose(got["param:w"], arrays["param:w"] - 0.1 * found["grad:param:w"], rtol=1e-9)


@pytest.mark.parametrize("chain", [True, False])
def test_a_forced_cut_hands_buffers_on(chain):
    step, forward = normed_step([3, 3], force=True, chain=chain)
    arrays = normed_arrays(6, 2)
    got = run(step, arrays)
    loss, buffers = 0.0, {"buffer:mean": arrays["buffer:mean"], "buffer:var": arrays["buffer:var"]}
    for k in range(2):
        given = {**arrays, **buffers} if chain else arrays
        given = given | {"input:0": arrays["input:0"][3 * k : 3 * k + 3], "key:key": arrays[f"key:#{k}"]}
        found = interpret(Program({"forward": forward}), {**given, "scalar:fraction": np.asarray(0.5)})
        loss += found["output:0"]
        buffers = {ref: found[ref] for ref in buffers}
    np.testing.assert_allclose(got["output:0"], loss, rtol=1e-12)
    for ref, array in buffers.items():
        np.testing.assert_allclose(got[ref], array, rtol=1e-12)


def test_each_replica_hands_on_its_own_buffers_and_the_first_ones_are_kept():
    step, forward = normed_step([3, 3, 3], force=True, chain=True, devices=[("cpu:0", "cpu:1")])
    arrays = normed_arrays(9, 3)
    got = run(step, arrays)
    buffers = {"buffer:mean": arrays["buffer:mean"], "buffer:var": arrays["buffer:var"]}
    for k in (0, 2):
        given = {**arrays, **buffers, "input:0": arrays["input:0"][3 * k : 3 * k + 3], "key:key": arrays[f"key:#{k}"]}
        found = interpret(Program({"forward": forward}), {**given, "scalar:fraction": np.asarray(1 / 3)})
        buffers = {ref: found[ref] for ref in buffers}
    for ref, array in buffers.items():
        np.testing.assert_allclose(got[ref], array, rtol=1e-12)


def test_cotangents_of_results_other_than_the_loss_are_zero():
    forward = normed(6)
    joint = simplify(differentiate(forward, ["param:w"]))
    main, bodies = outline(joint, forward, stages_of(forward, 2))
    assert len(main.inputs_of("cotangent")) == 2
    groups = [Group("0", ("w",), "sgd", {})]
    step = step_graph({6: Part(main, bodies, None, ("0",))}, [6], groups, ["cpu:0", "cpu:1"])
    alone, _ = normed_step([6], force=False)
    arrays = normed_arrays(6, 1)
    got = run(step, arrays)
    np.testing.assert_allclose(got["param:w"], run(alone, arrays)["param:w"], rtol=1e-12)
    assert got["output:1"].shape == (6, CHANNELS)


def test_parameters_outside_of_groups_stay_as_they_are():
    groups = [Group("0", ("0.weight", "3.bias"), "sgd", {})]
    step = assert_equals_plain(mlp, 6, 2, 2, groups)
    assert [port.target for port in step.graph.outputs_of("param")] == ["3.bias", "0.weight"]


def test_a_step_prints_parses_and_is_the_same_every_time():
    step = step_of(attention, 7, 3, 2, two_groups(attention), clip=True)
    text = print_program(step.program)
    assert print_program(parse(text)) == text
    assert print_program(step_of(attention, 7, 3, 2, two_groups(attention), clip=True).program) == text
    assert "F0.0" in str(step) and "transfers" in str(step)


def test_microbatches_of_a_size_share_bodies():
    step = step_of(mlp, 8, 4, 2, one_group(mlp, "sgd"))
    assert len(step.program.graphs) == 1 + 2 + 2 + 2 + 2 + 1  # step, F, B, B that adds, U of both stages, loss


def test_parameters_and_their_states_live_where_they_are_updated():
    step = step_of(attention, 4, 2, 3, one_group(attention, "adamw"))
    devices = {port.ref: port.value.type.device for port in step.graph.inputs}
    for port in step.graph.outputs_of("param", "state"):
        assert port.value.type.device == devices[port.ref]


def test_no_more_microbatches_in_flight_than_1f1b_allows():
    step = step_of(mlp, 8, 8, 2, one_group(mlp, "sgd"))
    cluster = cluster_of([cpu_device(0), cpu_device(1)])
    result = simulate(step.graph, step.program, cluster, lambda node: 1.0, strict=False)
    assert result.in_flight() == {0: 2, 1: 1}
    after = {node.attrs["task"]: node.attrs.get("after", ()) for node in step.graph.nodes if node.op == "call"}
    assert after["F0.2"] == ("B0.0",) and after["F1.3"] == ("B1.2",) and after["F0.1"] == ()


def test_what_does_not_fit_is_refused():
    with pytest.raises(PlanError, match="no device"):
        step_of(mlp, 4, 2, 3, one_group(mlp, "sgd"), devices=["cpu:0", "cpu:1"])
    with pytest.raises(PlanError, match="two groups"):
        step_of(mlp, 4, 2, 2, [*one_group(mlp, "sgd"), Group("1", ("0.bias",), "sgd", {})])
    with pytest.raises(PlanError, match="no schedule"):
        step_of(mlp, 4, 2, 2, one_group(mlp, "sgd"), schedule="zigzag")
    with pytest.raises(PlanError, match="sgd or adamw"):
        Group("0", (), "lion", {})


def test_generated_code_of_every_task_agrees_with_the_interpreter():
    groups = two_groups(attention)
    step = step_of(attention, 5, 2, 2, groups, clip=True, donate=True)
    arrays = arrays_of(attention, 5, groups)
    wanted = run(step, arrays)

    values = {
        port.value.name: to_torch(array) for port, array in zip(step.graph.inputs, given_to(step, arrays), strict=True)
    }
    for node in step.graph.nodes:
        inputs = [values[value.name] for value in node.inputs]
        results = inputs if node.op == "transfer" else compile_graph(step.program[node.attrs["callee"]])(inputs)
        values.update(zip((value.name for value in node.outputs), results, strict=True))
    for port in step.graph.outputs:
        np.testing.assert_allclose(
            to_numpy(values[port.value.name]), wanted[port.ref], rtol=1e-9, atol=1e-12, err_msg=port.ref
        )
