"""List scheduling: published examples, towers and branches, and that every placement is a correct one."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from daggc.errors import DifferentiationError, PlanError
from daggc.interp import interpret
from daggc.ir.graph import Program
from daggc.ir.types import TensorType
from daggc.ir.verifier import verify
from daggc.ops import REGISTRY
from daggc.passes.vjp import differentiate, joined, simplify, vjp
from daggc.plan.device import Cluster, Device, Link, cluster_of, cpu_device
from daggc.plan.partition import partition
from daggc.plan.partition.bounds import work_bound
from daggc.plan.partition.coarsen import Layout, Units
from daggc.plan.partition.listing import ALGORITHMS, Edges, heft, upward_rank
from daggc.plan.partition.sketch import memory_by_device, placement_of
from daggc.plan.plan import Plan, plan_model
from daggc.testing import programs, random_inputs
from tests.plan.branches import parallel_branches, two_towers
from tests.plan.graphs import random_graphs

TWO = cluster_of([cpu_device(0), cpu_device(1)])


def _plan(program: Program, cluster: Cluster = TWO, **options) -> Plan:
    wrt = [port.ref for port in program.forward.inputs_of("param")]
    return plan_model(program, cluster, wrt=wrt, **options)


def _device(index: int, rate: float = 1e6, memory: float = 1e9) -> Device:
    """Slow enough that work matters more than tasks."""
    return Device(f"cpu:{index}", "cpu", {"elementwise": rate}, 1e12, memory, overhead=0.0, launch=0.0)


# --- the algorithms -----------------------------------------------------------------------------------

# Figure 2 of Topcuoglu, Hariri and Wu (2002): times of ten tasks on three processors, and bytes of the edges.
_TIMES = (
    (14, 16, 9), (13, 19, 18), (11, 13, 19), (13, 8, 17), (12, 13, 10),
    (13, 16, 9), (7, 15, 11), (5, 11, 14), (18, 12, 20), (21, 7, 16),
)  # fmt: skip
_EDGES = {
    (0, 1): 18, (0, 2): 12, (0, 3): 9, (0, 4): 11, (0, 5): 14, (1, 7): 19, (1, 8): 16, (2, 6): 23, (3, 7): 27,
    (3, 8): 23, (4, 8): 13, (5, 7): 15, (6, 9): 17, (7, 9): 11, (8, 9): 13,
}  # fmt: skip


def _published() -> tuple[Units, Cluster]:
    count = len(_TIMES)
    sources: list[dict[int, tuple[float, float]]] = [{} for _ in range(count)]
    users: list[dict[int, tuple[float, float]]] = [{} for _ in range(count)]
    for (a, b), nbytes in _EDGES.items():
        sources[b][a] = users[a][b] = (float(nbytes), 0.0)
    seconds, none = np.array(_TIMES, float), np.zeros(count)
    layout = Layout(np.zeros(count, bool), ((),) * count, ((),) * count, np.arange(count))
    units = Units(
        np.arange(count), layout, seconds, 0 * seconds, none, none, none, np.ones((count, 3), bool),
        np.full(count, -1), tuple(sources), tuple(users),
    )  # fmt: skip
    return units, cluster_of([_device(index) for index in range(3)], Link(0.0, 1.0))


def test_upward_ranks_are_those_published() -> None:
    units, cluster = _published()
    wanted = [108, 77, 80, 80, 69, 63.333, 42.667, 35.667, 44.333, 14.667]
    np.testing.assert_allclose(upward_rank(units, Edges.of(cluster, 1)), wanted, atol=1e-3)


def test_heft_makes_the_published_schedule() -> None:
    """Tasks 4, 8, 9, 10 on the second processor, of length 80."""
    units, cluster = _published()
    found = heft(units, cluster, 1, 1)
    assert found is not None
    assert found.device.tolist() == [2, 0, 2, 1, 2, 1, 2, 0, 1, 1]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_units_without_room_go_elsewhere_or_nowhere(name: str) -> None:
    units, cluster = _published()
    tight = Units(**{**vars(units), "resident": np.full(10, 1.0), "group": np.array([0, -1, 0, *[-1] * 6, 0])})
    for rooms in ((2, 5, 5), (4, 3, 3), (5, 5, 0)):
        devices = [_device(index, memory=room + 1e-3) for index, room in enumerate(rooms)]
        found = ALGORITHMS[name](tight, cluster_of(devices, cluster.link), 1, 1)
        if found is not None:
            assert (np.bincount(found.device, minlength=3) <= rooms).all()
            assert len({found.device[0], found.device[2], found.device[9]}) == 1
    assert ALGORITHMS[name](tight, cluster_of([_device(i, memory=2.0) for i in range(3)]), 1, 1) is None


# --- models with parallel parts -----------------------------------------------------------------------


def test_two_towers_run_at_the_same_time() -> None:
    line, lists, auto = (_plan(two_towers(), partition=how) for how in ("line", "list", "auto"))
    assert line.seconds / lists.seconds > 1.8
    assert auto.stage_of == lists.stage_of
    by_path = {path: stage.device for stage in auto.stages for path in stage.paths if path.startswith("towers")}
    assert set(by_path) == {"towers.0", "towers.1"}
    assert len(set(by_path.values())) == 2
    assert auto.seconds <= 1.2 * auto.seconds_bound


def test_eight_branches_are_shared_out() -> None:
    line, lists, auto = (_plan(parallel_branches(), partition=how) for how in ("line", "list", "auto"))
    assert line.seconds / lists.seconds > 1.65
    assert auto.stage_of == lists.stage_of
    assert max(auto.shares().values()) < 0.53
    assert len(auto.tasks) <= 8, "a branch is no task of its own"
    assert auto.seconds <= 1.3 * auto.seconds_bound


@pytest.mark.parametrize("model", [two_towers, parallel_branches])
def test_a_branch_does_not_wait_for_another(model) -> None:
    """Though the gradients of the last biases are equal, and the cotangents of all branches are added."""
    plan = _plan(model())
    makers = {value.name: node for node in plan.main.nodes for value in node.outputs}
    ancestors: dict[str, set[str]] = {}
    for node in plan.main.nodes:
        own = ancestors.setdefault(node.attrs["callee"], set())
        for value in node.inputs:
            if value.name in makers:
                source = makers[value.name].attrs["callee"]
                own |= {source} | ancestors[source]
    heavy = [stage.index for stage in plan.stages if stage.share > 0.3]
    assert len(heavy) == 2
    for phase in ("forward", "backward"):
        first, second = (f"stage{stage}.{phase}" for stage in heavy)
        assert first not in ancestors[second]
        assert second not in ancestors[first]


def test_what_is_predicted_is_what_the_plan_is_simulated_to_take() -> None:
    for model in (two_towers(), parallel_branches(), parallel_branches(5, 2, 64)):
        for how in ("line", "list"):
            plan = _plan(model, partition=how)
            assert plan.alternatives[0].predicted == pytest.approx(plan.seconds, rel=0.05)
            assert plan.seconds_bound <= plan.seconds
            assert plan.bound <= plan.slowest


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), devices=st.integers(1, 4))
def test_the_bound_on_the_busiest_device_is_that_of_linear_programming(seed: int, devices: int) -> None:
    """Devices of which each is best at other ops."""
    rng = np.random.default_rng(seed)
    classes = ("gemm", "reduction", "elementwise")
    cluster = cluster_of(
        [
            Device(f"cpu:{i}", "cpu", dict(zip(classes, rng.uniform(1e8, 1e9, 3), strict=True)), 1e12, 1e9, 0.0, 0.0)
            for i in range(devices)
        ]
    )
    forward = parallel_branches(4, 2, 32).forward
    work = partition(simplify(differentiate(forward)), forward, cluster).work
    seconds = np.stack([work.seconds(device) for device in cluster.devices], axis=1)
    count = len(seconds)
    # minimise t with sum over d of x[v, d] = 1 and sum over v of seconds[v, d] x[v, d] <= t
    each = np.kron(np.eye(count), np.ones(devices))
    loads = np.concatenate([np.tile(np.eye(devices), count) * seconds.ravel(), -np.ones((devices, 1))], axis=1)
    wanted = linprog(
        [*np.zeros(count * devices), 1.0], loads, np.zeros(devices),
        np.concatenate([each, np.zeros((count, 1))], axis=1), np.ones(count),
    ).fun  # fmt: skip
    bound = work_bound(work, cluster)
    largest = float(seconds.min(axis=1).max())
    assert bound <= max(wanted, largest) * (1 + 1e-9)
    assert bound >= 0.97 * wanted


def test_all_candidates_are_explained() -> None:
    plan = _plan(parallel_branches())
    text = plan.explain()
    for part in ("in a line", "HEFT", "PEFT", "m-ETF", "longer", "chosen"):
        assert part in text, text
    assert [other.predicted for other in plan.alternatives] == sorted(other.predicted for other in plan.alternatives)


def test_a_chain_stays_a_line() -> None:
    plan = _plan(parallel_branches(1, 12))
    assert [stage.device for stage in plan.stages] == ["cpu:0", "cpu:1"]
    assert "the model is a chain" in plan.explain()
    with pytest.raises(PlanError, match="partition is one of auto, line, list, got 'heft'"):
        _plan(two_towers(), partition="heft")
    with pytest.raises(PlanError, match="as many stages as it takes"):
        _plan(two_towers(), partition="list", stages=2)


def test_a_slower_device_gets_less() -> None:
    fast, slow = cpu_device(0), cpu_device(1)
    rates = {name: rate / 2 for name, rate in slow.flops.items()}
    slow = Device("cpu:1", "cpu", rates, slow.bandwidth / 2, slow.memory)
    for how in ("line", "list", "auto"):
        shares = _plan(parallel_branches(12), cluster_of([fast, slow]), partition=how).shares()
        assert shares["cpu:1"] / shares["cpu:0"] == pytest.approx(0.5, abs=0.2), how


def test_a_device_with_little_memory_gets_what_fits() -> None:
    whole = _plan(parallel_branches(), cluster_of([cpu_device(0)]))
    need = whole.stages[0].memory
    for how in ("line", "list", "auto"):
        cluster = cluster_of([cpu_device(0, memory=need / 4), cpu_device(1)])
        plan = _plan(parallel_branches(), cluster, partition=how)
        assert 0 < plan.memory["cpu:0"] <= need / 4, how
        assert plan.shares()["cpu:0"] > 0.1, how
    with pytest.raises(PlanError):
        _plan(parallel_branches(), cluster_of([cpu_device(i, memory=need / 4) for i in range(2)]), partition="list")


def test_pins_and_bans_hold_for_list_schedules() -> None:
    pins = {"branches.0": "cpu:1", "branches.[1-3]": "!cpu:0", "stem": "cpu:1, !cpu:0"}
    for how in ("line", "list", "auto"):
        plan = _plan(parallel_branches(), pins=pins, partition=how)
        device = {name: plan.stages[stage].device for name, stage in plan.stage_of.items()}
        for node in parallel_branches().forward.nodes:
            if node.path.startswith(("stem", "branches.0", "branches.1", "branches.2", "branches.3")):
                assert device[node.outputs[0].name] == "cpu:1", (how, node.path)
        assert set(device.values()) == {"cpu:0", "cpu:1"}


def test_pipelines_of_many_microbatches_are_judged_by_the_slowest_device() -> None:
    one, many = (_plan(parallel_branches(7), microbatches=count).alternatives[0] for count in (1, 32))
    assert one.predicted is not None
    assert many.predicted is not None
    assert many.predicted > 31 * (many.seconds or 0)
    assert (many.seconds or 0) <= (one.seconds or 0)


def test_large_models_are_planned_quickly() -> None:
    """5,000 nodes with their derivatives, in eight branches on eight devices; a second on one quiet core."""
    program = parallel_branches(8, 90, width=64, rows=64)
    start = time.process_time()
    plan = _plan(program, cluster_of([cpu_device(i) for i in range(8)]))
    assert len(plan.joint.nodes) > 5000
    assert len({stage.device for stage in plan.stages}) == 8
    assert time.process_time() - start < 4


# --- every placement is correct -----------------------------------------------------------------------


def _check(program: Program, devices: int, split_backward: bool, how: str, homes: bool = True) -> None:
    """Same values, and, but for ``homes``, parameters with their gradients and users on one device."""
    cluster = cluster_of([_device(i) for i in range(devices)], Link(0.0, 1e12))
    try:
        plan = plan_model(program, cluster, split_backward=split_backward, partition=how)
    except PlanError as wrong:
        assert "has no call" in str(wrong)  # nothing is computed
        return
    verify(plan.program, REGISTRY)
    inputs = {**random_inputs(program.forward), **_cotangents(program)}
    expected, got = interpret(vjp(program), inputs), interpret(plan.program, inputs)
    assert list(got) == list(expected)
    for ref, array in expected.items():
        np.testing.assert_array_equal(got[ref], array, err_msg=ref)
    if not homes:
        return
    graphs = (plan.program.forward, plan.program.backward)
    where = {port.ref: port.value.type.device for graph in graphs for port in graph.inputs_of("param")}
    for graph in graphs:
        assert all(where[port.ref] == port.value.type.device for port in graph.inputs_of("param"))
        params = {port.value.name for port in graph.inputs_of("param")}
        assert not any(node.op == "transfer" and node.inputs[0].name in params for node in graph.nodes)
    for port in plan.program.backward.outputs_of("grad"):
        assert where.get(port.target, port.value.type.device) == port.value.type.device, port.ref


def _cotangents(program: Program) -> dict[str, np.ndarray]:
    ports = vjp(program).backward.inputs_of("cotangent")
    rng = np.random.default_rng(0)
    return {port.ref: rng.normal(size=port.value.type.shape) for port in ports}


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    split_backward=st.booleans(),
    devices=st.integers(2, 3),
    how=st.sampled_from(("line", "list", "auto")),
)
def test_every_placement_computes_the_same(data: st.DataObject, split_backward: bool, devices: int, how: str) -> None:
    program = Program({"forward": data.draw(random_graphs())})
    try:
        vjp(program)
    except DifferentiationError:
        return
    _check(program, devices, split_backward, how)


@settings(max_examples=25, deadline=None)
@given(program=programs(differentiable=True), devices=st.integers(2, 3), split_backward=st.booleans())
def test_list_schedules_of_the_whole_op_table(program: Program, devices: int, split_backward: bool) -> None:
    _check(program, devices, split_backward, "list")


@settings(max_examples=20, deadline=None)
@given(data=st.data(), devices=st.integers(2, 3), how=st.sampled_from(("line", "list")))
def test_second_derivatives_are_placed_too(data: st.DataObject, devices: int, how: str) -> None:
    """The forward of a program that has gradients among its results."""
    program = Program({"forward": data.draw(random_graphs())})
    try:
        second = joined(vjp(program))
        vjp(second)
    except DifferentiationError:
        return
    _check(second, devices, False, how, homes=False)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), room=st.floats(0.3, 1.2), how=st.sampled_from(("line", "list", "auto")))
def test_memory_holds_or_nothing_fits(data: st.DataObject, room: float, how: str) -> None:
    forward = data.draw(random_graphs())
    joint = simplify(differentiate(forward))
    whole = partition(joint, forward, cluster_of([_device(0)]))
    need = memory_by_device(whole.work, placement_of([(0, len(whole.work.nodes), 0)], len(whole.work.nodes)), 1)
    cluster = cluster_of([_device(i, memory=max(room * need.get(0, 0.0), 1.0)) for i in range(3)], Link(0.0, 1e12))
    try:
        found = partition(joint, forward, cluster, how=how, microbatches=2)
    except PlanError:
        return
    parts = [(segment.start, segment.stop, segment.device) for segment in found.cut.segments]
    for device, nbytes in memory_by_device(found.work, placement_of(parts, len(found.work.nodes)), 2).items():
        assert nbytes <= cluster.devices[device].memory
    for span in found.work.spans:
        places = {found.cut.segments[found.stage_of[found.work.nodes[use].outputs[0].name]].device for use in span.uses}
        assert len(places) == 1, span.ref


def test_a_gradient_that_is_a_cotangent_lives_with_its_parameter() -> None:
    """``x + w``: the gradient of ``w`` is what another stage makes; the stage of ``w`` passes it on."""
    b = REGISTRY.builder("forward")
    type_ = TensorType("f64", (64, 64))
    x, w = b.input(type_, "input", "0"), b.input(type_, "param", "w")
    with b.at(path="first"):
        h = b.emit("add", b.emit("sin", b.emit("sin", x)), w)
    with b.at(path="second"):
        for index in range(3):
            h = b.emit("mul", h, b.input(type_, "param", f"v{index}"))
    b.output(h, "output", "0")
    program = Program({"forward": b.build()})
    cluster = cluster_of([_device(0), _device(1)], Link(0.0, 1e12))
    plan = _plan(program, cluster, pins={"first": "cpu:0", "second": "cpu:1"})
    gradients = {port.target: port.value.type.device for port in plan.program.backward.outputs_of("grad")}
    assert gradients["param:w"] == "cpu:0"
    assert gradients["param:v0"] == "cpu:1"
