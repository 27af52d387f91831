"""Loss scaling against torch's GradScaler kernels: what is finite, the next scale, updates that are skipped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import to_numpy, to_torch

from daggc.backend.codegen import compile_graph
from daggc.interp import interpret_graph
from daggc.ir.graph import Graph
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.loss_scale import FLAG, GROWTH, LOSS_SCALE, inverse_scale, next_scale
from daggc.ops.optim import SCALAR, adamw_states, adamw_update, sgd_states, sgd_update

RUNS = [interpret_graph, lambda graph, arrays: [to_numpy(x) for x in compile_graph(graph)(list(map(to_torch, arrays)))]]
runs = pytest.mark.parametrize("run", RUNS, ids=["interpreted", "compiled"])


@runs
@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("wrong", [None, float("nan"), float("inf"), float("-inf")])
def test_all_finite(dtype, wrong, run):
    b = REGISTRY.builder("look")
    b.output(b.emit("all_finite", b.input(TensorType(dtype, (3, 5)), "input", "0")), "output", "0")
    graph = b.build()
    array = np.linspace(-3e4, 3e4, 15).reshape(3, 5).astype(graph.inputs[0].value.type.numpy_dtype)
    if wrong is not None:
        array[1, 2] = wrong
    (found,) = run(graph, [array])
    assert found == (wrong is None)


def scale_graph(**options: float) -> Graph:
    b = REGISTRY.builder("scale")
    scale, growth = b.input(LOSS_SCALE, "state", "scale"), b.input(GROWTH, "state", "growth")
    finite = b.input(FLAG, "input", "finite")
    for value in next_scale(b, scale, growth, finite, **options):
        b.output(value, "output", value.name)
    return b.build()


@runs
@pytest.mark.parametrize("options", [(2.0, 0.5, 3), (1.7, 0.3, 1)], ids=str)
def test_the_scale_follows_torchs(options, run):
    """Through growth, backoff, and a scale so large that it cannot grow."""
    growth_factor, backoff_factor, interval = options
    graph = scale_graph(growth_factor=growth_factor, backoff_factor=backoff_factor, growth_interval=interval)
    scale, growth = torch.tensor(2.0**16), torch.tensor(0, dtype=torch.int32)
    state = [scale.numpy().copy(), growth.numpy().copy()]
    rng = np.random.default_rng(0)
    for index, good in enumerate([*(rng.random(30) < 0.8), *[True] * 4]):
        if index == 30:
            scale.fill_(3e38), state.__setitem__(0, np.asarray(3e38, np.float32))
        bad = torch.tensor(0.0 if good else 1.0)
        torch._amp_update_scale_(scale, growth, bad, growth_factor, backoff_factor, interval)
        state = run(graph, [*state, np.asarray(good)])
        np.testing.assert_allclose(state[0], scale.numpy(), rtol=1e-6)
        assert (state[0].dtype, state[1].dtype, int(state[1])) == (np.float32, np.int32, int(growth))


@runs
def test_gradients_are_multiplied_by_the_inverse(run):
    b = REGISTRY.builder("inverse")
    b.output(inverse_scale(b, b.input(LOSS_SCALE, "input", "0")), "output", "0")
    graph = b.build()
    for scale in (2.0**16, 3.0, 1e38):
        (found,) = run(graph, [np.asarray(scale, np.float32)])
        assert found == np.float32(1 / np.float64(np.float32(scale))) and found.dtype == np.float32


@runs
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("donate", [True, False])
def test_a_skipped_update_changes_nothing_and_another_is_as_ever(kind, donate, run):
    type_ = TensorType("f32", (4, 3))
    update, states, options = {
        "sgd": (sgd_update, sgd_states(0.0), {}),
        "momentum": (sgd_update, sgd_states(0.9), {"momentum": 0.9}),
        "adamw": (adamw_update, adamw_states(False), {}),
    }[kind]

    def graph(conditional: bool) -> Graph:
        b = REGISTRY.builder("update")
        param, grad, *state = (b.input(type_, "input", name) for name in ("param", "grad", *states))
        lr, step = b.input(SCALAR, "scalar", "lr"), b.input(SCALAR, "scalar", "step")
        finite = b.input(FLAG, "input", "finite") if conditional else None
        for value in update(b, param, grad, state, lr, step, finite, donate=donate, **options):
            b.output(value, "output", value.name)
        return b.build()

    rng = np.random.default_rng(0)
    arrays = [np.abs(rng.normal(size=(4, 3))).astype(np.float32) for _ in range(2 + len(states))]
    arrays += [np.asarray(0.1), np.asarray(2.0)]
    wanted = run(graph(False), [array.copy() for array in arrays])
    found = run(graph(True), [*(array.copy() for array in arrays), np.asarray(True)])
    for got, expected in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(got, expected)
    arrays[1][0, 0] = np.inf
    kept = run(graph(True), [*(array.copy() for array in arrays), np.asarray(False)])
    for got, expected in zip(kept, [arrays[0], *arrays[2:-2]], strict=True):
        np.testing.assert_array_equal(got, expected)
