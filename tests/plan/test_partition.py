"""The cut: convex, optimal on small instances, within memory, true to pins and shared parameters."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daggc.errors import PlanError
from daggc.ir.graph import Graph
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.passes.vjp import differentiate, simplify
from daggc.plan.device import Cluster, Device, Link, cluster_of, cpu_device
from daggc.plan.partition import Partition, Segment, device_loads, memory_of, partition
from daggc.plan.partition.cut import SLACK
from tests.plan.graphs import random_graphs


def _device(index: int, rate: float = 1e9, memory: float = 1e9) -> Device:
    return Device(f"cpu:{index}", "cpu", {"elementwise": rate}, 1e12, memory, overhead=0.0, launch=0.0)


def _layers(count: int, size: int = 64, tied: bool = False, opaque: bool = False) -> Graph:
    """``layers.0 .. layers.n-1``: each multiplies by its parameter; tied: the last by that of the first."""
    b = REGISTRY.builder("forward")
    type_ = TensorType("f64", (size, size))
    x = b.input(type_, "input", "0")
    names = [0 if tied and index == count - 1 else index for index in range(count)]
    weights = {index: b.input(type_, "param", f"layers.{index}.w") for index in dict.fromkeys(names)}
    for index, name in enumerate(names):
        with b.at(path=f"layers.{index}"):
            if opaque:
                x = b.emit("python.call", x, target=f"f{index}", dtypes=("f64",), shapes=((size, size),))
            else:
                x = b.emit("sin", b.emit("mul", x, weights[name]))
    b.output(x, "output", "0")
    return b.build()


def _partition(forward: Graph, cluster: Cluster, **options) -> Partition:
    return partition(simplify(differentiate(forward)), forward, cluster, **options)


def _layers_of(result: Partition) -> list[tuple[int, list[int]]]:
    """Device and layers of each segment."""
    found = []
    for segment in result.cut.segments:
        paths = [node.path for node in result.work.nodes[segment.start : segment.stop]]
        found.append((segment.device, sorted({int(path.removeprefix("layers.")) for path in paths})))
    return found


def _check(forward: Graph, result: Partition) -> None:
    """Stages never fall along an edge; a parameter's users are on one device."""
    device = {name: result.cut.segments[stage].device for name, stage in result.stage_of.items()}
    makers = {value.name: node.outputs[0].name for node in forward.nodes for value in node.outputs}
    for node in forward.nodes:
        for value in node.inputs:
            if value.name in makers:
                assert result.stage_of[makers[value.name]] <= result.stage_of[node.outputs[0].name]
    for port, users in ((port, forward.users()[port.value.name]) for port in forward.inputs_of("param")):
        assert len({device[node.outputs[0].name] for node in users}) <= 1, port.ref


@settings(max_examples=60, deadline=None)
@given(data=st.data(), devices=st.integers(1, 3), seed=st.integers(0, 99))
def test_cut_is_convex_and_near_the_best(data: st.DataObject, devices: int, seed: int) -> None:
    """Against all cuts of the same shapes, with the same fair share, of the same planning order."""
    forward = data.draw(random_graphs())
    if not forward.nodes:
        return
    rates = np.random.default_rng(seed).choice([1e9, 1e9, 3e9], devices)
    cluster = Cluster(tuple(_device(i, rate) for i, rate in enumerate(rates)), Link(0.0, 1e9))
    result = _partition(forward, cluster, how="line")
    _check(forward, result)
    work, cut = result.work, result.cut
    used = sorted({segment.device for segment in cut.segments})
    best = np.inf
    for order in (used, [*used, used[0]]):
        for inner in itertools.combinations(range(1, len(work.nodes)), len(order) - 1):
            edges = (0, *inner, len(work.nodes))
            parts = [Segment(a, b, i) for (a, b), i in zip(itertools.pairwise(edges), order, strict=True)]
            if _allowed(work, cluster, parts, cut.fair):
                best = min(best, max(device_loads(work, cluster, parts).values()))
    assert cut.seconds <= best * SLACK * (1 + 1e-9)


def _allowed(work, cluster: Cluster, parts: list[Segment], fair: float) -> bool:
    device = {at: part.device for part in parts for at in range(part.start, part.stop)}
    if any(len({device[use] for use in span.uses}) > 1 for span in work.spans):
        return False
    segment = {at: number for number, part in enumerate(parts) for at in range(part.start, part.stop)}
    used = list(dict.fromkeys(part.device for part in parts))
    around = len(parts) > len(used)
    ends = {0, len(parts) - 1} if around else set()
    for span in work.spans:
        places = {segment[use] for use in span.uses}
        if len(places) > 1 and not places <= ends:
            return False
    if around and all(len({segment[use] for use in span.uses}) == 1 for span in work.spans):
        return False  # nothing to go around for
    total = max(work.flops.sum(), 1e-300)
    speeds = {i: 1 / max(work.seconds(cluster.devices[i]).sum(), 1e-30) for i in used}
    for i in used:
        share = sum(work.flops[part.start : part.stop].sum() for part in parts if part.device == i) / total
        if work.flops.sum() and share < fair * speeds[i] / sum(speeds.values()) - 1e-12:
            return False
    return True


def test_equal_layers_on_equal_devices() -> None:
    result = _partition(_layers(8), cluster_of([_device(0), _device(1)], Link(0.0, 1e12)))
    assert _layers_of(result) == [(0, [0, 1, 2, 3]), (1, [4, 5, 6, 7])]


def test_a_faster_device_does_more() -> None:
    result = _partition(_layers(8), cluster_of([_device(0, 1e9), _device(1, 3e9)], Link(0.0, 1e12)))
    assert _layers_of(result) == [(0, [0, 1]), (1, [2, 3, 4, 5, 6, 7])]


def test_opaque_layers_are_equal() -> None:
    forward = _layers(4, opaque=True)
    result = partition(forward, forward, cluster_of([cpu_device(0), cpu_device(1)]))
    assert _layers_of(result) == [(0, [0, 1]), (1, [2, 3])]


def test_a_tied_parameter_brings_the_last_stage_back() -> None:
    forward = _layers(8, tied=True)
    result = _partition(forward, cluster_of([_device(0), _device(1)], Link(0.0, 1e12)))
    _check(forward, result)
    devices = [device for device, _ in _layers_of(result)]
    assert devices == [0, 1, 0]
    assert "param:layers.0.w" in result.cut.alternatives[0].description
    assert any(other.seconds is None and "in a line" in other.description for other in result.cut.alternatives)


def test_memory_moves_the_cut() -> None:
    """The first device has room for two layers' parameters with gradients and optimizer state, and activations."""
    weight = 64 * 64 * 8
    tight = _device(0, memory=2 * 4 * weight + 12 * weight)
    result = _partition(_layers(8), cluster_of([tight, _device(1)], Link(0.0, 1e12)))
    assert len(_layers_of(result)[0][1]) < 4
    for number, segment in enumerate(result.cut.segments):
        room = (tight, _device(1))[segment.device].memory
        assert memory_of(result.work, result.cut.segments, number, 1) <= room


def test_microbatches_in_flight_take_memory() -> None:
    forward = _layers(8)
    joint = simplify(differentiate(forward))
    cluster = cluster_of([_device(0), _device(1)])
    one = partition(joint, forward, cluster)
    assert memory_of(one.work, one.cut.segments, 0, 4) > memory_of(one.work, one.cut.segments, 0, 1)
    # 1F1B: the last stage holds one microbatch however many there are
    assert memory_of(one.work, one.cut.segments, 1, 4) == memory_of(one.work, one.cut.segments, 1, 1)


def test_a_model_larger_than_all_memory() -> None:
    weight = 64 * 64 * 8
    with pytest.raises(PlanError, match=r"does not fit.*bytes are short") as wrong:
        _partition(_layers(8), cluster_of([_device(0, memory=weight), _device(1, memory=weight)]))
    assert f"{2 * weight:,}" in str(wrong.value)


def test_a_layer_larger_than_any_memory() -> None:
    weight = 64 * 64 * 8
    devices = [_device(i, memory=6 * weight) for i in range(16)]
    with pytest.raises(PlanError, match=r"one device is [\d,]+ bytes short"):
        _partition(_layers(4), cluster_of(devices))


def test_pins_are_kept() -> None:
    forward = _layers(8)
    cluster = cluster_of([_device(0), _device(1)], Link(0.0, 1e12))
    result = _partition(forward, cluster, pins={"layers.0": "cpu:1"})
    _check(forward, result)
    places = {layer: device for device, layers in _layers_of(result) for layer in layers}
    assert places[0] == 1
    assert set(places.values()) == {0, 1}
    result = _partition(forward, cluster, pins={"layers.[024]": "cpu:1", "layers.[1357]": "cpu:0", "layers.6": "cpu:0"})
    places = {layer: device for device, layers in _layers_of(result) for layer in layers}
    assert [places[layer] for layer in range(8)] == [1, 0, 1, 0, 1, 0, 0, 0]


def test_pins_that_cannot_be_kept() -> None:
    cluster = cluster_of([_device(0), _device(1)])
    with pytest.raises(PlanError, match="no device 'cpu:7'; there are cpu:0, cpu:1"):
        _partition(_layers(2), cluster, pins={"layers.0": "cpu:7"})
    with pytest.raises(PlanError, match=r"'blocks\.\*' -> cpu:0 matches no module.*layers\.0, layers\.1"):
        _partition(_layers(2), cluster, pins={"blocks.*": "cpu:0"})
    with pytest.raises(PlanError, match=r"param:layers.0.w is used in .*layers.0.*cpu:0.*layers.3.*cpu:1.*one place"):
        _partition(_layers(4, tied=True), cluster, pins={"layers.0": "cpu:0", "layers.3": "cpu:1"})


def test_bans_are_kept() -> None:
    cluster = cluster_of([_device(i) for i in range(3)], Link(0.0, 1e12))
    for how in ("line", "list", "auto"):
        result = _partition(_layers(9), cluster, pins={"layers.[0-3]": "!cpu:0", "layers.8": "!cpu:2, !cpu:1"}, how=how)
        places = {layer: device for device, layers in _layers_of(result) for layer in layers}
        assert not any(places[layer] == 0 for layer in range(4)), how
        assert places[8] == 0, how
    with pytest.raises(PlanError, match=r"the pins leave 'layers\.0' no device; there are cpu:0, cpu:1, cpu:2"):
        _partition(_layers(2), cluster, pins={"layers.0": "cpu:0", "*": "!cpu:0"})
    with pytest.raises(PlanError, match="no device 'cpu:9'"):
        _partition(_layers(2), cluster, pins={"layers.0": "!cpu:9"})
    banned = {"layers.0": "!cpu:0, !cpu:1", "layers.3": "!cpu:2"}
    with pytest.raises(PlanError, match=r"layers.0.w is used in .*cpu:2.*layers.3.*cpu:0 or cpu:1.*one place"):
        _partition(_layers(4, tied=True), cluster, pins=banned)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_pins_are_kept_or_refused(data: st.DataObject) -> None:
    forward = data.draw(random_graphs())
    paths = sorted({node.path for node in forward.nodes})
    pins = {path: f"cpu:{data.draw(st.integers(0, 1))}" for path in paths if data.draw(st.booleans())}
    how = data.draw(st.sampled_from(("line", "list", "auto")))
    try:
        result = _partition(forward, cluster_of([_device(0), _device(1)]), pins=pins, how=how)
    except PlanError:
        return
    _check(forward, result)
    for node in forward.nodes:
        if node.path in pins:
            device = result.cut.segments[result.stage_of[node.outputs[0].name]].device
            assert pins[node.path] == f"cpu:{device}"


def test_the_number_of_stages_can_be_set() -> None:
    cluster = cluster_of([_device(i) for i in range(3)])
    assert [device for device, _ in _layers_of(_partition(_layers(8), cluster, stages=2))] == [0, 1]
    assert [device for device, _ in _layers_of(_partition(_layers(8), cluster, stages=6))] == [0, 1, 2, 0, 1, 2]
    with pytest.raises(PlanError, match="cannot be cut into 50 stages"):
        _partition(_layers(2), cluster, stages=50)
    with pytest.raises(PlanError, match="at least one stage"):
        _partition(_layers(2), cluster, stages=0)


def test_a_late_lookup_of_a_shared_table_is_hoisted() -> None:
    """A second use of a parameter that depends on graph inputs alone joins the first use."""
    b = REGISTRY.builder("forward")
    type_ = TensorType("f64", (32, 32))
    x, y = b.input(type_, "input", "0"), b.input(type_, "input", "1")
    table = b.input(type_, "param", "table")
    h = b.emit("mul", x, table)
    for index in range(6):
        with b.at(path=f"layers.{index}"):
            h = b.emit("sin", b.emit("mul", h, b.input(type_, "param", f"w{index}")))
    with b.at(path="late"):
        h = b.emit("add", h, b.emit("mul", y, table))
    b.output(b.emit("sin", h), "output", "0")
    forward = b.build()
    result = _partition(forward, cluster_of([_device(0), _device(1)], Link(0.0, 1e12)))
    _check(forward, result)
    assert len(result.cut.segments) == 2
    assert [node.path for node in result.work.nodes[:2]] == ["", "late"]


def test_a_deep_model_is_planned_quickly() -> None:
    forward = _layers(1700, size=2, tied=True)
    joint = simplify(differentiate(forward))
    assert len(joint.nodes) > 10_000
    for devices in (2, 8):
        start = time.perf_counter()
        partition(joint, forward, cluster_of([cpu_device(i) for i in range(devices)]))
        assert time.perf_counter() - start < 3, "about a third of a second on one quiet core"
