"""Recurrent cells in simple ops: one step forward, one step backward, and whole layers unrolled.

With ``a = W_ih x + b_ih`` and ``u = W_hh h + b_hh``, as ``torch.nn`` has them:

    tanh, relu   h' = f(a + u)
    lstm         i, f, o = sigmoid, g = tanh of (a + u);  c' = f c + i g;  h' = o tanh c'  (or W_hr times that)
    gru          r, z = sigmoid(a + u);  n = tanh(a_n + r u_n);  h' = (h - n) z + n
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ops.build import add, full, mul, reshape, sub, sum_dims, transpose
from daggc.ops.concat import concat
from daggc.ops.linalg import matmul
from daggc.ops.shape import unsqueeze
from daggc.ops.slicing import split

GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}


@dataclass(frozen=True)
class Weights:
    """The weights of one layer in one direction."""

    w_ih: Value
    w_hh: Value
    b_ih: Value | None = None
    b_hh: Value | None = None
    w_hr: Value | None = None

    @staticmethod
    def of(values: Sequence[Value], bias: bool, projected: bool) -> Weights:
        """From torch's order: w_ih, w_hh[, b_ih, b_hh][, w_hr]."""
        biases = (values[2], values[3]) if bias else (None, None)
        return Weights(values[0], values[1], *biases, values[-1] if projected else None)


@dataclass
class Step:
    """What a step's backward reads: the state before, gate values, and for an lstm the state after."""

    h: Value
    c: Value | None = None
    gates: tuple[Value, ...] = ()
    new_c: Value | None = None
    tanh_c: Value | None = None
    unprojected: Value | None = None
    h_gate: Value | None = None  # of a gru: the part of the candidate that the reset gate multiplies


@dataclass
class Unrolled:
    """A layer step by step; ``ys`` and ``steps`` in the order in which they are computed."""

    ys: list[Value] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    c: Value | None = None


def _one_minus(b: Builder, x: Value) -> Value:
    return b.emit("add_scalar", b.emit("neg", x), value=1.0)


def linear(b: Builder, x: Value, weight: Value, bias: Value | None = None) -> Value:
    return b.emit("linear", x, weight, *([] if bias is None else [bias]))


def step(b: Builder, cell: str, a: Value, h: Value, c: Value | None, weights: Weights) -> tuple[Value, Step]:
    """One step, from the input's share ``a`` of the gates [N, G H]. Returns the new h and what backward reads."""
    u = linear(b, h, weights.w_hh, weights.b_hh)
    size = a.type.shape[1] // GATES[cell]
    if cell in ("tanh", "relu"):
        new = b.emit(cell, add(b, a, u))
        return new, Step(h, gates=(new,))
    if cell == "gru":
        (a_r, a_z, a_n), (u_r, u_z, u_n) = split(b, a, (size,) * 3, 1), split(b, u, (size,) * 3, 1)
        r, z = b.emit("sigmoid", add(b, a_r, u_r)), b.emit("sigmoid", add(b, a_z, u_z))
        n = b.emit("tanh", add(b, a_n, mul(b, r, u_n)))
        return add(b, mul(b, sub(b, h, n), z), n), Step(h, gates=(r, z, n), h_gate=u_n)
    assert c is not None
    parts = split(b, add(b, a, u), (size,) * 4, 1)
    i, f, g, o = (b.emit("tanh" if index == 2 else "sigmoid", part) for index, part in enumerate(parts))
    new_c = add(b, mul(b, f, c), mul(b, i, g))
    tanh_c = b.emit("tanh", new_c)
    new = unprojected = mul(b, o, tanh_c)
    if weights.w_hr is not None:
        new = linear(b, unprojected, weights.w_hr)
    return new, Step(h, c, (i, f, g, o), new_c, tanh_c, unprojected)


def unroll(
    b: Builder, cell: str, x: Value, h: Value, c: Value | None, weights: Weights, reverse: bool = False
) -> Unrolled:
    """All steps of x [T, N, I]."""
    steps, batch, _ = x.type.shape
    a = linear(b, x, weights.w_ih, weights.b_ih)
    shares = [reshape(b, part, (batch, a.type.shape[2])) for part in split(b, a, (1,) * steps, 0)]
    result = Unrolled()
    for share in reversed(shares) if reverse else shares:
        h, made = step(b, cell, share, h, c, weights)
        c = made.new_c
        result.ys.append(h)
        result.steps.append(made)
    result.c = c
    return result


def stack(b: Builder, steps: Sequence[Value], reverse: bool = False) -> Value:
    """Values of steps in the order of computation -> [T, ...] in the order of time."""
    return concat(b, [unsqueeze(b, value, 0) for value in (reversed(steps) if reverse else steps)], 0)


@dataclass(frozen=True)
class StepCotangents:
    """Cotangents of a step: of the gates' two shares, of the states before, of what w_hr multiplies."""

    a: Value
    u: Value
    h: Value
    c: Value | None = None
    projected: Value | None = None


def step_backward(b: Builder, cell: str, ct: Value, ct_c: Value | None, made: Step, weights: Weights) -> StepCotangents:
    """From cotangents of the new h (and c) to those of what the step read."""
    if cell in ("tanh", "relu"):
        (y,) = made.gates
        a = _through_tanh(b, ct, y) if cell == "tanh" else _through_relu(b, ct, y)
        return StepCotangents(a, a, matmul(b, a, weights.w_hh))
    if cell == "gru":
        r, z, n = made.gates
        assert made.h_gate is not None
        a_n = _through_tanh(b, mul(b, ct, _one_minus(b, z)), n)
        a_z = _through_sigmoid(b, mul(b, ct, sub(b, made.h, n)), z)
        a_r = _through_sigmoid(b, mul(b, a_n, made.h_gate), r)
        a, u = concat(b, [a_r, a_z, a_n], 1), concat(b, [a_r, a_z, mul(b, a_n, r)], 1)
        return StepCotangents(a, u, add(b, mul(b, ct, z), matmul(b, u, weights.w_hh)))
    i, f, g, o = made.gates
    assert made.c is not None and made.tanh_c is not None and ct_c is not None
    projected = ct if weights.w_hr is not None else None
    if weights.w_hr is not None:
        ct = matmul(b, ct, weights.w_hr)
    ct_c = add(b, ct_c, _through_tanh(b, mul(b, ct, o), made.tanh_c))
    pre = concat(
        b,
        [
            _through_sigmoid(b, mul(b, ct_c, g), i),
            _through_sigmoid(b, mul(b, ct_c, made.c), f),
            _through_tanh(b, mul(b, ct_c, i), g),
            _through_sigmoid(b, mul(b, ct, made.tanh_c), o),
        ],
        1,
    )
    return StepCotangents(pre, pre, matmul(b, pre, weights.w_hh), mul(b, ct_c, f), projected)


def _through_tanh(b: Builder, ct: Value, y: Value) -> Value:
    return mul(b, ct, _one_minus(b, b.emit("square", y)))


def _through_sigmoid(b: Builder, ct: Value, y: Value) -> Value:
    return mul(b, ct, mul(b, y, _one_minus(b, y)))


def _through_relu(b: Builder, ct: Value, y: Value) -> Value:
    return b.emit("where_scalar", b.emit("gt_scalar", y, value=0.0), ct, value=0.0)


def unroll_backward(
    b: Builder,
    cell: str,
    ct_y: Value,
    ct_c: Value | None,
    x: Value,
    h: Value,
    c: Value | None,
    weights: Weights,
    reverse: bool,
) -> list[Value]:
    """Cotangents of x, h[, c], w_ih, w_hh[, b_ih, b_hh][, w_hr]; the forward is computed anew."""
    steps, batch, _ = x.type.shape
    forward = unroll(b, cell, x, h, c, weights, reverse)
    of_time = [reshape(b, part, (batch, part.type.shape[2])) for part in split(b, ct_y, (1,) * steps, 0)]
    of_step = of_time[::-1] if reverse else of_time
    ct_h = full(b, 0.0, h.type.shape, h.type.dtype)
    found: list[StepCotangents] = []
    for made, ct in zip(reversed(forward.steps), reversed(of_step), strict=True):
        found.append(step_backward(b, cell, add(b, ct, ct_h), ct_c, made, weights))
        ct_h, ct_c = found[-1].h, found[-1].c
    found.reverse()
    a, u = (_rows(b, [getattr(f, name) for f in found], reverse) for name in ("a", "u"))
    states = _rows(b, [made.h for made in forward.steps], reverse)
    flat_x = reshape(b, x, (steps * batch, x.type.shape[2]))
    results = [reshape(b, matmul(b, a, weights.w_ih), x.type.shape), ct_h, *([] if ct_c is None else [ct_c])]
    results += [matmul(b, transpose(b, a), flat_x), matmul(b, transpose(b, u), states)]
    if weights.b_ih is not None:
        results += [sum_dims(b, a, (0,)), sum_dims(b, u, (0,))]
    if weights.w_hr is not None:
        outer = _rows(b, [f.projected for f in found if f.projected is not None], reverse)
        inner = _rows(b, [made.unprojected for made in forward.steps if made.unprojected is not None], reverse)
        results.append(matmul(b, transpose(b, outer), inner))
    return results


def _rows(b: Builder, steps: Sequence[Value], reverse: bool) -> Value:
    """[N, F] of each step as one [T N, F]."""
    return concat(b, list(reversed(steps)) if reverse else list(steps), 0)
