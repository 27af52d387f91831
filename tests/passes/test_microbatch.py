"""Microbatches add up to the batch, or the op that mixes samples is named."""

from __future__ import annotations

import math

import numpy as np
import pytest
from batch_models import EXACT, MIXING, MORE, batch_norm, layer, mean_and_penalty, mlp, rows, tiled_positions
from batches import (
    CHANNELS,
    CLASSES,
    TIME,
    analyse,
    arrays_for,
    assert_adds_up,
    aten,
    b_emit,
    f64,
    from_recipe,
    i64,
    model,
    recipes,
)
from hypothesis import given

from daggc.errors import IRError
from daggc.interp import interpret_graph
from daggc.ir.attrs import Dense
from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ops import REGISTRY
from daggc.ops.build import broadcast
from daggc.passes.microbatch import at_batch, microbatched, rewrite_like
from daggc.passes.microbatch.state import Factor, merged, refit, uniform_axes
from daggc.testing import op_samples, random_inputs, sample_graph


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("sizes", [(4, 3), (2, 2, 3), (7,)], ids=str)
def test_uneven_microbatches_add_up(name, sizes):
    if len(sizes) == 1:
        sizes = (4, 2)
    body, inputs = EXACT[name]
    assert_adds_up(model(body), inputs, sum(sizes), sizes)


@pytest.mark.parametrize("body", MORE, ids=lambda body: body.__name__)
def test_hand_made_losses_add_up(body):
    assert_adds_up(model(body), MORE[body], 7, (3, 2, 2))


# --- what mixes samples -------------------------------------------------------------------------------


@pytest.mark.parametrize("body", MIXING, ids=lambda body: body.__name__)
def test_the_op_that_mixes_samples_is_named(body):
    inputs, op = MIXING[body]
    build = model(body)
    result = analyse(build, inputs.split(","), 6, 4)
    assert not result.exact and result.mixing is not None
    assert result.mixing.op.startswith(op), str(result)
    forced = analyse(build, inputs.split(","), 6, 4, force=True)
    assert forced.mixing is not None and "scalar:fraction" in {port.ref for port in forced.forward.inputs}


def test_a_mixing_op_is_named_with_its_module_and_line():
    result = analyse(model(batch_norm), ["0"], 6, 4)
    assert "features.bn1" in str(result) and "cnn.py:12" in str(result)


def test_mixing_that_the_loss_does_not_read_is_no_matter():
    def body(b: Builder, batch: int) -> Value:
        x = rows(b, batch)
        b.emit("softmax", x, dim=0)
        return b_emit(b, "mean", x)

    assert analyse(model(body), ["0"], 6, 4).exact


def test_dropout_is_drawn_for_each_microbatch():
    def body(b: Builder, batch: int) -> Value:
        return b_emit(b, "mean", aten(b, "native_dropout.default", rows(b, batch), 0.5, True))

    assert analyse(model(body), ["0"], 6, 4).exact


def test_a_buffer_made_of_samples_is_refused():
    def build(batch: int):
        b = REGISTRY.builder("forward")
        x = rows(b, batch)
        b.output(b_emit(b, "mean", x), "output", "0")
        b.output(b.emit("mean", x, dims=(0,), keepdim=False), "buffer", "running")
        return b.build()

    assert "running" in str(analyse(build, ["0"], 6, 4).mixing)


def test_numbers_that_change_with_the_batch_in_other_ways_are_named():
    def body(b: Builder, batch: int) -> Value:
        return b_emit(b, "mean", b.emit("mul_scalar", rows(b, batch), value=float(batch**2)))

    result = analyse(model(body), ["0"], 6, 4)
    assert result.mixing is not None and result.mixing.op == "mul_scalar"
    assert "(value=16.0) change" in str(result.mixing)


def test_graphs_that_change_with_the_batch_are_named():
    def body(b: Builder, batch: int) -> Value:
        x = rows(b, batch)
        return b_emit(b, "mean", b.emit("sin" if batch > 4 else "cos", x))

    result = analyse(model(body), ["0"], 6, 4)
    assert result.mixing is not None and "changes with the batch size" in str(result)


def test_results_that_change_with_the_batch_are_named():
    def body(b: Builder, batch: int) -> Value:
        x = rows(b, batch)
        losses = [b_emit(b, "mean", b.emit(op, x)) for op in ("sin", "cos")]
        return losses[batch > 4]

    assert "results of the model change" in str(analyse(model(body), ["0"], 6, 4).mixing)


def test_a_buffer_that_changes_with_the_batch_is_named():
    """Also one with the name of a batched input."""

    def body(b: Builder, batch: int) -> Value:
        return b.emit("add", b_emit(b, "mean", rows(b, batch)), b_emit(b, "sum", b.input(f64(batch), "buffer", "0")))

    assert "buffer:0" in str(analyse(model(body), ["0"], 6, 4).mixing)


@pytest.mark.parametrize("body", [mlp, mean_and_penalty, tiled_positions], ids=lambda body: body.__name__)
def test_one_capture_will_do(body):
    """Without numbers made of the batch size, a second capture tells nothing."""
    inputs = [port.target for port in model(body)(4).inputs_of("input")]
    alone, both = microbatched(model(body)(4), inputs, "0"), analyse(model(body), inputs, 6, 4)
    assert alone.exact and alone.forward.structure() == both.forward.structure()


def test_rows_that_labels_choose_are_not_the_same_for_all():
    """A table copied for each sample, and read at the samples' labels."""

    def body(b: Builder, batch: int) -> Value:
        table = broadcast(b, b.input(f64(CLASSES), "param", "t", name="wt"), (batch, CLASSES))
        sample = b.emit("iota", start=0, step=1, size=batch, dtype="i64")
        labels = b.emit("maximum_scalar", b.input(i64(batch), "input", "0"), value=0)
        return b_emit(b, "mean", b.emit("index", table, sample, labels, dims=(0, 1)))

    assert not microbatched(model(body)(4), ["0"], "0").exact


def test_unknown_ports_are_errors():
    build = model(mlp)
    with pytest.raises(IRError, match="batched inputs"):
        microbatched(build(4), ["7"])
    with pytest.raises(IRError, match="no output"):
        microbatched(build(4), ["0", "1"], "loss")


def test_one_analysis_rewrites_captures_of_other_sizes():
    build = model(EXACT["ignore_index"][0])
    inputs = EXACT["ignore_index"][1]
    whole, small = build(7), build(1)
    result = microbatched(whole, inputs, "0", build(3))
    again = rewrite_like(small, whole, result)
    assert again.batch == 1 and again.exact
    assert again.forward.structure() == rewrite_like(small, whole, result).forward.structure()
    assert [p.ref for p in again.forward.inputs] == [p.ref for p in result.forward.inputs]


def test_the_denominator_needs_nothing_but_the_labels():
    result = analyse(model(EXACT["ignore_index"][0]), ["ids", "labels"], 6, 4)
    assert result.denominators is not None
    assert [port.ref for port in result.denominators.inputs] == ["input:labels"]


# --- generated models ---------------------------------------------------------------------------------


@given(recipes())
def test_generated_models_add_up_or_are_refused(recipe):
    build = from_recipe(recipe)
    result = analyse(build, ["0", "1"], 6, 4)
    if result.exact:
        assert_adds_up(build, ["0", "1"], 7, (3, 2, 2))
    else:
        assert str(result.mixing)


def test_many_generated_models_are_accepted():
    """The test above would be empty if the analysis refused everything."""
    rng = np.random.default_rng(0)
    exact = [analyse(from_recipe(rng.integers(0, 30, (4, 4)).tolist()), ["0", "1"], 6, 4).exact for _ in range(60)]
    assert sum(exact) > 20


# --- the axes that the analysis trusts ----------------------------------------------------------------


REDUCING = [
    sample
    for sample in op_samples()
    if (axes := sample.op.axes(sample_graph(sample).nodes[0])) is not None and axes.reduced
]


@pytest.mark.parametrize("sample", REDUCING, ids=str)
def test_slices_of_reduced_axes_combine_as_declared(sample):
    """The sum (or mean, by size) of the results of two parts is the result of the whole."""
    graph = sample_graph(sample)
    node = graph.nodes[0]
    axes = sample.op.axes(node)
    arrays = list(random_inputs(graph).values())
    whole = interpret_graph(graph, arrays)
    for label, how in axes.reduced.items():
        if any(label in labels for labels in axes.outputs):
            continue
        sizes = {
            size
            for array, labels in zip(arrays, axes.inputs, strict=True)
            for size, own in zip(array.shape, labels, strict=True)
            if own == label
        }
        if len(sizes) != 1 or min(sizes) < 2:
            continue
        (size,) = sizes
        parts = []
        for start, end in ((0, 1), (1, size)):
            own = [
                array[tuple(slice(start, end) if name == label else slice(None) for name in labels)]
                for array, labels in zip(arrays, axes.inputs, strict=True)
            ]
            b = REGISTRY.builder("part")
            inputs = [
                b.input(v.type.with_(shape=a.shape), "input", str(i))
                for i, (v, a) in enumerate(zip(node.inputs, own, strict=True))
            ]
            outputs = b.emit_many(node.op, *inputs, **node.attrs)
            for index, value in enumerate(outputs):
                b.output(value, "output", str(index))
            parts.append((end - start, interpret_graph(b.build(), own)))
        for index, (wanted, labels) in enumerate(zip(whole, axes.outputs, strict=True)):
            if wanted.dtype.kind not in "fiu" or label in labels:
                continue
            got = sum(results[index] * (n / size if how == "mean" else 1) for n, results in parts)
            np.testing.assert_allclose(np.asarray(got, np.float64), wanted.astype(np.float64), rtol=1e-6, atol=1e-9)


# --- factors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "source", "target", "wanted"),
    [
        (Factor(0, 4), (4, 3), (12,), [Factor(0, 4, 3)]),
        (Factor(0, 4, 3), (12,), (4, 3), [Factor(0, 4)]),
        (Factor(1, 4), (2, 4, 3), (8, 3), [Factor(0, 4)]),
        (Factor(0, 4), (4, 6), (2, 2, 6), [Factor(0, 2), Factor(1, 2)]),
        (Factor(0, 4), (4, 6), (3, 8), []),
        (Factor(0, 4), (4, 1), (1, 4), [Factor(1, 4)]),
        (Factor(0, 12), (12, 2), (3, 4, 2), [Factor(0, 3), Factor(1, 4)]),
    ],
)
def test_refit(factor, source, target, wanted):
    assert refit(factor, source, target) == wanted
    assert math.prod(source) == math.prod(target)


def test_uniform_axes():
    """An axis along which some numbers change is not uniform."""
    assert uniform_axes(np.array([[1, 2], [1, 3]])) == ()
    assert uniform_axes(np.array([[1, 2], [1, 2]])) == (Factor(0, 2),)


def test_merged_joins_neighbours():
    assert merged([Factor(0, 2, 3), Factor(0, 3)]) == (Factor(0, 6),)
    assert merged([Factor(0, 2, 6), Factor(0, 3)]) == (Factor(0, 3), Factor(0, 2, 6))


# --- sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [mlp, EXACT["class weights"][0], *MORE], ids=lambda body: body.__name__)
def test_a_graph_at_a_third_size_is_the_one_captured_there(body):
    build = model(body)
    inputs = [port.target for port in build(2).inputs_of("input")]
    for size in (2, 5):
        assert at_batch(build(4), build(6), inputs, size) == build(size)
    one = at_batch(build(4), build(6), inputs, 1)
    arrays = list(arrays_for(one).values())
    for got, wanted in zip(interpret_graph(one, arrays), interpret_graph(build(1), arrays), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_folded_constants_as_long_as_the_batch():
    """Positions copied for each sample, and the samples' numbers, folded into constants."""

    def build(batch: int):
        b = REGISTRY.builder("forward")
        x = layer(b, b.input(f64(batch, TIME, CHANNELS), "input", "0"))
        sample = np.broadcast_to(np.arange(batch).reshape(batch, 1), (batch, 2)).astype(np.int64)
        place = np.broadcast_to(np.array([2, 0], np.int64), (batch, 2))
        sample, place = (b.emit("constant", value=Dense.of(array)) for array in (sample, place))
        b.output(b_emit(b, "mean", b.emit("sin", b.emit("index", x, sample, place, dims=(0, 1)))), "output", "0")
        return b.build()

    assert_adds_up(build, ["0"], 7, (3, 2, 2))
    assert at_batch(build(4), build(6), ["0"], 5) == build(5)
    assert at_batch(build(4), build(6), ["0"], 1).nodes[1].output.type.shape == (1, 2)


def test_a_constant_that_differs_otherwise_is_named():
    def body(b: Builder, batch: int) -> Value:
        numbers = b.emit("constant", value=Dense.of(np.linspace(0, 1, batch)))
        return b_emit(b, "sum", b.emit("mul", b.emit("sum", rows(b, batch), dims=(1,), keepdim=False), numbers))

    result = analyse(model(body), ["0"], 6, 4)
    assert result.mixing is not None and result.mixing.op == "constant"
    with pytest.raises(IRError, match="constant"):
        at_batch(model(body)(4), model(body)(6), ["0"], 5)
