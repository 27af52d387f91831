"""Plans for giant models: orders, cuts, kernels, the closed form against the simulator, published trainings."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daggc.errors import PlanError
from daggc.ir.graph import Program
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.plan.device import Cluster, Device, Link, cpu_device
from daggc.plan.parallel import (
    Chip,
    Choice,
    Kernel,
    Layer,
    Layers,
    Machine,
    Model,
    Product,
    choices,
    layers_of,
    machine_of,
    plan_parallel,
    simulate_choice,
)
from daggc.plan.parallel.estimate import least_largest
from daggc.plan.parallel.orders import BACKWARD, FORWARD, pipeline_order, rank_order
from daggc.plan.schedule import interleaved, one_f_one_b

ROOT = Path(__file__).resolve().parents[2]
GPU = Device("gpu:0", "cuda", {"gemm": 3e14, "elementwise": 1e13}, 2e12, 80e9, overhead=0.0, launch=0.0, threads=0)


def machine(devices: int = 64, per_host: int = 8) -> Machine:
    return Machine(Chip(GPU, 1.0), devices, per_host, Link(0.0, 3e11), Link(0.0, 2.5e10))


def equal_layers(count: int, sent: float = 0.0) -> Layers:
    """Layers that only move bytes: 1 ms forward and 2 ms backward for a sample."""
    forward, backward = (Kernel("elementwise", 0.0, ms * 2e9 * 0.85) for ms in (1, 2))
    return Layers(
        tuple(Layer(str(i), (forward,), (backward,), (1e6, 0.0), (1e6, 1e6), sent, (0.0, 0.0)) for i in range(count))
    )


@given(p=st.integers(1, 6), v=st.integers(1, 3), groups=st.integers(1, 3))
def test_orders_are_those_of_the_schedules(p, v, groups):
    m = groups * p
    schedule = one_f_one_b(p, m) if v == 1 or p == 1 else interleaved(p * v, m, [s % p for s in range(p * v)])
    chunks = 1 if p == 1 else v
    phases = {"forward": FORWARD, "backward": BACKWARD}
    for rank, order in enumerate(schedule.orders):
        assert rank_order(p, rank, chunks, m) == [(task.stage, phases[task.phase], task.microbatch) for task in order]
    emitted = pipeline_order(p, chunks, m)
    assert len(emitted) == len(schedule.emitted)
    assert all(source < place for place, (_, needs) in enumerate(emitted) for source in needs)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=8), st.integers(1, 8))
def test_cuts_have_the_least_largest_run(weights, count):
    found = least_largest(np.array(weights), count)
    if count > len(weights):
        assert found is None
        return
    best = min(
        max(sum(weights[a:b]) for a, b in itertools.pairwise((0, *inner, len(weights))))
        for inner in itertools.combinations(range(1, len(weights)), count - 1)
    )
    assert found is not None and len(found) == count + 1 and all(a < b for a, b in itertools.pairwise(found))
    assert max(sum(weights[a:b]) for a, b in itertools.pairwise(found)) <= best * (1 + 1e-6)


def test_products_reach_what_their_shape_allows():
    whole = Product(1, 256 * 12, 128 * 9, 4096, "m", "n")  # 108 tiles: one wave
    assert whole.useful(108, 0.0) == pytest.approx(1.0)
    assert Product(1, 256 * 12, 128 * 9 + 1, 4096, "m").useful(108, 0.0) < 0.76  # a tile more: two waves
    assert whole.useful(108, 64.0) == pytest.approx(4096 / 4160)
    assert whole.on(2, 4) == Product(1, 256 * 24, 128 * 9 / 4, 4096, "m", "n")
    chip = Chip(GPU, 0.5)
    product = Kernel("gemm", 2.0 * 3072 * 1152 * 4096, 1.0, 0.0, True, whole)
    assert chip.seconds(product, 1, 1) == pytest.approx(product.flops / (1.5e14 * 4096 / 4160))
    assert chip.seconds(Kernel("elementwise", 0.0, 1e9, 1e9, True), 3, 2) == pytest.approx(2e9 / (2e12 * 0.85))
    assert chip.seconds(Kernel("view", 0.0, 0.0), 3, 2) == 0.0


@settings(max_examples=40, deadline=None)
@given(
    p=st.sampled_from((1, 2, 4)), t=st.sampled_from((1, 2)), d=st.integers(1, 2), v=st.integers(1, 2),
    groups=st.integers(1, 3), recompute=st.booleans(),
)  # fmt: skip
def test_the_closed_form_is_what_the_simulator_finds(p, t, d, v, groups, recompute):
    """For equal layers and free sends, exactly: m (F + B) + (p - 1)(F + B) / v."""
    v = v if p > 1 else 1
    model = Model(equal_layers(8), machine())
    choice = Choice(p, t, d, 1, groups * p, v, recompute)
    estimate = model.estimate(choice)
    assert estimate is not None
    simulation = simulate_choice(model, choice)
    assert simulation.makespan == pytest.approx(estimate.seconds)
    round_trip = 8 / p * (4e-3 if recompute else 3e-3)
    ends = estimate.parts["gradients"] + estimate.parts["update"]
    assert estimate.seconds == pytest.approx((groups * p + (p - 1) / v) * round_trip + ends)
    assert len(simulation.devices) == p * d


def test_sends_take_the_time_of_the_sender():
    model = Model(equal_layers(4, sent=1e9), machine())
    choice = Choice(4, 2, 4, 1, 8, 1, False)
    stages = model.stages(choice)
    assert stages is not None
    hop = 5e8 / 2.5e10 + 5e8 / 3e11  # half of it by each of two, then gathered
    assert stages.forward.tolist() == pytest.approx([1e-3 + hop] * 3 + [1e-3])
    assert stages.backward.tolist() == pytest.approx([2e-3] + [2e-3 + hop] * 3)
    assert machine().all_reduce(8e9, 8, Link(1e-6, 1e9)) == pytest.approx(14 * (1.0 + 1e-6))


def test_memory_counts_state_and_what_is_in_flight():
    model = Model(equal_layers(4, sent=10.0), machine())
    stages = model.stages(Choice(4, 1, 1, 2, 8, 1, False))
    assert stages is not None
    assert stages.memory.tolist() == [16e6 + 4e6 * left for left in (4, 3, 2, 1)]
    stages = model.stages(Choice(4, 1, 1, 2, 8, 1, True))
    assert stages is not None
    assert stages.memory.tolist() == [16e6 + 4e6 + sent * left for left, sent in ((4, 0), (3, 20), (2, 20), (1, 20))]


def transformer(samples: int = 2) -> Program:
    """Two blocks of norm, up, tanh, down, add; an embedding that is the head."""
    b = REGISTRY.builder("forward")
    ids = b.input(TensorType("i64", (samples, 16)), "input", "0")
    table = b.input(TensorType("bf16", (100, 64)), "param", "table")
    with b.at(path="words"):
        x = b.emit("embedding", table, ids, padding_idx=None)
    for block in range(2):
        name = f"blocks.{block}"
        scale, shift = (b.input(TensorType("bf16", (64,)), "param", f"{name}.{end}") for end in ("scale", "shift"))
        up = b.input(TensorType("bf16", (256, 64)), "param", f"{name}.up")
        down = b.input(TensorType("bf16", (64, 256)), "param", f"{name}.down")
        with b.at(path=name):
            y = b.emit_many("layer_norm", x, scale, shift, normalized_shape=(64,), eps=1e-5)[0]
            x = b.emit("add", x, b.emit("linear", b.emit("tanh", b.emit("linear", y, up)), down))
    with b.at(path="head"):
        logits = b.emit("tanh", b.emit("linear", x, table))
        b.output(b.emit("sum", logits, dims=(0, 1, 2), keepdim=False), "output", "0")
    return Program({"forward": b.build()})


def test_layers_of_a_program():
    layers = layers_of(transformer())
    assert [layer.name for layer in layers.layers] == ["before", "blocks.0", "blocks.1", "after"]
    assert layers.parameters == 100 * 64 + 2 * (2 * 256 * 64 + 2 * 64) and layers.tied == 6400
    block = layers.layers[1]
    assert block.parameters == (2 * 256 * 64, 2 * 64)
    values = 16 * 64 * 2  # bytes of a sample's activation
    assert block.sent == values and block.reduced == (values, values)
    products = [kernel.product for kernel in (*block.forward, *block.backward) if kernel.product]
    assert [(product.m, product.n, product.k, product.grows, product.cut) for product in products] == [
        (16, 256, 64, "m", "n"),
        (16, 64, 256, "m", "k"),
        (16, 256, 64, "m", "n"),
        (64, 256, 16, "k", "n"),
        (16, 64, 256, "m", "k"),
        (256, 64, 16, "k", "m"),
    ]
    assert sum(kernel.flops for kernel in block.forward if kernel.product) == 2 * 2 * 16 * 64 * 256
    assert layers.numbers[0] == [0, 1, 1, 2]
    assert layers.layers[0].reduced == (values, 0.0) and layers.layers[3].reduced == (0.0, values)


@given(samples=st.sampled_from((1, 2, 8)))
def test_layers_do_not_depend_on_the_batch_that_was_captured(samples):
    one, other = layers_of(transformer(4)), layers_of(transformer(samples))
    for a, b in zip(one.layers, other.layers, strict=True):
        assert (a.parameters, a.kept, a.sent, a.reduced) == (b.parameters, b.kept, b.sent, b.reduced)
        chip = Chip(GPU)
        for kernel, same in zip((*a.forward, *a.backward), (*b.forward, *b.backward), strict=True):
            assert chip.seconds(kernel, 4, 2) == pytest.approx(chip.seconds(same, 4, 2), rel=1e-3, abs=1e-9)


def hosts(count: int, per_host: int) -> Cluster:
    devices = tuple(
        Device(f"gpu:{i}", "cuda", GPU.flops, 2e12, 80e9, 0.0, 0.0, f"host-{i // per_host}", 0) for i in range(count)
    )
    return Cluster(devices, Link(0.0, 2.5e10), link_within_host=Link(0.0, 3e11))


def test_a_plan_uses_every_device_and_the_best_is_the_fastest_that_fits():
    plan = plan_parallel(equal_layers(12), hosts(16, 4), 48)
    choice = plan.best.choice
    assert choice.pipeline * choice.tensor * choice.data == 16
    assert choice.microbatch * choice.microbatches * choice.data == 48
    assert plan.best.seconds == pytest.approx(plan.simulation.makespan)
    assert plan.best.seconds <= plan.considered[0].seconds * (1 + 1e-9)
    assert json.loads(json.dumps(plan.to_json()))["devices"] == 16 and "16 devices" in str(plan)
    every = {(c.pipeline, c.tensor, c.data) for c in choices(machine_of(hosts(16, 4)), 12, 48)}
    assert (12, 1, 1) not in every and (4, 4, 1) in every and all(t in (1, 2, 4) for _, t, _ in every)


def test_machines_are_of_equal_devices():
    assert machine_of(hosts(16, 4)).per_host == 4
    assert machine_of(hosts(16, 4), reached=0.5).chip.reached == 0.5
    with pytest.raises(PlanError, match="equally many"):
        machine_of(Cluster(hosts(16, 4).devices[:6]))
    with pytest.raises(PlanError, match="in order of their hosts"):
        machine_of(Cluster(hosts(4, 2).devices[::2] + hosts(4, 2).devices[1::2]))
    with pytest.raises(PlanError, match="gpu:1 is not like cpu:0"):
        machine_of(Cluster((cpu_device(0), hosts(2, 2).devices[1])))
    with pytest.raises(PlanError, match="a step of 7 samples does not fit"):
        plan_parallel(equal_layers(1), hosts(16, 4), 7)


def test_published_trainings_are_predicted_within_a_tenth():
    """Megatron-LM, SC'21: each row left out of the fit of the one constant."""
    run = [sys.executable, "planning/megatron.py", "--json"]
    done = subprocess.run(
        run, cwd=ROOT / "tools", env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert [row["model"] for row in found["left_out"]] == ["39B", "145B", "530B"]
    assert all(abs(row["error"]) < 0.1 for row in found["left_out"] + found["held_out"])
    assert len(found["held_out"]) == 7
