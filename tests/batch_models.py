"""Models as functions of a builder and a batch size: those that microbatches add up for, and those that mix samples."""

from __future__ import annotations

import numpy as np
from batches import CHANNELS, CLASSES, TIME, aten, b_emit, f64, i64

from daggc.ir.attrs import Dense
from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ops import REGISTRY
from daggc.ops.build import broadcast, cast, full, reshape
from daggc.testing import op_samples


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


def mean_of_products(b: Builder, batch: int) -> Value:
    """``(loss * x.shape[0]).mean()``."""
    return b_emit(b, "mean", b.emit("mul_scalar", b.emit("sin", rows(b, batch)), value=float(batch)))


def mean_by_count(b: Builder, batch: int) -> Value:
    """Divided by a number of samples counted in integers."""
    mask = b.emit("gt_scalar", b.input(f64(batch), "input", "1"), value=0.0)
    losses = b.emit("where_scalar", mask, b.emit("sum", rows(b, batch), dims=(1,), keepdim=False), value=0.0)
    count = cast(b, b_emit(b, "sum", cast(b, mask, "i64")), "f64")
    return b.emit("div", b_emit(b, "sum", losses), count)


def chosen_loss(b: Builder, batch: int) -> Value:
    """One of a mean and a penalty, as a flag among the buffers says."""
    w = b.input(f64(CHANNELS), "param", "v", name="wv")
    flag = b.emit("gt_scalar", b.input(f64(), "buffer", "flag"), value=0.0)
    loss = b_emit(b, "mean", rows(b, batch))
    chosen = b.emit("where", flag, loss, b_emit(b, "sum", b.emit("mul", w, w)))
    return b.emit("add", chosen, b.emit("where_scalar", b.emit("logical_not", flag), loss, value=0.5))


def times_first(b: Builder, batch: int) -> Value:
    """Time before samples: ``x.transpose(0, 1)[time, arange(batch)]`` with the numbers of samples copied over time."""
    x = b.emit("permute", layer(b, b.input(f64(batch, TIME, CHANNELS), "input", "0")), dims=(1, 0, 2))
    sample = broadcast(b, b.emit("iota", start=0, step=1, size=batch, dtype="i64"), (2, batch))
    place = b.emit("constant", value=Dense.of(np.array([[2], [0]])))
    return b_emit(b, "mean", b.emit("sin", b.emit("index", x, broadcast(b, place, (2, batch)), sample, dims=(0, 1))))


def with_frozen_statistics(b: Builder, batch: int) -> Value:
    """An op of several results that needs all of its inputs, of what samples share."""
    sample = next(sample for sample in op_samples() if sample.op.name == "layer_norm_backward")
    inputs = [b.input(arg.type, "buffer", f"b{index}") for index, arg in enumerate(sample.sample.inputs)]
    shared = b_emit(b, "sum", b.emit_many("layer_norm_backward", *inputs, **sample.sample.attrs)[0])
    return b.emit("mul", b_emit(b, "mean", rows(b, batch)), shared)


def largest_channels(b: Builder, batch: int) -> Value:
    """Each sample by itself reduced in ways that do not add up."""
    x = rows(b, batch)
    return b_emit(b, "mean", b.emit("mul", *(b.emit(op, x, dims=(1,), keepdim=False) for op in ("amax", "prod"))))


MORE = {
    mean_of_products: ("0",),
    mean_by_count: ("0", "1"),
    chosen_loss: ("0",),
    times_first: ("0",),
    with_frozen_statistics: ("0",),
    largest_channels: ("0",),
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


def columns_by_sample(b: Builder, batch: int) -> Value:
    """``x[arange(batch), label, arange(batch)]``: of two more indices, one is the sample's own."""
    x = b.input(f64(batch, CLASSES, 10), "input", "0")
    label = b.emit("maximum_scalar", b.input(i64(batch), "input", "1"), value=0)
    sample = b.emit("iota", start=0, step=1, size=batch, dtype="i64")
    column = b.emit("minimum_scalar", sample, value=9)
    return b_emit(b, "mean", b.emit("index", x, sample, label, column, dims=(0, 1, 2)))


def learned_count(b: Builder, batch: int) -> Value:
    """Divided by a sum that depends on parameters."""
    x = rows(b, batch)
    return b.emit("div", b_emit(b, "sum", x), b_emit(b, "sum", b.emit("mul", x, x)))


def learned_scale_of_count(b: Builder, batch: int) -> Value:
    """Divided by a sum of data times a parameter."""
    x = b.input(f64(batch, CHANNELS), "input", "0")
    count = b_emit(b, "sum", cast(b, b.emit("gt_scalar", x, value=0.0), "f64"))
    return b.emit("div", b_emit(b, "sum", x), b.emit("mul", count, b.input(f64(), "param", "scale")))


def scaled_learned_count(b: Builder, batch: int) -> Value:
    """Divided by a sum that depends on parameters, times a buffer."""
    x = rows(b, batch)
    count = b_emit(b, "sum", b.emit("mul", x, x))
    return b.emit("div", b_emit(b, "sum", x), b.emit("mul", count, b.input(f64(), "buffer", "scale")))


def noisy_weights(b: Builder, batch: int) -> Value:
    x = rows(b, batch)
    noise = REGISTRY.importers["randn.default"](b, [CHANNELS], dtype="f64")
    return b_emit(b, "sum", b.emit("mul", x, broadcast(b, noise, x.type.shape)))


def largest(b: Builder, batch: int) -> Value:
    return b_emit(b, "amax", rows(b, batch))


def product_of_losses(b: Builder, batch: int) -> Value:
    loss = b_emit(b, "mean", rows(b, batch))
    return b.emit("mul", loss, loss)


def first_of_two(b: Builder, batch: int) -> Value:
    """Two ops mix samples; the earlier one is the second operand."""
    x = rows(b, batch)
    early = b.emit("softmax", x, dim=0)
    return b_emit(b, "sum", b.emit("mul", b.emit("flip", x, dims=(0,)), early))


def weights_by_size(b: Builder, batch: int) -> Value:
    """``x * weights[:batch]``."""
    w = b.emit("slice", b.input(f64(10), "param", "v", name="wv"), dim=0, start=0, end=batch, step=1)
    return b_emit(b, "sum", b.emit("mul", rows(b, batch), broadcast(b, reshape(b, w, (batch, 1)), (batch, CHANNELS))))


MIXING = {
    first_of_two: ("0", "softmax"),
    weights_by_size: ("0", "slice"),
    batch_norm: ("0", "batch_norm"),
    contrastive: ("0", "matmul"),
    root_of_mean: ("0", "sqrt"),
    over_batch_softmax: ("0", "softmax"),
    first_sample: ("0", "slice"),
    reversed_batch: ("0", "flip"),
    torn_batch: ("0", "softmax"),
    sample_numbers: ("0", "mul"),
    columns_by_sample: ("0,1", "index"),
    learned_count: ("0", "div"),
    learned_scale_of_count: ("0", "div"),
    scaled_learned_count: ("0", "div"),
    noisy_weights: ("0", "mul"),
    largest: ("0", "amax"),
    product_of_losses: ("0", "mul"),
}
