"""Programs that calibration runs: the layers of ordinary models, forward and backward, in several sizes.

They are made by the op table's own importers and differentiated as any program is, so that every op here is lowered,
and finds its operands, as in a model. What is not here follows its op class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from daggc.ir.builder import Builder
from daggc.ir.graph import Graph, Port, Value
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.passes.vjp import differentiate, simplify
from daggc.plan.bodies import Group, updates

F32 = "f32"


class Layers:
    """Builds a forward graph from ATen calls."""

    def __init__(self, name: str) -> None:
        self.b: Builder = REGISTRY.builder(name)
        self._count = 0

    def __call__(self, overload: str, *args: Any, **kwargs: Any) -> Any:
        """What an ATen overload imports to."""
        return REGISTRY.importers[overload](self.b, *args, **kwargs)

    def param(self, *shape: int) -> Value:
        return self._input("param", TensorType(F32, shape))

    def buffer(self, *shape: int) -> Value:
        return self._input("buffer", TensorType(F32, shape))

    def data(self, *shape: int, dtype: str = F32) -> Value:
        return self._input("input", TensorType(dtype, shape))

    def _input(self, kind: str, type_: TensorType) -> Value:
        self._count += 1
        return self.b.input(type_, kind, f"{kind}{self._count}")

    def linear(self, x: Value, width: int, bias: bool = True) -> Value:
        return self("linear.default", x, self.param(width, x.type.shape[-1]), self.param(width) if bias else None)

    def layer_norm(self, x: Value) -> Value:
        width = x.type.shape[-1]
        return self("layer_norm.default", x, [width], self.param(width), self.param(width))

    def conv(self, x: Value, width: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False) -> Value:
        weight = self.param(width, x.type.shape[1] // groups, kernel, kernel)
        places = [stride, stride], [kernel // 2, kernel // 2], [1, 1]
        return self("conv2d.default", x, weight, self.param(width) if bias else None, *places, groups)

    def batch_norm(self, x: Value) -> Value:
        width = x.type.shape[1]
        given = self.param(width), self.param(width), self.buffer(width), self.buffer(width)
        return self("_native_batch_norm_legit_functional.default", x, *given, True, 0.1, 1e-5)[0]

    def heads(self, x: Value, count: int) -> Value:
        batch, length, width = x.type.shape
        return self("transpose.int", self("view.default", x, [batch, length, count, width // count]), 1, 2)

    def done(self, *values: Value) -> Graph:
        """The joint graph of forward and backward; with several results, of their sums added."""
        total: Value | None = None
        for value in values:
            one = value if not value.type.shape else self("sum.default", value)
            total = one if total is None else self("add.Tensor", total, one)
        assert total is not None
        self.b.output(total, "output", "0")
        return simplify(differentiate(self.b.build()))


def transformer(batch: int, length: int, width: int, vocabulary: int, causal: bool = True) -> Graph:
    """Embedding, one block with fused attention, GELU and residual sums, and the loss over a vocabulary."""
    m = Layers("transformer")
    heads = max(1, width // 64) if width >= 256 else max(1, width // 32)
    x = m("embedding.default", m.param(vocabulary, width), m.data(batch, length, dtype="i64"))
    x = m("add.Tensor", x, m.param(length, width))
    parts = m("split.Tensor", m.linear(m.layer_norm(x), 3 * width), width, -1)
    q, k, v = (m.heads(part, heads) for part in parts)
    mixed = m("scaled_dot_product_attention.default", q, k, v, None, 0.0, causal)
    mixed = m("view.default", m("transpose.int", mixed, 1, 2), [batch, length, width])
    x = m("add.Tensor", x, m.linear(mixed, width))
    x = m("add.Tensor", x, m.linear(m("gelu.default", m.linear(m.layer_norm(x), 4 * width)), width))
    logits = m("view.default", m.linear(x, vocabulary, False), [batch * length, vocabulary])
    return m.done(m("cross_entropy_loss.default", logits, m.data(batch * length, dtype="i64")))


def gated(batch: int, length: int, width: int) -> Graph:
    """What newer and older transformers add: RMS norm by hand, rotated heads, attention by softmax, gates, dropout."""
    m = Layers("gated")
    x = m.data(batch, length, width)
    heads, half = max(1, width // 64), min(width, 64) // 2
    mean = m("mean.dim", m("pow.Tensor_Scalar", x, 2), [-1], True)
    scale = m("rsqrt.default", m("add.Tensor", mean, 1e-6))
    x = m("mul.Tensor", m.param(width), m("mul.Tensor", x, scale))
    q, k, v = (m.heads(m.linear(x, width, False), heads) for _ in range(3))
    cosine, sine = m.data(length, 2 * half), m.data(length, 2 * half)
    rotated: list[Value] = []
    for each in (q, k):
        first, second = m("slice.Tensor", each, 3, 0, half), m("slice.Tensor", each, 3, half, 2 * half)
        turned = m("cat.default", [m("neg.default", second), first], -1)
        rotated.append(m("add.Tensor", m("mul.Tensor", each, cosine), m("mul.Tensor", turned, sine)))
    scores = m("matmul.default", rotated[0], m("transpose.int", rotated[1], 2, 3))
    hidden = m("where.self", m.data(length, length, dtype="bool"), scores, m("mul.Tensor", scores, 0.0))
    weights = m("softmax.int", m("div.Tensor", hidden, 8.0), -1)
    mixed = m("matmul.default", weights, v)
    mixed = m("reshape.default", m("transpose.int", mixed, 1, 2), [batch, length, width])
    x = m("add.Tensor", x, m("native_dropout.default", m.linear(mixed, width), 0.1, True)[0])
    gate = m("silu.default", m.linear(x, 3 * width, False))
    x = m("add.Tensor", x, m.linear(m("mul.Tensor", gate, m.linear(x, 3 * width, False)), width, False))
    return m.done(m("mean.default", m("pow.Tensor_Scalar", x, 2)))


def images(batch: int, size: int, width: int) -> Graph:
    """Convolutions of the kinds that residual networks have, with batch norm, pooling and a linear head."""
    m = Layers("images")
    x = m("relu.default", m.batch_norm(m.conv(m.data(batch, 3, size, size), width, 3)))
    x = m("max_pool2d.default", x, [2, 2])
    h = m("relu.default", m.batch_norm(m.conv(x, width, 3)))
    x = m("relu.default", m("add.Tensor", x, m.batch_norm(m.conv(h, width, 3))))
    h = m("relu.default", m.batch_norm(m.conv(x, 2 * width, 3, 2)))
    x = m("add.Tensor", m.conv(x, 2 * width, 1, 2), m.conv(h, 2 * width, 1))
    h = m("silu.default", m("group_norm.default", m.conv(x, 2 * width, 3, 1, 2 * width), 4))
    x = m("add.Tensor", x, m.conv(h, 2 * width, 1, 1, 1, True))
    x = m("avg_pool2d.default", m("gelu.default", x), [2, 2])
    pooled = m("mean.dim", x, [2, 3])
    logits = m.linear(pooled, 10)
    return m.done(m("cross_entropy_loss.default", logits, m.data(batch, dtype="i64")))


def recurrent(batch: int, length: int, width: int) -> Graph:
    """An LSTM and a GRU of one layer."""
    m = Layers("recurrent")
    x = m.data(batch, length, width)
    zeros = m.data(1, batch, width)

    def weights(gates: int) -> list[Value]:
        rows = gates * width
        return [m.param(rows, width), m.param(rows, width), m.param(rows), m.param(rows)]

    options = (True, 1, 0.0, True, False, True)
    x = m("lstm.input", x, [zeros, zeros], weights(4), *options)[0]
    x = m("gru.input", x, zeros, weights(3), *options)[0]
    return m.done(m("mean.default", m("pow.Tensor_Scalar", x, 2)))


def perceptron(batch: int, widths: Sequence[int]) -> Graph:
    """Linear layers with the common activations between them: thin and thick products of matrices."""
    m = Layers("perceptron")
    x = m.data(batch, widths[0])
    activations = ("relu.default", "tanh.default", "sigmoid.default", "gelu.default", "silu.default")
    for index, width in enumerate(widths[1:]):
        x = m(activations[index % len(activations)], m.linear(x, width))
    return m.done(m("mse_loss.default", x, m.data(*x.type.shape)))


def pointwise(rows: int, columns: int) -> Graph:
    """Elementwise ops and reductions along rows, columns and all, between which data is broadcast and moved."""
    m = Layers("pointwise")
    x, y = m.param(rows, columns), m.param(rows, columns)
    heavy = m("add.Tensor", m("exp.default", m("tanh.default", x)), m("sigmoid.default", y))
    light = m("sub.Tensor", m("mul.Tensor", heavy, y), m("div.Tensor", x, heavy))
    shifted = m("sub.Tensor", light, m("mean.dim", light, [1], True))
    spread = m("mean.dim", m("mul.Tensor", shifted, shifted), [1], True)
    normed = m("mul.Tensor", shifted, m("rsqrt.default", m("add.Tensor", spread, 1e-5)))
    kept = m("where.self", m.data(rows, columns, dtype="bool"), normed, m("relu.default", light))
    turned = m("reshape.default", m("transpose.int", kept, 0, 1), [rows, columns])
    joined = m("cat.default", [turned, m("slice.Tensor", kept, 1, 0, columns // 2)], 1)
    square = m("sqrt.default", m("add.Tensor", m("pow.Tensor_Scalar", joined, 2), 1.0))
    return m.done(m("mean.default", square), m("log_softmax.int", turned, -1), m("sum.dim_IntList", kept, [0]))


def optimizer(kind: str, shapes: Sequence[tuple[int, ...]]) -> Graph:
    """The update of some parameters by AdamW, or by SGD with momentum."""
    options = _ADAMW if kind == "adamw" else _SGD
    names = tuple(f"p{index}" for index in range(len(shapes)))
    group = Group("0", names, kind, options)
    ports = [Port(Value(n, TensorType(F32, s)), "param", n) for n, s in zip(names, shapes, strict=True)]
    return updates(kind, [(port, group) for port in ports], False, True)[0]


_ADAMW = {
    "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "decoupled": True, "amsgrad": False,
    "maximize": False,
}  # fmt: skip
_SGD = {"momentum": 0.9, "dampening": 0.0, "nesterov": False, "weight_decay": 1e-4, "maximize": False}


def _made(make: Callable[..., Graph], *sizes: tuple[Any, ...]) -> list[Callable[[], Graph]]:
    return [lambda size=size: make(*size) for size in sizes]


def _parameters(width: int) -> tuple[tuple[int, ...], ...]:
    """Of a transformer block, roughly."""
    return ((width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,), (width, width), (width,))


_SIZES = [
    *_made(optimizer, ("adamw", _parameters(32)), ("sgd", _parameters(32)), ("adamw", _parameters(128))),
    *_made(pointwise, (16, 64), (64, 256), (256, 512), (1024, 1024)),
    *_made(
        perceptron,
        (1, (256, 1024, 1024, 64)),
        (8, (4096, 1024, 256, 10)),
        (32, (128, 128, 512, 128, 1)),
        (64, (512, 512, 1024)),
        (128, (1024, 1024, 16, 1024)),
    ),
    *_made(transformer, (1, 32, 32, 64), (2, 32, 64, 256, False), (4, 64, 128, 512)),
    *_made(transformer, (2, 128, 192, 1000, False), (4, 128, 256, 512), (2, 128, 512, 4000)),
    *_made(gated, (2, 32, 64), (2, 128, 128), (4, 64, 256)),
    *_made(recurrent, (4, 8, 32), (4, 16, 192), (16, 16, 128), (16, 32, 256)),
    *_made(images, (2, 16, 8), (4, 32, 32), (2, 16, 64), (8, 64, 32), (16, 32, 128)),
    *_made(optimizer, ("sgd", _parameters(256)), ("adamw", _parameters(512))),
]


PART = tuple(range(3, len(_SIZES), 4))  # places of some programs, which tell how one worker compares with another

# A GPU is busy only with more than a CPU can wait for.
_LARGE_SIZES = [
    *_made(optimizer, ("adamw", _parameters(2048))),
    *_made(pointwise, (4096, 1024), (8192, 4096)),
    *_made(perceptron, (256, (4096, 4096, 1024)), (2048, (2048, 8192, 2048))),
    *_made(transformer, (8, 512, 512, 8000), (8, 1024, 1024, 32000)),
    *_made(gated, (8, 512, 1024)),
    *_made(recurrent, (64, 64, 512)),
    *_made(images, (32, 64, 64), (32, 64, 256)),
]


@cache
def suite(kind: str) -> tuple[Graph, ...]:
    """The programs for a kind of device, ``cpu`` or ``cuda``; those that share ops stand together, small ones first."""
    sizes = [*_SIZES, *_LARGE_SIZES] if kind == "cuda" else _SIZES
    return tuple(make() for make in sizes)
