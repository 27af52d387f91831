"""Random ops: counter-based, so that a node draws the same numbers whenever and wherever it runs.

Each op reads a key, ``i64[2]`` of (seed, counter), and has an attribute ``stream`` that no other node of
the program has. The numbers are words of Philox-4x64 with the key (seed, stream), counted from
(0, 0, counter, 0): a new counter for each step or microbatch gives new numbers, and 2**128 words lie between
two counters. The interpreter and generated code call the same NumPy functions here, so they agree bit for bit.
Only raw words are taken from NumPy, whose own distributions may change from release to release.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import DTYPES, TensorType
from daggc.ops.build import (
    Operand,
    broadcast,
    broadcast_together,
    cast,
    full,
    mul,
    neg,
    reshape,
    result_dtype,
    scale,
    sum_dims,
)
from daggc.ops.opdef import (
    NOT_DIFFERENTIABLE,
    Arg,
    Axes,
    Importer,
    OpDef,
    Sample,
    elementwise_cost,
    letters,
    register,
    require,
    scalar,
    torch_dtype,
)

KEY = TensorType("i64", (2,))
_DIGITS = {"f64": 53, "f32": 24, "f16": 11, "bf16": 8}  # bits of a mantissa: a uniform number never rounds to 1


# --- drawing ------------------------------------------------------------------------------------------


def draw_words(key: np.ndarray, stream: int, count: int) -> np.ndarray:
    """``count`` random words, u64."""
    seed, counter = np.asarray(key, np.int64).view(np.uint64)
    generator = np.random.Philox(
        key=np.array([seed, stream], np.uint64), counter=np.array([0, 0, counter, 0], np.uint64)
    )
    return generator.random_raw(count)


def draw_bernoulli(key: np.ndarray, stream: int, shape: Sequence[int], p: float) -> np.ndarray:
    """bool: True with probability ``p``, to 32 bits; two draws a word."""
    count = math.prod(shape)
    halves = draw_words(key, stream, (count + 1) // 2).view(np.uint32)[:count]
    return (halves < round(p * 2**32)).reshape(shape)


def draw_uniform(key: np.ndarray, stream: int, shape: Sequence[int], low: float, high: float, dtype: str) -> np.ndarray:
    """Uniform in [low, high), with as many random bits as the mantissa of ``dtype`` has; f64 or f32."""
    digits = _DIGITS[dtype]
    words = draw_words(key, stream, math.prod(shape)) >> np.uint64(64 - digits)
    unit = words.astype(_wide(dtype)) * 2.0**-digits
    return (unit if (low, high) == (0, 1) else unit * (high - low) + low).reshape(shape)


def draw_normal(key: np.ndarray, stream: int, shape: Sequence[int], mean: float, std: float, dtype: str) -> np.ndarray:
    """Normal by inversion, so that each number comes from one word; f64 or f32."""
    words = draw_words(key, stream, math.prod(shape)) >> np.uint64(11)
    unit = (words.astype(np.float64) + 0.5) * 2.0**-53  # strictly between 0 and 1
    return (special.ndtri(unit) * std + mean).astype(_wide(dtype)).reshape(shape)


def draw_randint(key: np.ndarray, stream: int, shape: Sequence[int], low: int, high: int) -> np.ndarray:
    """i64 in [low, high)."""
    words = draw_words(key, stream, math.prod(shape)) % np.uint64(high - low)
    return (words.astype(np.int64) + low).reshape(shape)


def draw_randperm(key: np.ndarray, stream: int, size: int) -> np.ndarray:
    """i64[size]: a permutation of 0 ... size-1."""
    return np.argsort(draw_words(key, stream, size), kind="stable")


def _wide(dtype: str) -> np.dtype:
    """16-bit floats are drawn in f32 and rounded at the end, by NumPy and torch alike."""
    return np.dtype(np.float64 if dtype == "f64" else np.float32)


# --- the ops ------------------------------------------------------------------------------------------


def _register_random(
    name: str,
    draw: Callable[..., np.ndarray],
    parameters: Sequence[str],
    check: Callable[[Attrs], None],
    aten: Mapping[str, Importer],
    samples: Sequence[Mapping[str, Attr]],
    flops: float = 10,
) -> None:
    """Register ``name(key) {*parameters, shape, dtype, stream}``; ``draw(key, stream, shape, **parameters)``."""

    def infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        require(tuple(inputs) == (KEY,), f"one key of type {KEY} is required")
        require(type(attrs["stream"]) is int and attrs["stream"] >= 0, "stream is a non-negative int")
        check(attrs)
        return (TensorType(attrs["dtype"], attrs["shape"]),)

    def evaluate(node: Node, key: np.ndarray) -> np.ndarray:
        attrs = node.attrs
        drawn = draw(key, attrs["stream"], attrs["shape"], **{name: attrs[name] for name in parameters})
        return drawn.astype(node.output.type.numpy_dtype, copy=False)

    def lower(node: Node, args: Sequence[str]) -> str:
        attrs = node.attrs
        given = ", ".join(scalar(attrs[name]) for name in parameters if name != "dtype")
        shape = "" if name == "randperm" else f"{attrs['shape']}, "
        return f"kernels.{name}({args[0]}, {attrs['stream']}, {shape}{given}, {torch_dtype(attrs['dtype'])}, device)"

    register(
        OpDef(
            name=name,
            infer=infer,
            evaluate=evaluate,
            vjp=NOT_DIFFERENTIABLE,
            cost=elementwise_cost(flops),
            axes=lambda node: Axes(((None,),), (letters(node.output.type.rank),)),
            lower=lower,
            aten=aten,
            samples=tuple(Sample((Arg(KEY, "key"),), attrs) for attrs in samples),
        )
    )


def _is_float(attrs: Attrs) -> None:
    require(DTYPES[attrs["dtype"]].kind == "f", f"a float dtype is required, got {attrs['dtype']}")


def _check_bernoulli(attrs: Attrs) -> None:
    require(0 <= attrs["p"] <= 1, f"p is a probability, got {attrs['p']!r}")


def _check_randint(attrs: Attrs) -> None:
    require(attrs["low"] < attrs["high"], f"low < high is required, got {attrs['low']} and {attrs['high']}")


def _check_randperm(attrs: Attrs) -> None:
    require(attrs["shape"] == (attrs["size"],), "the shape is (size,)")


# --- drawing as IR ------------------------------------------------------------------------------------


def bernoulli(b: Builder, p: float, shape: Sequence[int], dtype: str) -> Value:
    """Ones with probability ``p``, else zeros."""
    return b.emit("bernoulli", b.random_key(), p=float(p), shape=tuple(shape), dtype=dtype, stream=b.next_stream())


def uniform(b: Builder, shape: Sequence[int], dtype: str, low: float = 0.0, high: float = 1.0) -> Value:
    return b.emit("uniform", b.random_key(), low=float(low), high=float(high), shape=tuple(shape), dtype=dtype,
                  stream=b.next_stream())  # fmt: skip


def normal(b: Builder, shape: Sequence[int], dtype: str, mean: float = 0.0, std: float = 1.0) -> Value:
    return b.emit("normal", b.random_key(), mean=float(mean), std=float(std), shape=tuple(shape), dtype=dtype,
                  stream=b.next_stream())  # fmt: skip


def dropout(b: Builder, x: Value, p: float) -> tuple[Value, Value]:
    """``x`` with elements zeroed with probability ``p``, and the bool mask of those that were kept.

    As torch does on the CPU: the noise is scaled first, then multiplied by.
    """
    kept = bernoulli(b, 1 - p, x.type.shape, "bool")
    noise = cast(b, kept, x.type.dtype)
    noise = scale(b, noise, 0.0) if p == 1 else b.emit("div_scalar", noise, value=1.0 - p)
    return mul(b, x, noise), kept


# --- importers ----------------------------------------------------------------------------------------


def _import_dropout(b: Builder, x: Value, p: float, train: bool = True) -> Value:
    return x if p == 0 or not train or x.type.numel == 0 else dropout(b, x, p)[0]


def _import_native_dropout(b: Builder, x: Value, p: float, train: bool | None) -> tuple[Value, Value]:
    if p == 0 or train is False:
        return x, full(b, True, x.type.shape, "bool")
    return dropout(b, x, p)


def _import_bernoulli(b: Builder, probabilities: Value, **_: Any) -> Value:
    """A draw for each element's own probability."""
    dtype = probabilities.type.dtype
    return cast(b, b.emit("lt", uniform(b, probabilities.type.shape, dtype), probabilities), dtype)


def _import_bernoulli_tensor(b: Builder, x: Value, probabilities: Value, **_: Any) -> Value:
    probabilities, _x = broadcast_together(b, probabilities, x)
    return cast(b, _import_bernoulli(b, probabilities), x.type.dtype)


def _import_rand(b: Builder, size: Sequence[int], *, dtype: str | None = None, **_: Any) -> Value:
    return uniform(b, size, dtype or "f32")


def _import_randn(b: Builder, size: Sequence[int], *, dtype: str | None = None, **_: Any) -> Value:
    return normal(b, size, dtype or "f32")


def _import_normal_around(b: Builder, mean: Operand, std: Operand = 1.0, **_: Any) -> Value:
    """``normal`` whose mean or standard deviation is a tensor: standard numbers, scaled and shifted."""
    tensors = [item for item in (mean, std) if isinstance(item, Value)]
    common = broadcast_together(b, *tensors)
    given = iter(cast(b, item, result_dtype(*tensors)) for item in common)
    mean, std = (next(given) if isinstance(item, Value) else item for item in (mean, std))
    drawn = normal(b, common[0].type.shape, result_dtype(*tensors))
    drawn = mul(b, drawn, std) if isinstance(std, Value) else scale(b, drawn, std)
    if isinstance(mean, Value):
        return b.emit("add", drawn, mean)
    return b.emit("add_scalar", drawn, value=mean)


def _randint(b: Builder, low: int, high: int, shape: Sequence[int], dtype: str) -> Value:
    return b.emit("randint", b.random_key(), low=low, high=high, shape=tuple(shape), dtype=dtype,
                  stream=b.next_stream())  # fmt: skip


def _import_exponential(b: Builder, x: Value, rate: float = 1.0, **_: Any) -> Value:
    """By inversion; 1 - u is never zero. Zero becomes the least step, as on CUDA: Gumbel noise is its logarithm."""
    drawn = neg(b, b.emit("log1p", neg(b, uniform(b, x.type.shape, x.type.dtype))))
    drawn = b.emit("maximum_scalar", drawn, value=2.0 ** -(_DIGITS[x.type.dtype] + 1))
    return drawn if rate == 1 else b.emit("div_scalar", drawn, value=float(rate))


def _import_cauchy(b: Builder, x: Value, median: float = 0.0, sigma: float = 1.0, **_: Any) -> Value:
    """By inversion, of numbers strictly inside (0, 1), where the tangent is finite."""
    half = 2.0 ** -(_DIGITS[x.type.dtype] + 1)
    angle = b.emit("add_scalar", uniform(b, x.type.shape, x.type.dtype), value=half - 0.5)
    drawn = b.emit("tan", scale(b, angle, math.pi))
    return b.emit("add_scalar", scale(b, drawn, float(sigma)), value=float(median))


def _import_geometric(b: Builder, x: Value, p: float, **_: Any) -> Value:
    """The number of trials up to the first success, in x's dtype."""
    wide = x.type.dtype if x.type.dtype == "f64" else "f32"
    trials = b.emit("log1p", neg(b, uniform(b, x.type.shape, wide)))
    trials = b.emit("ceil", b.emit("div_scalar", trials, value=math.log1p(-p) if p < 1 else -math.inf))
    return cast(b, b.emit("maximum_scalar", trials, value=1.0), x.type.dtype)


def _import_log_normal(b: Builder, x: Value, mean: float = 1.0, std: float = 2.0, **_: Any) -> Value:
    return b.emit("exp", normal(b, x.type.shape, x.type.dtype, mean, std))


def _import_random(b: Builder, x: Value, *bounds: int | None, **_: Any) -> Value:
    """``random_``: integers in [low, high), or all that the dtype can hold and, of floats, tell apart."""
    info = DTYPES[x.type.dtype]
    most = 2 ** _DIGITS[x.type.dtype] if info.kind == "f" else 2 if info.kind == "b" else np.iinfo(info.numpy).max
    low, high = bounds if len(bounds) == 2 else (0, *bounds) if bounds else (0, None)
    return _randint(b, low or 0, most if high is None else high, x.type.shape, x.type.dtype)


def _import_multinomial(b: Builder, weights: Value, count: int, replacement: bool = False, **_: Any) -> Value:
    """Positions along the last axis. Without replacement: the largest of weight / exponential noise, as in torch."""
    last, shape = weights.type.rank - 1, weights.type.shape
    if not replacement or count == 1:
        wide = weights if weights.type.dtype == "f64" else cast(b, weights, "f32")
        keys = b.emit("div", wide, _import_exponential(b, wide))
        return b.emit_many("topk", keys, k=count, dim=last, largest=True)[1]
    # The number of running sums below v; v is in (0, total], so classes of no weight are never hit.
    sums = b.emit("cumsum", cast(b, weights, "f64"), dim=last)
    drawn = b.emit("add_scalar", neg(b, uniform(b, (*shape[:-1], count), "f64")), value=1.0)
    total = b.emit("slice", sums, dim=last, start=shape[-1] - 1, end=shape[-1], step=1)
    v = mul(b, drawn, broadcast(b, total, drawn.type.shape))
    cube = (*shape[:-1], count, shape[-1])
    below = b.emit(
        "lt",
        broadcast(b, reshape(b, sums, (*shape[:-1], 1, shape[-1])), cube),
        broadcast(b, reshape(b, v, (*shape[:-1], count, 1)), cube),
    )
    return sum_dims(b, cast(b, below, "i64"), (last + 1,))


def _import_native_dropout_backward(b: Builder, ct: Value, mask: Value, factor: float) -> Value:
    return mul(b, ct, scale(b, cast(b, mask, ct.type.dtype), float(factor)))


def _import_rrelu(
    b: Builder, x: Value, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, **_: Any
) -> Value:
    if not training:
        return b.emit("leaky_relu", x, negative_slope=(lower + upper) / 2)
    slope = uniform(b, x.type.shape, x.type.dtype, lower, upper)
    return b.emit("where", b.emit("gt_scalar", x, value=0.0), x, mul(b, x, slope))


def _import_randperm(b: Builder, size: int, *, dtype: str | None = None, **_: Any) -> Value:
    return b.emit("randperm", b.random_key(), size=size, shape=(size,), dtype=dtype or "i64", stream=b.next_stream())


_register_random(
    "bernoulli",
    lambda key, stream, shape, p: draw_bernoulli(key, stream, shape, p),
    ("p",),
    _check_bernoulli,
    {
        "dropout.default": _import_dropout,
        "native_dropout.default": _import_native_dropout,
        "bernoulli.default": _import_bernoulli,
        "bernoulli.p": lambda b, x, p=0.5, **_: bernoulli(b, p, x.type.shape, x.type.dtype),
        "bernoulli.Tensor": _import_bernoulli_tensor,
        "native_dropout_backward.default": _import_native_dropout_backward,
    },
    (
        {"p": 0.75, "shape": (3, 4), "dtype": "bool", "stream": 0},
        {"p": 0.1, "shape": (5,), "dtype": "f64", "stream": 3},
        {"p": 1.0, "shape": (), "dtype": "bf16", "stream": 1},
    ),
)
_register_random(
    "uniform",
    draw_uniform,
    ("low", "high", "dtype"),
    _is_float,
    {
        "rand.default": _import_rand,
        "rand_like.default": lambda b, x, *, dtype=None, **_: uniform(b, x.type.shape, dtype or x.type.dtype),
        "uniform.default": lambda b, x, low=0.0, high=1.0, **_: uniform(b, x.type.shape, x.type.dtype, low, high),
        "exponential.default": _import_exponential,
        "rrelu.default": _import_rrelu,
        "cauchy.default": _import_cauchy,
        "geometric.default": _import_geometric,
        "multinomial.default": _import_multinomial,
    },
    (
        {"low": 0.0, "high": 1.0, "shape": (3, 4), "dtype": "f64", "stream": 0},
        {"low": -2.0, "high": 3.0, "shape": (5,), "dtype": "f32", "stream": 2},
        {"low": 0.0, "high": 1.0, "shape": (), "dtype": "bf16", "stream": 1},
    ),
)
_register_random(
    "normal",
    draw_normal,
    ("mean", "std", "dtype"),
    _is_float,
    {
        "randn.default": _import_randn,
        "randn_like.default": lambda b, x, *, dtype=None, **_: normal(b, x.type.shape, dtype or x.type.dtype),
        "normal_functional.default": lambda b, x, mean=0.0, std=1.0, **_: normal(
            b, x.type.shape, x.type.dtype, mean, std
        ),
        "normal.float_float": lambda b, mean, std, size, *, dtype=None, **_: normal(b, size, dtype or "f32", mean, std),
        "normal.Tensor_float": _import_normal_around,
        "normal.float_Tensor": _import_normal_around,
        "normal.Tensor_Tensor": _import_normal_around,
        "log_normal.default": _import_log_normal,
    },
    (
        {"mean": 0.0, "std": 1.0, "shape": (3, 4), "dtype": "f64", "stream": 0},
        {"mean": 1.0, "std": 0.5, "shape": (5,), "dtype": "f32", "stream": 2},
    ),
    flops=30,
)
_register_random(
    "randint",
    draw_randint,
    ("low", "high"),
    _check_randint,
    {
        "randint.default": lambda b, high, size, *, dtype=None, **_: _randint(b, 0, high, size, dtype or "i64"),
        "randint.low": lambda b, low, high, size, *, dtype=None, **_: _randint(b, low, high, size, dtype or "i64"),
        "randint_like.default": lambda b, x, high, *, dtype=None, **_: _randint(
            b, 0, high, x.type.shape, dtype or x.type.dtype
        ),
        "randint_like.low_dtype": lambda b, x, low, high, *, dtype=None, **_: _randint(
            b, low, high, x.type.shape, dtype or x.type.dtype
        ),
        **dict.fromkeys(("random.default", "random.to", "random.from"), _import_random),
    },
    (
        {"low": -3, "high": 7, "shape": (3, 4), "dtype": "i64", "stream": 0},
        {"low": 0, "high": 2, "shape": (5,), "dtype": "f32", "stream": 1},
    ),
)
_register_random(
    "randperm",
    lambda key, stream, shape, size: draw_randperm(key, stream, size),
    ("size",),
    _check_randperm,
    {"randperm.default": _import_randperm},
    ({"size": 7, "shape": (7,), "dtype": "i64", "stream": 0},),
)
