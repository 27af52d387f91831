"""Connectionist temporal classification (Graves et al., 2006): minus the log probability of all alignments.

    l = blank, y_1, blank, y_2, ..., blank                                        extended labels, 2 S + 1
    alpha_t(s) = logsumexp(alpha_{t-1}(s), alpha_{t-1}(s-1)[, alpha_{t-1}(s-2)]) + log_probs_t(l_s)
    loss = -logsumexp(alpha_T(2 S), alpha_T(2 S - 1))

where the step from s-2 skips a blank between two labels that differ. As in torch, the gradient is that of scores
before a log_softmax that gave the log probabilities, ``exp(log_probs) - posterior``: what follows is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attrs, Dense
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import add, broadcast, cast, full, mul, neg, reshape, sub, sum_dims
from daggc.ops.concat import concat
from daggc.ops.iota import iota
from daggc.ops.loss import MEAN, NONE, reduce_loss
from daggc.ops.opdef import (
    BY_DECOMPOSITION,
    Arg,
    Axes,
    Cost,
    OpDef,
    Sample,
    node_bytes,
    register,
    require,
    t,
    whole,
)
from daggc.ops.shape import Cotangents, unsqueeze
from daggc.ops.slicing import pad_dim, slice_dim, split

_NEVER = -1e30  # the log of no probability at all; finite, so that derivatives are
_IMPOSSIBLE = 1e29  # losses above are of targets that no alignment gives


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    log_probs, targets, *lengths = inputs
    require(log_probs.dtype in ("f32", "f64"), f"log probabilities in f32 or f64 are required, got {log_probs}")
    require(log_probs.rank == 3, f"log probabilities [T, N, C] are required, got {log_probs}")
    steps, batch, classes = log_probs.shape
    require(steps > 0 and batch > 0, f"at least one step and one sample are required, got {log_probs}")
    fits = targets.dtype == "i64" and targets.rank == 2 and targets.shape[0] == batch and targets.shape[1] > 0
    require(fits, f"targets i64[{batch}, S] are required, got {targets}")
    wanted = TensorType("i64", (batch,))
    require(lengths == [wanted, wanted], f"two {wanted} of lengths are required, got {', '.join(map(str, lengths))}")
    require(0 <= attrs["blank"] < classes, f"blank is one of {classes} classes, got {attrs['blank']}")
    require(type(attrs["zero_infinity"]) is bool, "zero_infinity is a bool")
    return (TensorType(log_probs.dtype, (batch,)),)


def _infer_backward(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    ct, *operands = inputs
    require((ct,) == _infer(operands, attrs), f"a cotangent for each loss is required, got {ct}")
    return (operands[0],)


# --- in simple ops ------------------------------------------------------------------------------------


class _Lattice:
    """What both directions read: labels, emissions and allowed moves of each target, [N, L] each."""

    def __init__(self, b: Builder, log_probs: Value, targets: Value, target_lengths: Value, blank: int) -> None:
        self.b = b
        self.steps, self.batch, self.classes = log_probs.type.shape
        size, self.dtype = targets.type.shape[1], log_probs.type.dtype
        self.shape = (self.batch, 2 * size + 1)
        blanks = full(b, blank, targets.type.shape, "i64")
        kept = b.emit("lt", self.columns(iota(b, size), size), self.rows(target_lengths, size))
        labels = b.emit("where", kept, targets, blanks)
        pairs = concat(b, [unsqueeze(b, x, 2) for x in (blanks, labels)], 2)
        pairs = reshape(b, pairs, (self.batch, 2 * size))
        self.labels = concat(b, [pairs, full(b, blank, (self.batch, 1), "i64")], 1)
        before = pad_dim(b, slice_dim(b, self.labels, 1, 0, self.shape[1] - 2), 1, 2, 0, value=blank)
        self.skips = b.emit("ne", self.labels, before)
        cube = (self.steps, *self.shape)
        self.index = broadcast(b, unsqueeze(b, self.labels, 0), cube)
        emitted = b.emit("gather", log_probs, self.index, dim=2)
        self.emissions = [reshape(b, part, self.shape) for part in split(b, emitted, (1,) * self.steps, 0)]
        place = self.columns(iota(b, self.shape[1]), self.shape[1])
        last = self.rows(b.emit("mul_scalar", target_lengths, value=2), self.shape[1])
        at_end, one_before = b.emit("eq", place, last), b.emit("eq_scalar", sub(b, last, place), value=1)
        self.ends = b.emit("logical_or", at_end, one_before)
        self.starts = b.emit("le_scalar", place, value=1)
        zeros = full(b, 0.0, self.shape, self.dtype)
        self.nothing = self.only(b.emit("eq_scalar", place, value=0), zeros)  # alpha before the first step

    def rows(self, x: Value, size: int) -> Value:
        """A number of each target along its row."""
        return broadcast(self.b, unsqueeze(self.b, x, 1), (self.batch, size))

    def columns(self, x: Value, size: int) -> Value:
        return broadcast(self.b, unsqueeze(self.b, x, 0), (self.batch, size))

    def only(self, mask: Value, x: Value) -> Value:
        return self.b.emit("where_scalar", mask, x, value=_NEVER)

    def later(self, x: Value, by: int) -> Value:
        """x moved to later places."""
        size = self.shape[1]
        return pad_dim(self.b, slice_dim(self.b, x, 1, 0, size - by), 1, by, 0, value=_NEVER)

    def earlier(self, x: Value, by: int) -> Value:
        return pad_dim(self.b, slice_dim(self.b, x, 1, by, self.shape[1]), 1, 0, by, value=0.0)

    def moves(self, alpha: Value) -> tuple[list[Value], Value]:
        """The ways into each place, and the log of their sum."""
        b = self.b
        ways = [alpha, self.later(alpha, 1), self.only(self.skips, self.later(alpha, 2))]
        top = b.emit("stop_gradient", b.emit("maximum", b.emit("maximum", ways[0], ways[1]), ways[2]))
        terms = [b.emit("exp", sub(b, way, top)) for way in ways]
        return ways, add(b, b.emit("log", add(b, add(b, terms[0], terms[1]), terms[2])), top)

    def total(self, alpha: Value) -> Value:
        """The log probability of each target [N]."""
        b = self.b
        ends = self.only(self.ends, alpha)
        top = b.emit("stop_gradient", b.emit("amax", ends, dims=(1,), keepdim=True))
        terms = b.emit("exp", sub(b, ends, broadcast(b, top, self.shape)))
        return add(b, b.emit("log", sum_dims(b, terms, (1,))), reshape(b, top, (self.batch,)))


def _forward(b: Builder, lattice: _Lattice, running: Sequence[Value]) -> list[Value]:
    """alpha after each step; it stays as it is after the end of the input."""
    first = lattice.only(lattice.starts, lattice.emissions[0])
    alphas = [b.emit("where", running[0], first, lattice.nothing)]
    for emission, runs in zip(lattice.emissions[1:], running[1:], strict=True):
        new = add(b, lattice.moves(alphas[-1])[1], emission)
        alphas.append(b.emit("where", runs, new, alphas[-1]))
    return alphas


def _running(b: Builder, lattice: _Lattice, input_lengths: Value) -> list[Value]:
    """Whether the input goes on at each step, [N, L] each."""
    size = lattice.shape[1]
    return [lattice.rows(b.emit("gt_scalar", input_lengths, value=step), size) for step in range(lattice.steps)]


def _decompose(
    b: Builder, node: Node, log_probs: Value, targets: Value, input_lengths: Value, target_lengths: Value
) -> tuple[Value, ...]:
    lattice = _Lattice(b, log_probs, targets, target_lengths, node.attrs["blank"])
    alphas = _forward(b, lattice, _running(b, lattice, input_lengths))
    loss = neg(b, lattice.total(alphas[-1]))
    possible = b.emit("logical_not", b.emit("ge_scalar", loss, value=_IMPOSSIBLE))  # or nan
    return (b.emit("where_scalar", possible, loss, value=math.inf),)


def _decompose_backward(
    b: Builder, node: Node, ct: Value, log_probs: Value, targets: Value, input_lengths: Value, target_lengths: Value
) -> tuple[Value, ...]:
    """Backwards through the recursion: the share of the alignments that pass each place."""
    lattice = _Lattice(b, log_probs, targets, target_lengths, node.attrs["blank"])
    running = _running(b, lattice, input_lengths)
    alphas = _forward(b, lattice, running)
    total = lattice.total(alphas[-1])
    ends = lattice.only(lattice.ends, alphas[-1])
    share = b.emit("exp", sub(b, ends, lattice.rows(total, lattice.shape[1])))
    shares: list[Value] = []
    for step in range(lattice.steps - 1, 0, -1):
        shares.append(b.emit("where_scalar", running[step], share, value=0.0))
        ways, log_sum = lattice.moves(alphas[step - 1])
        parts = [mul(b, shares[-1], b.emit("exp", sub(b, way, log_sum))) for way in ways]
        moved = add(b, parts[0], add(b, lattice.earlier(parts[1], 1), lattice.earlier(parts[2], 2)))
        share = b.emit("where", running[step], moved, share)
    shares.append(b.emit("where_scalar", running[0], share, value=0.0))
    stacked = concat(b, [unsqueeze(b, x, 0) for x in reversed(shares)], 0)
    posterior = b.emit("scatter_add", full(b, 0.0, log_probs.type.shape, lattice.dtype), lattice.index, stacked, dim=2)
    runs = concat(b, [unsqueeze(b, slice_dim(b, x, 1, 0, 1), 0) for x in running], 0)
    prior = b.emit("where_scalar", broadcast(b, runs, log_probs.type.shape), b.emit("exp", log_probs), value=0.0)
    cube = (1, lattice.batch, 1)
    possible = b.emit("logical_not", b.emit("le_scalar", total, value=-_IMPOSSIBLE))  # or nan
    possible = broadcast(b, reshape(b, possible, cube), runs.type.shape)
    gradient = mul(b, sub(b, prior, posterior), broadcast(b, reshape(b, ct, cube), log_probs.type.shape))
    some = b.emit("ne_scalar", log_probs, value=-math.inf)  # torch divides by the probability
    gradient = b.emit("where_scalar", some, gradient, value=math.nan)
    hole = 0.0 if node.attrs["zero_infinity"] else math.nan  # what is impossible has no slope: nan, as in torch
    gradient = b.emit("where_scalar", broadcast(b, possible, log_probs.type.shape), gradient, value=hole)
    runs = broadcast(b, runs, log_probs.type.shape)  # after the end of the input all is zero, whatever the cotangent
    return (b.emit("where_scalar", runs, gradient, value=0.0),)


# --- the ops ------------------------------------------------------------------------------------------


def _vjp(b: Builder, node: Node, cts: Cotangents) -> Cotangents:
    assert cts[0] is not None
    return b.emit("ctc_loss_backward", cts[0], *node.inputs, **node.attrs), None, None, None


def _cost(node: Node) -> Cost:
    log_probs, targets = (value.type for value in node.inputs[len(node.inputs) - 4 :][:2])
    places = log_probs.shape[0] * targets.shape[0] * (2 * targets.shape[1] + 1)
    return Cost(20.0 * places, node_bytes(node), "reduction")


def _axes(node: Node) -> Axes:
    """Sequences are independent."""
    return Axes(((None, "n", None), ("n", None), ("n",), ("n",)), (("n",),))


def _lower(node: Node, args: Sequence[str]) -> str:
    return f"kernels.{node.op}({', '.join(args)}, {node.attrs['blank']}, {node.attrs['zero_infinity']})"


# --- importer -----------------------------------------------------------------------------------------


def _lengths(b: Builder, lengths: Value | Sequence[int]) -> Value:
    if isinstance(lengths, Value):
        return cast(b, reshape(b, lengths, (lengths.type.numel,)), "i64")
    return b.emit("constant", value=Dense.of(np.array(lengths, np.int64)))


def _padded(b: Builder, targets: Value, target_lengths: Value) -> Value:
    """Targets one after the other [sum of lengths] -> [N, S], each at the start of a row."""
    (size,), (batch,) = targets.type.shape, target_lengths.type.shape
    if size == 0:
        return full(b, 0, (batch, 1), "i64")
    starts = sub(b, b.emit("cumsum", target_lengths, dim=0), target_lengths)
    shape = (batch, size)
    places = add(b, broadcast(b, unsqueeze(b, starts, 1), shape), broadcast(b, iota(b, size), shape))
    places = b.emit("minimum", places, full(b, size - 1, shape, "i64"))
    return reshape(b, b.emit("gather", targets, reshape(b, places, (batch * size,)), dim=0), shape)


def _import(
    b: Builder,
    log_probs: Value,
    targets: Value,
    input_lengths: Value | Sequence[int],
    target_lengths: Value | Sequence[int],
    blank: int = 0,
    reduction: int = MEAN,
    zero_infinity: bool = False,
) -> Value:
    """``ctc_loss`` of [T, N, C] or [T, C] and targets [N, S], or one after the other."""
    single = log_probs.type.rank == 2
    if single:
        log_probs = unsqueeze(b, log_probs, 1)
    targets = cast(b, targets, "i64")
    input_lengths, target_lengths = _lengths(b, input_lengths), _lengths(b, target_lengths)
    if targets.type.rank == 1:
        targets = _padded(b, targets, target_lengths)
    if targets.type.rank != 2:
        raise TypeRuleError(f"targets of one or two axes are required, got {targets.type}")
    if targets.type.shape[1] == 0:
        targets = full(b, 0, (targets.type.shape[0], 1), "i64")
    attrs = {"blank": blank, "zero_infinity": zero_infinity}
    losses = b.emit("ctc_loss", log_probs, targets, input_lengths, target_lengths, **attrs)
    if zero_infinity:
        infinite = b.emit("eq_scalar", losses, value=math.inf)
        losses = b.emit("where_scalar", b.emit("logical_not", infinite), losses, value=0.0)
    if reduction == MEAN:
        sizes = b.emit("maximum_scalar", target_lengths, value=1)
        losses = b.emit("div", losses, cast(b, sizes, losses.type.dtype))
    losses = reduce_loss(b, losses, reduction)
    return reshape(b, losses, ()) if single and reduction == NONE else losses


def _samples(backward: bool) -> tuple[Sample, ...]:
    cases = (((4, 2, 3), 2, 2, False), ((5, 2, 4), 2, 3, True))
    samples = []
    for (steps, batch, classes), size, blank, zero in cases:
        args = [
            Arg(t(steps, batch, classes)),
            Arg(t(batch, size, dtype="i64"), f"index:{classes - 1}"),
            Arg(t(batch, dtype="i64"), f"index:{steps + 1}"),
            Arg(t(batch, dtype="i64"), f"index:{size + 1}"),
        ]
        args = [Arg(t(batch)), *args] if backward else args
        samples.append(Sample(tuple(args), {"blank": blank, "zero_infinity": zero}))
    return tuple(samples)


register(
    OpDef(
        name="ctc_loss",
        infer=_infer,
        evaluate=BY_DECOMPOSITION,
        vjp=_vjp,
        cost=_cost,
        axes=_axes,
        lower=_lower,
        aten={"ctc_loss.IntList": _import, "ctc_loss.Tensor": _import},
        samples=_samples(backward=False),
        decompose=_decompose,
    )
)
register(
    OpDef(
        name="ctc_loss_backward",
        infer=_infer_backward,
        evaluate=BY_DECOMPOSITION,
        vjp=BY_DECOMPOSITION,
        cost=_cost,
        axes=whole,
        lower=_lower,
        aten={},
        samples=_samples(backward=True),
        decompose=_decompose_backward,
    )
)
