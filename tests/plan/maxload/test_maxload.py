"""Max-load placement: the loads, the bound, and the solver against HiGHS on small problems of many kinds."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import variants
from hypothesis import given
from hypothesis import strategies as st

from daggc.errors import PlanError
from daggc.plan.maxload import (
    NO_COLOUR,
    Effort,
    Problem,
    evaluate,
    optimum,
    read_instance,
    read_split,
    solve,
    violations,
)
from daggc.plan.maxload.bound import lightest_holders, lower_bound
from daggc.plan.maxload.groups import group, joined_by, loads_of, merge
from daggc.plan.maxload.pack import packed
from daggc.plan.maxload.segments import best_cut, orders, segment_loads
from daggc.plan.maxload.state import State

DATA = Path(__file__).parent / "data"
QUICK = Effort(least=5_000, most=5_000, programs=6, free=24, whole=60, nodes=500)


def problem(
    seconds: list[float],
    edges: list[tuple[int, int, float]],
    *,
    accelerators: int = 2,
    cpus: int = 1,
    colour: list[int] | None = None,
    size: float = 1.0,
    memory: float = 100.0,
    unsupported: tuple[int, ...] = (),
) -> Problem:
    nodes = len(seconds)
    return Problem(
        accelerator_seconds=np.array(seconds),
        cpu_seconds=10 * np.array(seconds),
        size=np.full(nodes, size),
        supported=~np.isin(np.arange(nodes), unsupported),
        colour=np.array(colour if colour is not None else [NO_COLOUR] * nodes),
        edges=np.array([edge[:2] for edge in edges], dtype=int).reshape(-1, 2),
        transfer_seconds=np.array([edge[2] for edge in edges], dtype=float),
        accelerators=accelerators,
        cpus=cpus,
        memory=memory,
    )


def loads_by_the_definition(p: Problem, device: np.ndarray) -> np.ndarray:
    """Load of an accelerator = its seconds + transfers in + transfers out, each value once per device and direction."""
    loads = [0.0] * p.devices
    cost = {int(source): max(c for (s, _), c in zip(p.edges, p.transfer_seconds, strict=True) if s == source)
            for source in p.edges[:, 0]}  # fmt: skip
    for k in range(p.devices):
        here = {int(node) for node in np.flatnonzero(device == k)}
        if k >= p.accelerators:
            loads[k] = sum(float(p.cpu_seconds[node]) for node in here)
            continue
        leave = {int(s) for s, t in p.edges if s in here and t not in here}
        enter = {int(s) for s, t in p.edges if s not in here and t in here}
        loads[k] = sum(float(p.accelerator_seconds[node]) for node in here) + sum(cost[s] for s in leave | enter)
    return np.array(loads)


def random_devices(p: Problem, seed: int) -> np.ndarray:
    groups = group(p)
    rng = np.random.default_rng(seed)
    choice = [rng.choice(np.flatnonzero(row)) for row in np.isfinite(groups.seconds())]
    return np.array(choice)


small_problems = st.builds(
    variants.random_problem,
    seed=st.integers(0, 10_000),
    nodes=st.integers(1, 24),
    accelerators=st.integers(1, 4),
    cpus=st.integers(1, 3),
    slack=st.sampled_from([0.5, 1.1, 3.0]),
)


def test_loads_of_a_hand_made_example():
    p = problem([1, 2, 3, 4], [(0, 1, 0.5), (0, 2, 0.5), (0, 3, 0.5), (1, 3, 0.25)])
    # Node 0 leaves accelerator 0 once for readers elsewhere, comes into accelerator 1 once; the CPU pays nothing.
    np.testing.assert_allclose(evaluate(p, np.array([0, 1, 1, 2])), [1 + 0.5, 5 + 0.5 + 0.25, 40])


@given(small_problems, st.integers(0, 100))
def test_loads_are_those_of_the_definition(p: Problem, seed: int):
    device = random_devices(p, seed)
    groups = group(p)
    loads = evaluate(p, device[groups.of_node])
    np.testing.assert_allclose(loads, loads_by_the_definition(p, device[groups.of_node]), atol=1e-12)
    np.testing.assert_allclose(loads, loads_of(groups, device), atol=1e-12)
    np.testing.assert_allclose(loads, State(groups, device).loads, atol=1e-12)


@given(small_problems, st.integers(0, 100))
def test_moves_keep_the_loads(p: Problem, seed: int):
    groups = group(p)
    state = State(groups, random_devices(p, seed))
    for at in range(10):
        for g, to in enumerate(random_devices(p, seed + at + 1).tolist()):
            if to != state.at[g]:
                state.move(g, to, *state.after(g, to))
    np.testing.assert_allclose(state.loads, loads_of(groups, np.array(state.at)), atol=1e-9)


@given(small_problems)
def test_segments_have_their_loads(p: Problem):
    groups = group(p)
    free = np.flatnonzero(np.isfinite(groups.accelerator))
    if not groups.accelerators or len(free) < 2:
        return
    wide = merge(replace(groups, memory=np.inf), np.arange(len(groups)))
    on_accelerator, on_cpu = segment_loads(wide, free)
    for i, j in product(range(len(free)), repeat=2):
        if i < j:
            device = np.full(len(groups), p.accelerators)
            device[free[i:j]] = 0
            assert on_accelerator[i, j] == pytest.approx(loads_of(groups, device)[0], abs=1e-9)
            assert on_cpu[i, j] == pytest.approx(groups.cpu[free[i:j]].sum())


@given(small_problems)
def test_cuts_fit(p: Problem):
    groups = group(p)
    for order in orders(groups):
        assert sorted(order.tolist()) == list(range(len(groups)))
        device = best_cut(groups, order)
        if device is not None:
            assert violations(p, device[groups.of_node]) == []


@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(0, 2))
def test_bounds_and_solutions_hold_against_trying_everything(seed: int, nodes: int, cpus: int):
    p = variants.random_problem(seed, nodes, accelerators=2, cpus=cpus, slack=1.6)
    groups = group(p)
    choices = product(range(p.devices), repeat=len(groups))
    assigned = [np.array(device)[groups.of_node] for device in choices]
    values = [evaluate(p, device).max() for device in assigned if not violations(p, device)]
    if not values:
        with pytest.raises(PlanError, match="short"):
            solve(p, QUICK)
        return
    best = min(values)
    assert lower_bound(groups) <= best * (1 + 1e-9)
    joined = merge(groups, joined_by(groups, best))
    assert lower_bound(joined) <= best * (1 + 1e-9)
    found = solve(p, QUICK)
    assert found.value == pytest.approx(best, rel=1e-5)
    assert found.bound <= best * (1 + 1e-9)


def test_lightest_holder_takes_a_dear_neighbour_along():
    p = problem([1, 2, 3], [(0, 1, 10.0), (1, 2, 0.5)])
    np.testing.assert_allclose(lightest_holders(group(p)), [3.5, 3.5, 3.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"), [("layer_bert24_inference", 17.71471875), ("layer_bert24_training", 39.789538879)]
)
def test_published_instances(name: str, value: float):
    instance = read_instance(DATA / f"{name}.json")
    found = solve(instance.problem, replace(QUICK, most=50_000, moves=2_000))
    assert violations(instance.problem, found.device) == []
    assert value - 1e-6 <= found.value <= value * 1.005
    assert found.bound <= value


def test_never_worse_than_the_expert():
    instance = read_instance(DATA / "layer_bert24_training.json")
    device = read_split(DATA / "layer_bert24_training.expert.json", instance)
    expert = evaluate(instance.problem, device)
    assert expert.max() == pytest.approx(49.40490625)
    assert violations(instance.problem, device) == []


BERT = read_instance(DATA / "layer_bert24_inference.json").problem
SMALL = variants.part(BERT, np.arange(12))
VARIANTS = {
    "few nodes": replace(SMALL, accelerators=3),
    "one accelerator": replace(SMALL, accelerators=1),
    "no CPU": replace(SMALL, accelerators=3, cpus=0),
    "many CPUs": replace(SMALL, accelerators=2, cpus=5),
    "only CPUs": replace(SMALL, accelerators=0, cpus=3),
    "more devices than work": replace(SMALL, accelerators=20),
    "slow links": replace(variants.scaled(SMALL, 100), accelerators=3),
    "training": replace(variants.training(SMALL), accelerators=3),
    "tight": replace(variants.tight(replace(SMALL, accelerators=3), 1.1)),
    "tight, no CPU": variants.tight(replace(SMALL, accelerators=3, cpus=0), 1.5),
    "random": variants.random_problem(1, 18),
    "random, tight": variants.random_problem(2, 16, slack=1.1),
    "random, no CPU": variants.random_problem(3, 14, cpus=0),
    "random, four cores": variants.random_problem(4, 16, accelerators=2, cpus=4),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_against_highs(name: str):
    p = VARIANTS[name]
    found, best = solve(p, replace(QUICK, least=20_000, most=20_000)), optimum(p, 60)
    assert best is not None
    assert best.how == "HiGHS"
    assert violations(p, found.device) == []
    assert violations(p, best.device) == []
    np.testing.assert_allclose(found.loads, evaluate(p, found.device))
    assert found.value == found.loads.max()
    assert found.value <= best.value * 1.01
    assert found.bound <= best.value * (1 + 1e-6)


def test_the_same_result_in_every_run():
    p = variants.random_problem(7, 30, slack=1.2)
    first, second = solve(p, QUICK), solve(p, QUICK)
    np.testing.assert_array_equal(first.device, second.device)
    assert first.bound == second.bound


def test_memory_that_does_not_suffice_is_refused_with_the_bytes_short():
    total = problem([1.0] * 4, [], cpus=0, size=60.0)
    with pytest.raises(PlanError, match="40 bytes short"):
        solve(total)
    one = replace(total, size=np.array([1.0, 130.0, 1.0, 1.0]))
    with pytest.raises(PlanError, match=r"node 1 .* 130 bytes, an accelerator has 100 .*: 30 bytes short"):
        solve(one)
    packing = replace(total, size=np.array([60.0, 60.0, 60.0, 1.0]))
    with pytest.raises(PlanError, match="bytes short"):
        solve(packing)


def test_packing_that_first_fit_misses_is_found():
    p = replace(problem([1.0] * 5, [], cpus=0), size=np.array([60.0, 40.0, 35.0, 35.0, 30.0]))
    assert violations(p, packed(group(p))[group(p).of_node]) == []


def test_a_node_that_no_device_runs_is_refused():
    with pytest.raises(PlanError, match="no device can run node 2"):
        solve(problem([1.0] * 3, [], cpus=0, unsupported=(2,)))


def test_colours_stay_together_and_unsupported_classes_are_on_cpus():
    p = problem([1.0, 1.0, 1.0, 1.0], [(0, 1, 0.1)], colour=[7, 7, NO_COLOUR, NO_COLOUR], unsupported=(0,))
    found = solve(p)
    assert found.device[0] == found.device[1] == 2
    assert found.value == 20
    assert found.gap == 0


def test_no_nodes():
    assert solve(problem([], [])).value == 0


def test_malformed_problems_are_refused():
    p = problem([1.0, 2.0], [(0, 1, 1.0)])
    for change, message in (
        ({"size": np.ones(3)}, r"size must have shape \(2,\), got \(3,\)"),
        ({"cpu_seconds": np.array([1.0, np.nan])}, "cpu_seconds must not be negative, got nan"),
        ({"edges": np.array([[0, 2]])}, "nodes 0 to 1"),
        ({"accelerators": 0, "cpus": 0}, "at least one device"),
    ):
        with pytest.raises(PlanError, match=message):
            replace(p, **change)


def test_files_that_are_no_instances_are_refused(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(PlanError, match="cannot be read as JSON"):
        read_instance(path)
    path.write_text('{"nodes": [], "edges": []}')
    with pytest.raises(PlanError, match="maxFPGAs"):
        read_instance(path)
    path.write_text('{"fpgas": [{"nodes": [1]}], "cpus": []}')
    with pytest.raises(PlanError, match="has no device"):
        read_split(path, read_instance(DATA / "layer_bert24_training.json"))
