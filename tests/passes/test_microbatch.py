"""Microbatches add up to the batch, or the op that mixes samples is named."""

from __future__ import annotations

import math

import numpy as np
import pytest
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
from daggc.ops.build import broadcast, cast, full, reshape
from daggc.passes.microbatch import at_batch, microbatched, rewrite_like
from daggc.passes.microbatch.state import Factor, merged, refit
from daggc.testing import op_samples, random_inputs, sample_graph


def mlp(b: Builder, batch: int) -> Value:
    x, target = b.input(f64(batch, CHANNELS), "input", "0"), b.input(f64(batch, CHANNELS), "input", "1")
    w, bias = b.input(f64(CHANNELS, CHANNELS), "param", "w", name="w"), b.input(f64(CHANNELS), "param", "b", name="wb")
    y = b.emit("tanh", b.emit("linear", x, w, bias))
    return aten(b, "mse_loss.default", y, target, 1)


def classifier(ignore: bool, weighted: bool = False, smoothing: float = 0.0):
    """Embeddings of tokens, an attention block with positions, and cross entropy over tokens shifted by one."""

    def body(b: Builder, batch: int) -> Value:
        with b.at("model.embed", "model.py:3"):
            ids = b.input(i64(batch, TIME), "input", "ids")
            labels = b.input(i64(batch, TIME), "input", "labels")
            table = b.input(f64(CLASSES, CHANNELS), "param", "table", name="w_table")
            place = b.input(f64(TIME, CHANNELS), "param", "place", name="w_place")
            x = b.emit("embedding", table, b.emit("maximum_scalar", ids, value=0), padding_idx=None)
            x = b.emit("add", x, broadcast(b, place, x.type.shape))
        w = b.input(f64(CHANNELS, CHANNELS), "param", "w", name="w")
        q = b.emit("permute", reshape(b, b.emit("linear", x, w), (batch, TIME, 2, 2)), dims=(0, 2, 1, 3))
        mixed = aten(b, "scaled_dot_product_attention.default", q, q, q, None, 0.0, True)
        x = b.emit("add", x, reshape(b, b.emit("permute", mixed, dims=(0, 2, 1, 3)), x.type.shape))
        scores = b.emit("linear", x, table)
        shifted = b.emit("pad", labels, pads=((0, 0), (0, 1)), value=-100)
        shifted = b.emit("slice", shifted, dim=1, start=1, end=TIME + 1, step=1)
        rows = reshape(b, scores, (batch * TIME, CLASSES))
        weight = b.input(f64(CLASSES), "buffer", "class_weight") if weighted else None
        return aten(
            b, "cross_entropy_loss.default", rows, reshape(b, shifted, (batch * TIME,)), weight, 1,
            -100 if ignore else 10**6, smoothing,
        )  # fmt: skip

    return body


EXACT = {
    "mlp": (mlp, ("0", "1")),
    "ignore_index": (classifier(True), ("ids", "labels")),
    "class weights": (classifier(True, weighted=True), ("ids", "labels")),
    "label smoothing": (classifier(True, smoothing=0.1), ("ids", "labels")),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("sizes", [(4, 3), (2, 2, 3), (7,)], ids=str)
def test_uneven_microbatches_add_up(name, sizes):
    if len(sizes) == 1:
        sizes = (4, 2)
    body, inputs = EXACT[name]
    assert_adds_up(model(body), inputs, sum(sizes), sizes)


def pixels(b: Builder, batch: int) -> Value:
    return b.input(f64(batch, CHANNELS, 4, 4), "input", "0")


def layer(b: Builder, x: Value, name: str = "w") -> Value:
    return b.emit("linear", x, b.input(f64(CHANNELS, CHANNELS), "param", name, name=name))


def rows(b: Builder, batch: int) -> Value:
    return layer(b, b.input(f64(batch, CHANNELS), "input", "0"))


def conv_with_frozen_norm(b: Builder, batch: int) -> Value:
    x = pixels(b, batch)
    w = b.input(f64(CHANNELS, CHANNELS, 3, 3), "param", "w", name="w")
    x = aten(b, "conv2d.default", x, w, None, [1, 1], [1, 1])
    stats = [b.input(f64(CHANNELS), "buffer", name) for name in ("weight", "bias", "mean")]
    var = b.emit("exp", b.input(f64(CHANNELS), "buffer", "var"))
    x = aten(b, "batch_norm.default", x, stats[0], stats[1], stats[2], var, False, 0.1, 1e-5, False)
    x = aten(b, "max_pool2d.default", x, [2, 2])
    return b_emit(b, "mean", x)


def mean_by_size(b: Builder, batch: int) -> Value:
    """``loss.sum() / x.shape[0]``."""
    return b.emit("div_scalar", b_emit(b, "sum", b.emit("sin", rows(b, batch))), value=float(batch))


def each_by_size(b: Builder, batch: int) -> Value:
    """``(loss / x.shape[0]).sum()``."""
    return b_emit(b, "sum", b.emit("div_scalar", b.emit("sin", rows(b, batch)), value=float(batch)))


def mean_by_ones(b: Builder, batch: int) -> Value:
    """``loss.sum() / ones(batch).sum()``."""
    count = b_emit(b, "sum", full(b, 1.0, (batch,), "f64"))
    return b.emit("div", b_emit(b, "sum", rows(b, batch)), count)


def mean_and_penalty(b: Builder, batch: int) -> Value:
    """A mean over the batch, a weight penalty, and a constant."""
    w = b.input(f64(CHANNELS), "param", "v", name="wv")
    penalty = b_emit(b, "sum", b.emit("mul", w, w))
    return b.emit("add_scalar", b.emit("add", b_emit(b, "mean", rows(b, batch)), penalty), value=0.5)


def sum_and_penalty(b: Builder, batch: int) -> Value:
    """A sum over the batch, a weight penalty, and a constant, which count once."""
    w = b.input(f64(CHANNELS), "param", "v", name="wv")
    penalty = b_emit(b, "sum", b.emit("mul", w, w))
    return b.emit("add_scalar", b.emit("add", b_emit(b, "sum", rows(b, batch)), penalty), value=0.5)


def masked_mean(b: Builder, batch: int) -> Value:
    """``(loss * mask).sum() / mask.sum().clamp(min=1)``."""
    mask = cast(b, b.emit("gt_scalar", b.input(f64(batch), "input", "1"), value=0.0), "f64")
    losses = b.emit("mul", b.emit("sum", rows(b, batch), dims=(1,), keepdim=False), mask)
    count = b.emit("maximum_scalar", b_emit(b, "sum", mask), value=1.0)
    return b.emit("div", b_emit(b, "sum", losses), count)


def standardized_data(b: Builder, batch: int) -> Value:
    """Inputs minus their mean over the batch: a total of the data alone."""
    x = b.input(f64(batch, CHANNELS), "input", "0")
    mean = b.emit("mean", x, dims=(0,), keepdim=True)
    return b_emit(b, "mean", b.emit("sin", layer(b, b.emit("sub", x, broadcast(b, mean, x.type.shape)))))


def class_token(b: Builder, batch: int) -> Value:
    """A parameter expanded over the batch and put before the tokens, merged with them and taken apart again."""
    x = b.input(f64(batch, TIME, CHANNELS), "input", "0")
    token = broadcast(b, b.input(f64(1, 1, CHANNELS), "param", "t", name="wt"), (batch, 1, CHANNELS))
    x = b.emit("concat", token, x, dim=1)
    flat = layer(b, reshape(b, x, (batch * (TIME + 1), CHANNELS)))
    back = reshape(b, b.emit("sin", flat), x.type.shape)
    return b_emit(b, "mean", b.emit("slice", back, dim=1, start=0, end=1, step=1))


def tiled_positions(b: Builder, batch: int) -> Value:
    """Positions copied over the batch, then merged with it."""
    x = b.input(f64(batch * 1, TIME, CHANNELS), "input", "0")
    place = b.input(f64(TIME, CHANNELS), "param", "p", name="wp")
    copied = reshape(b, broadcast(b, place, (batch, TIME, CHANNELS)), (batch * TIME, CHANNELS))
    return b_emit(b, "sum", b.emit("mul", reshape(b, x, (batch * TIME, CHANNELS)), copied))


def last_tokens(b: Builder, batch: int) -> Value:
    """``x[arange(batch), last]``, as classifiers on sequences do."""
    x = layer(b, b.input(f64(batch, TIME, CHANNELS), "input", "0"))
    place = b.emit("remainder_scalar", b.input(i64(batch), "input", "1"), value=TIME)
    sample = b.emit("iota", start=0, step=1, size=batch, dtype="i64")
    return b_emit(b, "mean", b.emit("sin", b.emit("index", x, sample, place, dims=(0, 1))))


def packed_positions(b: Builder, batch: int) -> Value:
    """Position ids copied for each sample, then read by the sample's number, as masks of packed sequences are."""
    place = b.emit("iota", start=0, step=1, size=TIME, dtype="i64")
    places = broadcast(b, place, (batch, TIME))
    sample = b.emit("iota", start=0, step=1, size=batch, dtype="i64")
    sample = broadcast(b, reshape(b, sample, (batch, 1)), (batch, TIME))
    column = broadcast(b, b.emit("flip", place, dims=(0,)), (batch, TIME))
    weight = cast(b, b.emit("index", places, sample, column, dims=(0, 1)), "f64")
    x = layer(b, b.input(f64(batch, TIME, CHANNELS), "input", "0"))
    return b_emit(b, "mean", b.emit("mul", b.emit("sum", x, dims=(2,), keepdim=False), weight))


MORE = {
    packed_positions: ("0",),
    conv_with_frozen_norm: ("0",),
    mean_by_size: ("0",),
    each_by_size: ("0",),
    mean_by_ones: ("0",),
    mean_and_penalty: ("0",),
    sum_and_penalty: ("0",),
    masked_mean: ("0", "1"),
    standardized_data: ("0",),
    class_token: ("0",),
    tiled_positions: ("0",),
    last_tokens: ("0", "1"),
}


@pytest.mark.parametrize("body", MORE, ids=lambda body: body.__name__)
def test_hand_made_losses_add_up(body):
    assert_adds_up(model(body), MORE[body], 7, (3, 2, 2))


# --- what mixes samples -------------------------------------------------------------------------------


def batch_norm(b: Builder, batch: int) -> Value:
    with b.at("features.bn1", "cnn.py:12"):
        stats = [b.input(f64(CHANNELS), "buffer", name) for name in ("weight", "bias", "mean", "var")]
        y = aten(b, "_native_batch_norm_legit_functional.default", pixels(b, batch), *stats, True, 0.1, 1e-5)
    return b_emit(b, "mean", b.emit("sin", y))


def contrastive(b: Builder, batch: int) -> Value:
    x = rows(b, batch)
    return b_emit(b, "mean", b.emit("matmul", x, b.emit("permute", x, dims=(1, 0))))


def root_of_mean(b: Builder, batch: int) -> Value:
    x = rows(b, batch)
    return b.emit("sqrt", b_emit(b, "mean", b.emit("mul", x, x)))


def over_batch_softmax(b: Builder, batch: int) -> Value:
    return b_emit(b, "sum", b.emit("softmax", rows(b, batch), dim=0))


def first_sample(b: Builder, batch: int) -> Value:
    return b_emit(b, "sum", b.emit("slice", rows(b, batch), dim=0, start=0, end=1, step=1))


def reversed_batch(b: Builder, batch: int) -> Value:
    x = rows(b, batch)
    return b_emit(b, "sum", b.emit("mul", x, b.emit("flip", x, dims=(0,))))


def torn_batch(b: Builder, batch: int) -> Value:
    """Pairs of samples side by side."""
    return b_emit(b, "sum", b.emit("softmax", reshape(b, rows(b, batch), (2 * batch, CHANNELS // 2)), dim=0))


def sample_numbers(b: Builder, batch: int) -> Value:
    number = cast(b, b.emit("iota", start=0, step=1, size=batch, dtype="i64"), "f64")
    return b_emit(b, "sum", b.emit("mul", rows(b, batch), broadcast(b, reshape(b, number, (batch, 1)), (batch, 4))))


def learned_count(b: Builder, batch: int) -> Value:
    """Divided by a sum that depends on parameters."""
    x = rows(b, batch)
    return b.emit("div", b_emit(b, "sum", x), b_emit(b, "sum", b.emit("mul", x, x)))


def noisy_weights(b: Builder, batch: int) -> Value:
    x = rows(b, batch)
    noise = REGISTRY.importers["randn.default"](b, [CHANNELS], dtype="f64")
    return b_emit(b, "sum", b.emit("mul", x, broadcast(b, noise, x.type.shape)))


def largest(b: Builder, batch: int) -> Value:
    return b_emit(b, "amax", rows(b, batch))


def product_of_losses(b: Builder, batch: int) -> Value:
    loss = b_emit(b, "mean", rows(b, batch))
    return b.emit("mul", loss, loss)


MIXING = {
    batch_norm: ("0", "batch_norm"),
    contrastive: ("0", "matmul"),
    root_of_mean: ("0", "sqrt"),
    over_batch_softmax: ("0", "softmax"),
    first_sample: ("0", "slice"),
    reversed_batch: ("0", "flip"),
    torn_batch: ("0", "softmax"),
    sample_numbers: ("0", "mul"),
    learned_count: ("0", "div"),
    noisy_weights: ("0", "mul"),
    largest: ("0", "amax"),
    product_of_losses: ("0", "mul"),
}


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


def test_graphs_that_change_with_the_batch_are_named():
    def body(b: Builder, batch: int) -> Value:
        x = rows(b, batch)
        return b_emit(b, "mean", b.emit("sin" if batch > 4 else "cos", x))

    result = analyse(model(body), ["0"], 6, 4)
    assert result.mixing is not None and "changes with the batch size" in str(result)


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
