"""The public test tools: inputs of the right domain, programs that are deep, connected and of every op."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

from daggc.ir.graph import Program, Value
from daggc.ir.types import TensorType
from daggc.ir.verifier import verify
from daggc.ops import REGISTRY
from daggc.ops.opdef import Arg, Sample
from daggc.testing import (
    Slope,
    domain_of,
    draw_array,
    finite_difference,
    inner,
    op_samples,
    programs,
    random_inputs,
    rounded_otherwise,
    sample_graph,
    with_dtype,
)
from daggc.testing.choices import Replayed, Seeded, shrink
from daggc.testing.grow import Grower
from daggc.testing.likeness import Likeness, of_models
from daggc.testing.programs import grow_program
from daggc.testing.samples import OpSample

DOMAINS = ("real", "positive", "unit", "large", "nonzero", "distinct", "bool", "small", "count", "index:5", "key")


@given(st.sampled_from(DOMAINS), st.sampled_from(("f64", "f32", "bf16", "i64", "u8", "bool")), st.integers(0, 99))
def test_arrays_are_of_their_domain(domain: str, dtype: str, seed: int):
    type_ = TensorType(dtype, (4, 5))
    array = draw_array(Arg(type_, domain), np.random.default_rng(seed))
    assert (array.dtype, array.shape) == (type_.numpy_dtype, type_.shape)
    numbers = array.astype(np.float64)
    assert np.isfinite(numbers).all()
    if dtype in ("f64", "f32", "bf16"):
        holds = {
            "positive": numbers > 0,
            "unit": (numbers > 0) & (numbers < 1),
            "large": (numbers > 1) & (numbers < 5),
            "nonzero": numbers != 0,
            "distinct": np.unique(numbers).size == numbers.size,
        }
        assert np.all(holds.get(domain, True))
    if domain == "index:5" and dtype != "bool":
        assert np.all((numbers >= 0) & (numbers < 5))


@pytest.mark.parametrize(
    ("name", "dtype", "domain"),
    [
        ("positive", "f64", "positive"),
        ("positive_3", "f64", "positive"),
        ("index5", "i64", "index:5"),
        ("index12_1", "i64", "index:12"),
        ("fc_weight", "f32", "real"),
        ("positively", "f32", "real"),
        ("ids", "i64", "index:2"),
        ("mask", "bool", "bool"),
    ],
)
def test_the_name_of_an_input_tells_its_domain(name: str, dtype: str, domain: str):
    assert domain_of(Value(name, TensorType(dtype, (2,)))) == domain


@pytest.mark.parametrize("op_sample", list(op_samples()), ids=str)
def test_sample_inputs_survive_the_round_trip_of_names(op_sample):
    graph = sample_graph(op_sample)
    assert [domain_of(port.value) for port in graph.inputs] == [arg.domain for arg in op_sample.sample.inputs]
    arrays = random_inputs(graph, seed=5)
    assert list(arrays) == [port.ref for port in graph.inputs]
    for array, again in zip(arrays.values(), random_inputs(graph, seed=5).values(), strict=True):
        np.testing.assert_array_equal(array, again)


@given(programs(dtypes=("f64", "f32", "bf16", "f16")))
def test_programs_verify(program: Program):
    verify(program, REGISTRY)


@given(programs(differentiable=True, max_ops=12))
def test_differentiable_programs_are_in_f64(program: Program):
    verify(program, REGISTRY)
    floats = {value.type.dtype for value in program.forward.values() if value.type.differentiable}
    assert floats == {"f64"}


def test_programs_are_deep_and_connected():
    depths: list[int] = []
    users: list[int] = []

    @settings(max_examples=100, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(programs())
    def look(program: Program) -> None:
        depth = {port.value.name: 0 for port in program.forward.inputs}
        for node in program.forward.nodes:
            level = 1 + max((depth[value.name] for value in node.inputs), default=0)
            depth.update((value.name, level) for value in node.outputs)
        depths.append(max(depth.values()))
        users.append(max(map(len, program.forward.users().values()), default=0))

    look()
    assert np.median(depths) >= 5
    assert np.median(users) >= 2


def test_only_the_ops_asked_for_are_drawn():
    fitting = {"cast", "reshape", "broadcast", "slice", "concat", "mul_scalar"}

    @given(programs(ops=("matmul", "exp")))
    def look(program: Program) -> None:
        assert {node.op for node in program.forward.nodes} <= {"matmul", "exp", *fitting}

    look()


def test_failures_shrink_to_little():
    """The smallest program with a matmul is that and its inputs, and at most one op that nothing reads."""
    smallest = find(
        programs(max_ops=12),
        lambda program: any(node.op == "matmul" for node in program.forward.nodes),
        settings=settings(max_examples=3000, derandomize=True, database=None),
    )
    assert len(smallest.forward.nodes) <= 2


def test_a_seed_makes_one_program():
    source = Seeded(3)
    program = grow_program(source, like_models=True, max_ops=12)
    assert grow_program(Seeded(3), like_models=True, max_ops=12) == program
    assert grow_program(Replayed(source.numbers), like_models=True, max_ops=12) == program
    assert grow_program(Seeded(4), like_models=True, max_ops=12) != program
    verify(grow_program(Replayed([]), like_models=True), REGISTRY)
    verify(grow_program(Replayed([10**6] * 100), like_models=True), REGISTRY)


def test_recorded_choices_shrink():
    def fails(numbers) -> bool:
        program = grow_program(Replayed(numbers), max_ops=12)
        return any(node.op == "matmul" for node in program.forward.nodes)

    numbers = next(source.numbers for source in map(_grown, range(1000)) if fails(source.numbers))
    smallest = shrink(numbers, fails, seconds=20)
    assert fails(smallest)
    assert len(smallest) < len(numbers)
    assert len(grow_program(Replayed(smallest), max_ops=12).forward.nodes) <= 3


def _grown(seed: int) -> Seeded:
    source = Seeded(seed)
    grow_program(source, max_ops=12)
    return source


@given(programs(like_models=True, max_ops=12))
def test_programs_like_models_verify(program: Program):
    verify(program, REGISTRY)


def test_programs_like_models_join_ops_as_models_do():
    grown = [grow_program(Seeded(seed), like_models=True, max_ops=20, length=40).forward for seed in range(60)]
    found, wanted = Likeness.of(grown), of_models()
    frequent = [(maker, op) for (maker, op, _), count in wanted.counts.items() if count >= 10 and maker]
    pairs = {(maker, op) for maker, op, _ in found.counts}
    assert sum(pair in pairs for pair in frequent) >= 0.8 * len(frequent)
    assert set(wanted.ops) <= set(REGISTRY)


@pytest.mark.parametrize(
    ("op", "number", "is_read"),
    [
        ("mode", np.nan, False),
        ("layer_norm", np.nan, True),
        ("layer_norm", np.inf, False),
        ("attention", -np.inf, False),
        ("cumsum", np.nan, True),
    ],
)
def test_numbers_that_torch_has_no_one_answer_for_are_not_read(op: str, number: float, is_read: bool):
    """The mode among nans; the mean that a norm keeps of infinities."""
    sample = next(sample for sample in op_samples() if sample.op.name == op)
    inputs = sample.sample.inputs
    grower = Grower(Seeded(0), differentiable=False, likeness=None)
    attrs = {"value": number, "shape": inputs[0].type.shape, "dtype": "f64"}
    grower.add(OpSample(REGISTRY["full"], Sample((), attrs), 0), ())
    found = grower.recent()
    assert found is not None
    grower.add(sample, (True,) * len(inputs), 0, found[0])
    assert (found[0] in grower.b.nodes[-1].inputs) == is_read


def test_a_dtype_that_an_op_refuses():
    (exp, *_) = [sample for sample in op_samples() if sample.op.name == "exp"]
    assert with_dtype(exp, "bool") is None
    half = with_dtype(exp, "bf16")
    assert half is not None
    assert half.sample.inputs[0].type.dtype == "bf16"


def test_finite_differences():
    b = REGISTRY.builder("forward")
    x = b.input(TensorType("f64", (3,)), "input", "0")
    b.output(b.emit("exp", x), "output", "0")
    graph = b.build()
    at, along, ct = np.array([0.1, 0.2, 0.3]), np.array([1.0, -2.0, 0.5]), np.array([1.0, 1.0, 3.0])
    slope = finite_difference(graph, {"input:0": at}, {"input:0": along}, {"output:0": ct})
    assert slope.reliable
    assert slope.agrees(inner(ct, np.exp(at) * along), tolerance=1e-10)
    assert not slope.agrees(inner(ct, np.exp(at) * along) + 1e-3)
    assert not Slope(1.0, 0.5).reliable


def test_what_a_norm_leaves_of_equal_numbers_is_rounding():
    b = REGISTRY.builder("forward")
    x = b.input(TensorType("f64", (2, 4)), "input", "0")
    ones = b.emit("full", value=1.0, shape=(2, 4), dtype="f64")
    b.output(b.emit_many("layer_norm", ones, normalized_shape=(4,), eps=1e-5)[0], "output", "0")
    for op in ("max", "median"):
        b.output(b.emit("eq", b.emit(op, x), b.emit(op, x)), "output", op)
    found = [rounded_otherwise(b.build(), [np.ones((2, 4))], seed) for seed in range(4)]
    sizes = [np.abs(norm).max() for norm, *_ in found]
    assert 1e-14 < max(sizes) < 1e-12
    assert all(same for _, *picked in found for same in picked), "what is picked from numbers is one of them"
