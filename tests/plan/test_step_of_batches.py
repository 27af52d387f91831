"""Steps on several batches and of scaled losses, interpreted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from test_step import (
    INPUTS,
    all_params,
    arrays_of,
    attention,
    mlp,
    normed,
    normed_arrays,
    one_group,
    plain_step,
    run,
    stages_of,
    step_of,
)

from daggc.errors import PlanError
from daggc.passes.microbatch import microbatched, rewrite_like
from daggc.passes.vjp import differentiate, simplify
from daggc.plan.bodies import Group, Scaling
from daggc.plan.outline import outline
from daggc.plan.part import Part, Step
from daggc.plan.schedule import split_batch
from daggc.plan.step import step_graph

DEVICES = ["cpu:0", "cpu:1"]
REPLICAS = [("cpu:0", "cpu:1")]
SGD = {"momentum": 0.9}


def batches_step(
    build, batches: Sequence[int], cut: int, devices: Sequence[str | Sequence[str]] = DEVICES, **options
) -> tuple[Step, dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """A step on batches of so many samples, each cut in parts; its inputs; and those of each batch alone."""
    whole = build(max(batches))
    analysed = microbatched(whole, INPUTS[build], "0", build(max(batches) + 3))
    parts: dict = {}
    keys: list[int] = []
    for size in (size for batch in batches for size in split_batch(batch, cut)):
        keys.append(size)
        if size not in parts:
            forward = rewrite_like(build(size), whole, analysed)
            joint = simplify(differentiate(forward.forward, [p.ref for p in forward.forward.inputs_of("param")]))
            main, bodies = outline(joint, forward.forward, stages_of(forward.forward, len(devices)))
            parts[size] = Part(main, bodies, forward.denominators, INPUTS[build])
    groups = one_group(build, "sgd", **SGD)
    step = step_graph(parts, keys, groups, devices, batches=[cut] * len(batches), **options)
    alone = [arrays_of(build, size, groups) for size in batches]
    given = dict(alone[0])
    rng = np.random.default_rng(3)
    for number, own in enumerate(alone):
        for name in INPUTS[build]:  # other samples than the other batches have
            array = own[f"input:{name}"]
            own[f"input:{name}"] = rng.permuted(array, axis=0) if array.dtype == np.int64 else array * (number + 1)
        own |= {ref: array for ref, array in given.items() if not ref.startswith("input:")}
        sizes = split_batch(batches[number], cut)
        for index, size in enumerate(sizes):
            at, first = number * cut + index, sum(sizes[:index])
            given[f"scalar:fraction#{at}"] = np.asarray(size / batches[number])
            for name in INPUTS[build]:
                given[f"input:{name}#{at}"] = own[f"input:{name}"][first : first + size]
    return step, given, alone


def mean_step(build, batches: Sequence[int], alone: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What the mean of the batches' losses gives: from plain SGD steps, whose changes of parameters are gradients."""
    groups = [Group("0", all_params(build), "sgd", {})]
    found = [plain_step(build, size, groups, dict(own), False) for size, own in zip(batches, alone, strict=True)]
    mean = {ref: np.mean([one[ref] for one in found], axis=0) for ref in found[0]}
    wanted = {"output:0": mean["output:0"]}
    for ref in (ref for ref in mean if ref.startswith("param:")):
        rate, old = float(alone[0]["scalar:lr:0"]), alone[0][ref]
        buffer = 0.9 * alone[0][f"state:momentum_buffer:{ref.removeprefix('param:')}"] + (old - mean[ref]) / rate
        wanted[ref] = old - rate * buffer
    return wanted


@pytest.mark.parametrize("devices", [DEVICES, REPLICAS], ids=str)
@pytest.mark.parametrize(("build", "batches", "cut"), [(mlp, (4, 4), 2), (attention, (5, 3, 4), 2), (mlp, (3, 2), 1)])
def test_several_batches_are_a_step_by_the_mean_of_their_losses(build, batches, cut, devices):
    step, given, alone = batches_step(build, batches, cut, devices)
    got = run_given(step, given)
    for ref, array in mean_step(build, batches, alone).items():
        np.testing.assert_allclose(got[ref], array, rtol=1e-7, atol=1e-9, err_msg=ref)


def run_given(step: Step, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return run(step, {port.ref: given[port.ref] for port in step.graph.inputs})


def test_batches_are_as_many_microbatches_as_they_say():
    with pytest.raises(PlanError, match="are 3, there are 2"):
        step_of(mlp, 4, 2, 2, one_group(mlp, "sgd"), batches=(1, 2))


# --- buffers ------------------------------------------------------------------------------------------


def normed_batches(devices: Sequence[Sequence[str]], chain: bool) -> Step:
    """A model whose buffers depend on the batch, on two whole batches."""
    result = microbatched(normed(3), ["0"], "0", normed(5), True)
    joint = simplify(differentiate(result.forward, [port.ref for port in result.forward.inputs_of("param")]))
    part = Part(*outline(joint, result.forward, stages_of(result.forward, len(devices))), None, ("0",))
    groups = [Group("0", ("w", "weight", "bias"), "sgd", {})]
    return step_graph({3: part}, [3, 3], groups, devices, chain_buffers=chain, batches=(1, 1))


def test_a_batch_begins_with_the_buffers_that_the_one_before_it_left():
    arrays = normed_arrays(6, 2)
    given = {**arrays, "input:0#0": arrays["input:0"][:3], "input:0#1": arrays["input:0"][3:]}
    given |= {f"scalar:fraction#{k}": np.ones(()) for k in range(2)}
    chained, last = (run_given(normed_batches([("cpu:0",), ("cpu:1",)], chain), given) for chain in (True, False))
    for ref in ("buffer:mean", "buffer:var"):
        np.testing.assert_array_equal(chained[ref], last[ref])
        assert not np.allclose(last[ref], arrays[ref])


def test_buffers_of_a_batch_that_the_first_replica_has_no_part_of_are_refused():
    normed_batches([("cpu:0", "cpu:1")], chain=True)  # replicas keep their own
    with pytest.raises(PlanError, match="cut batches into more microbatches"):
        normed_batches([("cpu:0", "cpu:1")], chain=False)


# --- scaled losses ------------------------------------------------------------------------------------

STATE = {
    "state:loss_scale": np.asarray(1024.0, np.float32),
    "state:growth": np.asarray(1, np.int32),
    "state:skipped": np.asarray(2.0),
}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("devices", [DEVICES, REPLICAS], ids=str)
def test_a_scaled_loss_gives_the_same_step(clip, kind, devices):
    """The number of the step is less by those that were skipped, and the scale grows after its interval."""
    groups, batch = one_group(attention, kind), 5
    options = {"devices": devices, "clip": clip}
    stages = len(devices)
    arrays = {**arrays_of(attention, batch, groups, step=5.0), **STATE}
    wanted = run(step_of(attention, batch, 3, stages, groups, **options), {**arrays, "scalar:step": np.asarray(3.0)})
    got = run(step_of(attention, batch, 3, stages, groups, scaling=Scaling(growth_interval=2), **options), arrays)
    for ref, array in wanted.items():
        np.testing.assert_allclose(got[ref], array, rtol=1e-7, atol=1e-10, err_msg=ref)
    assert got["output:finite"]
    assert (got["state:loss_scale"], got["state:growth"], got["state:skipped"]) == (2048.0, 0, 2.0)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("devices", [DEVICES, REPLICAS], ids=str)
@pytest.mark.parametrize("wrong", [np.inf, np.nan])
def test_a_step_with_an_infinite_gradient_is_skipped_on_all_devices(clip, devices, wrong):
    groups = one_group(mlp, "adamw")
    step = step_of(mlp, 4, 2, len(devices), groups, devices=devices, clip=clip, scaling=Scaling())
    arrays = {**arrays_of(mlp, 4, groups), **STATE}
    arrays["input:1"][3, 0] = wrong  # of the last microbatch only
    with np.errstate(invalid="ignore"):
        got = run(step, arrays)
    assert not got["output:finite"]
    for ref in (ref for ref in got if ref.startswith(("param:", "state:")) and ref not in STATE):
        np.testing.assert_array_equal(got[ref], arrays[ref], err_msg=ref)
    assert (got["state:loss_scale"], got["state:growth"], got["state:skipped"]) == (512.0, 0, 3.0)


def test_the_scale_lives_where_the_loss_is_made_and_moves_only_where_it_is_read():
    groups = one_group(mlp, "sgd")
    graph = step_of(mlp, 4, 2, 2, groups, scaling=Scaling()).graph
    homes = {port.ref: port.value.type.device for port in graph.inputs if port.ref in STATE}
    assert homes == dict.fromkeys(STATE, "cpu:1")
    outputs = {port.ref: port.value.type.device for port in graph.outputs if port.ref in STATE}
    assert outputs == homes
    assert "loss_scale" not in {node.inputs[0].name for node in graph.nodes if node.op == "transfer"}
    forwards = [node for node in graph.nodes if node.attrs.get("phase") == "forward"]
    assert not any(value.name == "loss_scale" for node in forwards for value in node.inputs)
