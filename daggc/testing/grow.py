"""A graph under construction by the program strategy: values, their numbers, and how they are made to fit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from daggc.interp import evaluate_node
from daggc.ir.attrs import Attr
from daggc.ir.graph import Value
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.opdef import Arg
from daggc.testing.arrays import distinct_gap, draw_array, port_name
from daggc.testing.choices import Choices, pick, pick_weighted
from daggc.testing.fit import fitted
from daggc.testing.likeness import Likeness
from daggc.testing.samples import OpSample

_LIMIT = 4.0  # larger numbers are scaled down before they are read again
_FRESH_ONLY = (
    "key",
    "count",
    "regular",
    "hermitian",
    "triangular",
)  # too particular to be made of other values, or to be read as others
# What torch makes of these numbers is chance: it differs between its own kernels, sizes and dtypes.
# mode sorts by <, which is no order where there is a nan; searchsorted takes its boundaries for sorted; of high degree
# and nan, orthogonal polynomials are what the memory held; attention without one score that is a number gives zeros
# below 16 keys, and nan above, and in its other kernels. binary_cross_entropy raises at a nan, which is not chance; but
# the interpreter gives nan, as torch does on a GPU.
_ATTENTION = ("attention", "attention_backward", "attention_mask_grad")
_POLYNOMIALS = tuple(name for name in REGISTRY if "_polynomial_" in name)
_NO_NAN = (
    *("mode", "searchsorted", "fractional_max_pool", "lstsq", "grid_sample_backward", "binary_cross_entropy"),
    *(*_ATTENTION, *_POLYNOMIALS),
)
# The mean that layer_norm keeps of an infinity is nan, but infinite where that is the last of a vector; norms multiply
# rstd and weight, or x and rstd, first; kernels of convolutions, of interpolation, of reflectors and of transforms
# multiply infinities by zeros that others leave out; gelu of infinity is nan in f32, for more than one number;
# ctc_loss of scores that are all -inf is inf for one sequence and nan for the next.
_NORMS = ("layer_norm", "group_norm", "batch_norm", "batch_norm_eval")
_NO_INFINITY = (
    *(name for norm in _NORMS for name in (norm, f"{norm}_backward")),
    *("conv", "conv_input_grad", "conv_weight_grad", "interpolate", "interpolate_backward"),
    *("householder_product", "ormqr", "fft_c2c", "fft_r2c", "fft_c2r", "gelu", "recurrent_layer_backward", "ctc_loss"),
    *("fractional_max_pool", "lstsq", "grid_sample_backward", *_ATTENTION),
)
_MAX_OUTPUTS = 3
_OF_REALS = ("positive", "unit", "large", "nonzero", "distinct")  # domains that a remainder does not lead to
_RECENT = 5
_MAX_CONCAT = 3  # more copies are made by a broadcast
_APART = 0.01  # between numbers of a distinct domain, and from the ends of others: more than differences move them


class Grower:
    """Draws values for arguments and emits nodes, computing every value on the way.

    ``differentiable``: nothing discontinuous in a float is made, and at least one output is active, that is,
    depends on a float ``param`` or ``input``. ``likeness``: which ops read what in models; values are then read
    as they are wherever their numbers allow it.
    """

    def __init__(self, choices: Choices, differentiable: bool, likeness: Likeness | None = None) -> None:
        self.choices = choices
        self.differentiable = differentiable
        self.likeness = likeness
        self.b = REGISTRY.builder("forward")
        self._arrays: dict[str, np.ndarray] = {}
        self._pool: list[Value] = []
        self._domains: dict[str, str] = {}
        self._active: set[str] = set()
        self._makers: dict[str, str] = {}
        self._fixed: set[str] = set()  # values that no input has a part in
        self._ports: list[tuple[Value, str, str]] = []
        if differentiable:
            self._fresh(Arg(TensorType("f64", (2, 3))), smooth=True)

    # --- growing --------------------------------------------------------------------------------------

    def add(self, sample: OpSample, smooth: Sequence[bool], at: int = -1, value: Value | None = None) -> None:
        """Add the op of a sample. ``smooth[i]``: the op is differentiable in argument i.

        ``value``: what argument ``at`` reads, if the op can be made to read it.
        """
        inputs: list[Value] = []
        if value is not None:
            if self._fits(value, sample.sample.inputs[at], smooth[at], sample.op.name):
                sample = fitted(self.choices, sample, at, value.type) or sample
            else:
                at = -1
        for index, (arg, has_cotangent) in enumerate(zip(sample.sample.inputs, smooth, strict=True)):
            if index == at and value is not None:
                inputs.append(value if self._is(value, arg) else self._adapt(value, arg))
            else:
                inputs.append(self._find(arg, has_cotangent, sample.op.name, index))
        outputs = self._emit_many(sample.op.name, *inputs, **sample.sample.attrs)
        float_inputs = any(value.type.differentiable for value in inputs)
        for value in outputs:
            if self.differentiable and not self._usable(value, float_inputs):
                continue
            self._pool.append(value)

    def _usable(self, value: Value, float_inputs: bool) -> bool:
        """Of what depends on floats, only finite f64 floats are read again: an index of a maximum jumps."""
        if not value.type.differentiable:
            return not float_inputs
        return bool(np.isfinite(self._arrays[value.name]).all())

    def recent(self) -> tuple[Value, str] | None:
        """One of the latest values, and the op that made it (``""`` for an input); None if there is none."""
        if not self._pool:
            return None
        count = min(_RECENT, len(self._pool))
        value = self._pool[
            -1 - min(self.choices.below(count), self.choices.below(count))
        ]  # the last ones the likeliest
        return value, self._makers.get(value.name, "")

    def finish(self) -> None:
        """Choose outputs: the latest value (if need be, the latest active one) and some others."""
        pool = self._pool[::-1]
        eligible = [value for value in pool if value.name in self._active] if self.differentiable else pool
        if not eligible:
            eligible = [self._fresh(Arg(TensorType("f64", (2,))), smooth=True)]
        read = {value.name for node in self.b.nodes for value in node.inputs}
        unread = [value for value in pool if value.name not in read]
        others = unread + pool or eligible
        more = self.choices.below(_MAX_OUTPUTS)
        chosen = [eligible[0], *(pick(self.choices, others) for _ in range(more))]
        for index, value in enumerate(chosen):
            self.b.output(value, "output", str(index))
        for port, kind, target in self._ports:
            news = [value for value in pool if value.type == port.type and value is not port]
            if kind == "buffer" and news:
                self.b.output(news[0], "buffer", target)

    # --- nodes ----------------------------------------------------------------------------------------

    def _emit_many(self, op: str, *inputs: Value, **attrs: Attr) -> tuple[Value, ...]:
        outputs = self.b.emit_many(op, *inputs, **attrs)
        arrays = evaluate_node(self.b.nodes[-1], [self._arrays[value.name] for value in inputs])
        fixed = all(value.name in self._fixed for value in inputs)
        for value, array in zip(outputs, arrays, strict=True):
            self._arrays[value.name] = array
            self._makers[value.name] = op
            if fixed:
                self._fixed.add(value.name)
            if value.type.differentiable and any(source.name in self._active for source in inputs):
                self._active.add(value.name)
        return outputs

    def _emit(self, op: str, *inputs: Value, **attrs: Attr) -> Value:
        (output,) = self._emit_many(op, *inputs, **attrs)
        return output

    def _fresh(self, arg: Arg, smooth: bool) -> Value:
        """A new input of the graph; a buffer if the op has no cotangent for it but it is a float."""
        number = len(self._ports)
        if arg.domain == "key":
            kind = "key"
        elif self.differentiable and arg.type.differentiable:
            kind = pick(self.choices, ("param", "input")) if smooth else "buffer"
        else:
            kind = pick(self.choices, ("input", "param", "buffer", "constant"))
        same_kind = sum(known == kind for _, known, _ in self._ports)
        target = str(same_kind) if kind in ("input", "key") else f"layer{number}.{kind}"
        value = self.b.input(arg.type, kind, target, name=port_name(arg.domain))
        self._ports.append((value, kind, target))
        self._arrays[value.name] = draw_array(arg, np.random.default_rng([0, number]))
        self._domains[value.name] = arg.domain
        if arg.type.differentiable and kind in ("param", "input"):
            self._active.add(value.name)
        self._pool.append(value)
        return value

    # --- arguments ------------------------------------------------------------------------------------

    def _find(self, arg: Arg, smooth: bool, op: str, at: int) -> Value:
        """A value for argument ``at`` of an op: one that is there, made to fit, or a new input."""
        if arg.domain in _FRESH_ONLY or (arg.type.is_integer and arg.domain in _OF_REALS):
            return self._fresh(arg, smooth)
        candidates = [value for value in reversed(self._pool) if self._fits(value, arg, smooth, op)]
        # shrinks to a new input, which needs no adapting; the latest values are the likeliest, for depth
        choice = self.choices.below(2 * _RECENT + 1)
        if choice == 0 or not candidates:
            return self._fresh(arg, smooth)
        if self.likeness is not None and choice > _RECENT:
            weights = {
                value: 1 + self.likeness.weight(self._makers.get(value.name, ""), op, at)
                for value in candidates[: 4 * _RECENT]
                if self._is(value, arg)
            }
            if weights:
                return pick_weighted(self.choices, weights)
        recent = candidates[:_RECENT]
        value = recent[choice % len(recent)] if choice <= 2 * len(recent) else pick(self.choices, candidates)
        return value if self._is(value, arg) else self._adapt(value, arg)

    def _is(self, value: Value, arg: Arg) -> bool:
        """Whether a value needs no adapting."""
        if value.type != arg.type:
            return False
        domain = self._domains.get(value.name)
        return domain == arg.domain if domain or self.likeness is None else self._holds(value, arg.domain)

    def _holds(self, value: Value, domain: str) -> bool:
        """Whether the numbers of a value happen to be of a domain."""
        array = self._arrays[value.name]
        if not array.size or value.type.dtype == "bool":
            return True
        if value.type.is_complex:
            return bool((np.abs(array) <= _LIMIT).all())
        numbers = array.astype(np.float64)
        low, high = float(numbers.min()), float(numbers.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            return False
        if domain.startswith("index:"):
            return value.name in self._fixed and low >= 0 and high < int(domain.removeprefix("index:"))
        if domain == "unit":
            return low >= _APART and high <= 1 - _APART
        if high > _LIMIT or low < -_LIMIT:
            return False
        if domain == "positive":
            return low >= _APART
        if domain == "large":
            return low >= 1 + _APART
        if domain == "nonzero":
            return bool(np.abs(numbers).min() >= _APART)
        if domain == "distinct":
            return bool(np.diff(np.sort(numbers, axis=None)).min(initial=1.0) >= _APART)
        return True

    def _fits(self, value: Value, arg: Arg, smooth: bool, op: str) -> bool:
        """Whether a value can be made to fit an argument of an op."""
        if self._domains.get(value.name) in _FRESH_ONLY:
            return False
        have, want = value.type, arg.type
        if have.is_float and _is_chance(op, self._arrays[value.name].astype(np.float64)):
            return False
        if want.is_complex and not np.isfinite(self._arrays[value.name].astype(np.complex128)).all():
            return (
                False  # C, torch's vectors, its sums (of x and 1 y) and NumPy multiply complex infinities differently
            )
        if have.numel == 0 and want.numel != 0:
            return False
        if have.is_complex and not want.is_complex:
            return False
        if not self.differentiable:
            return True
        if not have.differentiable or not want.differentiable:
            return have.differentiable == want.differentiable  # rounding a float is not smooth; nor does it start one
        return smooth or value.name not in self._active

    def _adapt(self, value: Value, arg: Arg) -> Value:
        if not value.type.differentiable and arg.type.is_float:
            value = self._cast(value, arg.type.dtype)
        value = self._reshape(self._tame(value), arg.type.shape)
        if arg.type.dtype == "bool":
            return self._to_bool(value)
        if arg.type.is_integer:
            return self._to_integer(value, arg)
        if arg.type.is_complex:
            return self._cast(value, arg.type.dtype)
        return self._to_domain(self._cast(value, arg.type.dtype), arg)

    def _cast(self, value: Value, dtype: str) -> Value:
        return value if value.type.dtype == dtype else self._emit("cast", value, dtype=dtype)

    def _tame(self, value: Value) -> Value:
        """Bring what grew to a magnitude of about one; non-finite numbers stay as they are."""
        array = self._arrays[value.name]
        if not value.type.is_float or array.size == 0:
            return value
        largest = float(np.abs(array.astype(np.float64)).max())
        if not math.isfinite(largest) or largest <= _LIMIT:
            return value
        return self._emit("mul_scalar", value, value=2.0 ** -math.ceil(math.log2(largest)))

    def _to_bool(self, value: Value) -> Value:
        if value.type.dtype == "bool":
            return value
        zero = 0.0 if value.type.differentiable else 0
        return self._emit("ne_scalar" if value.type.is_complex else "gt_scalar", value, value=zero)

    def _to_integer(self, value: Value, arg: Arg) -> Value:
        """The remainder by the domain's size; floats and bools become integers first."""
        size = int(arg.domain.removeprefix("index:")) if arg.domain.startswith("index:") else 9
        if value.type.is_float:  # non-finite numbers have no integer that all platforms agree on
            finite = self._emit("lt_scalar", self._emit("abs", value), value=100.0)
            value = self._emit("where_scalar", finite, value, value=0.0)
        value = self._cast(value, "i64") if value.type.dtype != arg.type.dtype else value
        value = self._emit("remainder_scalar", value, value=size)
        if arg.domain in ("small", "real") and arg.type.dtype != "u8":
            value = self._emit("add_scalar", value, value=-4)
        return self._cast(value, arg.type.dtype)

    def _to_domain(self, value: Value, arg: Arg) -> Value:
        if arg.domain == "distinct":
            ranks = self._fresh(arg, smooth=True)
            nudge = self._emit("mul_scalar", self._emit("tanh", value), value=0.25 * distinct_gap(arg.type.numel))
            return self._emit("add", ranks, nudge)
        if arg.domain in ("positive", "nonzero", "unit", "large"):
            scale, shift = {"unit": (0.9, 0.05), "large": (2.8, 1.2)}.get(arg.domain, (1.8, 0.2))
            value = self._emit("mul_scalar", self._emit("sigmoid", value), value=scale)
            return self._emit("add_scalar", value, value=shift)
        return value

    def _reshape(self, value: Value, shape: tuple[int, ...]) -> Value:
        """Another shape: by reshape or broadcast where possible, else repeating and cutting the elements."""
        want = math.prod(shape)
        have = value.type.shape
        if have == shape:
            return value
        if value.type.numel == want:
            return self._emit("reshape", value, shape=shape)
        if len(have) <= len(shape) and all(a in (1, b) for a, b in zip(have[::-1], shape[::-1], strict=False)):
            return self._emit("broadcast", value, shape=shape)
        flat = self._emit("reshape", value, shape=(value.type.numel,)) if value.type.rank != 1 else value
        copies = math.ceil(want / flat.type.numel) if want else 1
        if 1 < copies <= _MAX_CONCAT:
            flat = self._emit("concat", *[flat] * copies, dim=0)
        elif copies > 1:
            rows = self._emit("broadcast", flat, shape=(copies, flat.type.numel))
            flat = self._emit("reshape", rows, shape=(copies * flat.type.numel,))
        if flat.type.numel > want:
            flat = self._emit("slice", flat, dim=0, start=0, end=want, step=1)
        return flat if flat.type.shape == shape else self._emit("reshape", flat, shape=shape)


def _is_chance(op: str, numbers: np.ndarray) -> bool:
    """Whether torch has no one answer for what the op makes of these numbers."""
    return bool((op in _NO_NAN and np.isnan(numbers).any()) or (op in _NO_INFINITY and np.isinf(numbers).any()))
