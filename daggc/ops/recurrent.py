"""Recurrent nets: ``recurrent_layer`` is one layer in one direction (lstm, gru, tanh or relu), all its steps.

Several layers, both directions and dropout between layers are composed by the importers; single cells are simple
ops. The backward computes the forward anew, as one fused layer: nothing but the inputs is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import full, permute
from daggc.ops.concat import concat
from daggc.ops.opdef import (
    BY_DECOMPOSITION,
    Axes,
    Cost,
    Importer,
    OpDef,
    Sample,
    node_bytes,
    register,
    require,
    sample,
    whole,
)
from daggc.ops.random import dropout as drop
from daggc.ops.recurrent_steps import GATES, Weights, linear, stack, step, unroll, unroll_backward
from daggc.ops.slicing import select

# --- type rules ---------------------------------------------------------------------------------------


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    """Inputs are x [T, N, I], h [N, P][, c [N, H]], w_ih, w_hh[, b_ih, b_hh][, w_hr]."""
    cell, lstm = attrs["cell"], attrs["cell"] == "lstm"
    require(cell in GATES, f"cell is one of {', '.join(GATES)}, got {cell!r}")
    flags = (attrs["bias"], attrs["projected"], attrs["reverse"])
    require(all(type(flag) is bool for flag in flags), "bias, projected and reverse are bools")
    require(lstm or not attrs["projected"], "only an lstm has projections")
    x, h = inputs[:2]
    require(x.is_float and len({value.dtype for value in inputs}) == 1, "inputs of one float dtype are required")
    require(x.rank == 3 and x.shape[0] > 0, f"a sequence [T, N, I] of at least one step is required, got {x}")
    require(h.rank == 2 and h.shape[0] == x.shape[1], f"a state [N, P] for each sequence is required, got {h}")
    size = inputs[2].shape[1] if lstm else h.shape[1]
    gates, (batch, out) = GATES[cell] * size, h.shape
    require(size > 0 < out, f"states of at least one number are required, got {h}")  # oneDNN divides by their size
    fits = out < size if attrs["projected"] else out == size
    require(fits, f"states of one size, or projected to a smaller one, are required, got {out} and {size}")
    require(not attrs["projected"] or out < size, f"a projection to fewer numbers than {size} is required, got {out}")
    shapes = [(batch, size)] if lstm else []
    shapes += [(gates, x.shape[2]), (gates, out)]
    shapes += [(gates,), (gates,)] if attrs["bias"] else []
    shapes += [(out, size)] if attrs["projected"] else []
    got = [value.shape for value in inputs[2:]]
    require(got == shapes, f"for {x} and {h} the other inputs have shapes {shapes}, got {got}")
    y = x.with_(shape=(*x.shape[:2], out))
    return (y, inputs[2]) if lstm else (y,)


def _infer_backward(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    count = 2 if attrs["cell"] == "lstm" else 1
    cts, operands = tuple(inputs[:count]), tuple(inputs[count:])
    wanted = _infer(operands, attrs)
    require(cts == wanted, f"cotangents of the outputs, {', '.join(map(str, wanted))}, are required")
    return operands


# --- meaning and derivatives --------------------------------------------------------------------------


def _parts(attrs: Attrs, inputs: Sequence[Value]) -> tuple[Value, Value, Value | None, Weights]:
    """(x, h, c or None, weights)."""
    x, h, *rest = inputs
    c = rest.pop(0) if attrs["cell"] == "lstm" else None
    return x, h, c, Weights.of(rest, attrs["bias"], attrs["projected"])


def _decompose(b: Builder, node: Node, *inputs: Value) -> tuple[Value, ...]:
    attrs = node.attrs
    steps = unroll(b, attrs["cell"], *_parts(attrs, inputs), attrs["reverse"])
    y = stack(b, steps.ys, attrs["reverse"])
    return (y,) if steps.c is None else (y, steps.c)


def _decompose_backward(b: Builder, node: Node, *inputs: Value) -> tuple[Value, ...]:
    attrs = node.attrs
    ct_y, *rest = inputs
    ct_c = rest.pop(0) if attrs["cell"] == "lstm" else None
    return tuple(unroll_backward(b, attrs["cell"], ct_y, ct_c, *_parts(attrs, rest), attrs["reverse"]))


def _vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    filled = [
        full(b, 0.0, value.type.shape, value.type.dtype) if ct is None else ct
        for ct, value in zip(cts, node.outputs, strict=True)
    ]
    return b.emit_many("recurrent_layer_backward", *filled, *node.inputs, **node.attrs)


def _axes(node: Node) -> Axes:
    """Sequences are independent."""
    states = 2 if node.attrs["cell"] == "lstm" else 1
    weights = tuple((None,) * value.type.rank for value in node.inputs[1 + states :])
    outputs = ((None, "n", None), ("n", None))[: len(node.outputs)]
    return Axes(((None, "n", None), *(("n", None),) * states, *weights), outputs)


def _cost(products: int, first: int) -> Callable[[Node], Cost]:
    """``products`` times the FLOPs of the forward, whose x is input ``first`` (and one more for an lstm).

    What its kernels allocate was measured: the backward keeps each gate of each step, and what is made of it.
    """

    def cost(node: Node) -> Cost:
        lstm = node.attrs["cell"] == "lstm"
        x, h = (node.inputs[first + (first > 0 and lstm) + place].type for place in (0, 1))
        weights = sum(value.type.numel for value in node.inputs if value.type.rank == 2)
        gates = GATES[str(node.attrs["cell"])]
        results = float(x.shape[0] * h.nbytes)
        own = sum(value.type.nbytes for value in node.inputs[first:] if value.type.rank == 2)
        workspace = 3 * (gates + 1) * results + 2 * own if first else (1 if lstm else gates + 1) * results + own
        return Cost(
            2.0 * products * x.shape[0] * x.shape[1] * weights,
            node_bytes(node),
            "gemm",
            workspace,
            str(node.attrs["cell"]),
        )

    return cost


def _lower(node: Node, args: Sequence[str]) -> str:
    attrs = node.attrs
    names = ", ".join(f"{name}={attrs[name]!r}" for name in ("cell", "bias", "projected", "reverse"))
    return f"kernels.{node.op}(({', '.join(args)},), {names})"


# --- importers ----------------------------------------------------------------------------------------


def _import_layers(cell: str) -> Importer:
    """``aten.lstm.input`` and its like: layers on layers, directions side by side."""

    def importer(
        b: Builder,
        x: Value,
        states: Value | Sequence[Value],
        weights: Sequence[Value],
        bias: bool,
        layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Value, ...]:
        given = [states] if isinstance(states, Value) else list(states)
        directions = 2 if bidirectional else 1
        each, rest = divmod(len(weights), layers * directions)
        projected = each - (4 if bias else 2) == 1
        if rest or each != (4 if bias else 2) + projected:
            raise TypeRuleError(f"{len(weights)} weights do not fit {layers} layers in {directions} directions")
        x = permute(b, x, (1, 0, 2)) if batch_first else x
        last: list[tuple[Value, ...]] = []
        for layer in range(layers):
            ys: list[Value] = []
            for reverse in (False, True)[:directions]:
                place = len(last)
                operands = [select(b, state, 0, place) for state in given]
                operands += weights[place * each : (place + 1) * each]
                attrs = {"cell": cell, "bias": bias, "projected": projected, "reverse": reverse}
                y, *c = b.emit_many("recurrent_layer", x, *operands, **attrs)
                ys.append(y)
                last.append((select(b, y, 0, 0 if reverse else -1), *c))
            x = concat(b, ys, 2)
            if dropout and train and layer < layers - 1:
                x = drop(b, x, dropout)[0]
        x = permute(b, x, (1, 0, 2)) if batch_first else x
        return (x, *(stack(b, state) for state in zip(*last, strict=True)))

    return importer


def _import_cell(cell: str) -> Importer:
    """``aten.lstm_cell`` and its like: one step of [N, I]."""

    def importer(
        b: Builder,
        x: Value,
        state: Value | Sequence[Value],
        w_ih: Value,
        w_hh: Value,
        b_ih: Value | None = None,
        b_hh: Value | None = None,
    ) -> Value | tuple[Value, ...]:
        h, c = (state, None) if isinstance(state, Value) else state
        new, made = step(b, cell, linear(b, x, w_ih, b_ih), h, c, Weights(w_ih, w_hh, b_ih, b_hh))
        return new if made.new_c is None else (new, made.new_c)

    return importer


# --- the ops ------------------------------------------------------------------------------------------


def _sample(cell: str, bias: bool, reverse: bool, projected: bool, backward: bool) -> Sample:
    """Two steps of two sequences of 2 numbers; 3 units, projected to 2."""
    gates, out = 3 * GATES[cell], 2 if projected else 3
    shapes: list[tuple[int, ...]] = [(2, 2, 2), (2, out), *([(2, 3)] if cell == "lstm" else [])]
    shapes += [(gates, 2), (gates, out), *([(gates,), (gates,)] if bias else []), *([(out, 3)] if projected else [])]
    if backward:
        shapes = [(2, 2, out), *([(2, 3)] if cell == "lstm" else []), *shapes]
    return sample(*shapes, cell=cell, bias=bias, reverse=reverse, projected=projected)


_CASES = (("lstm", True, False, False), ("lstm", False, True, True), ("gru", True, True, False))
_CASES += (("gru", False, False, False), ("tanh", True, False, False), ("relu", True, True, False))

register(
    OpDef(
        name="recurrent_layer",
        infer=_infer,
        evaluate=BY_DECOMPOSITION,
        vjp=_vjp,
        cost=_cost(1, 0),
        axes=_axes,
        lower=_lower,
        aten={
            **{f"{name}.input": _import_layers(name) for name in ("lstm", "gru")},
            **{f"rnn_{name}.input": _import_layers(name) for name in ("tanh", "relu")},
            **{f"{name}_cell.default": _import_cell(name) for name in ("lstm", "gru")},
            **{f"rnn_{name}_cell.default": _import_cell(name) for name in ("tanh", "relu")},
        },
        samples=tuple(_sample(*case, backward=False) for case in _CASES),
        decompose=_decompose,
    )
)
register(
    OpDef(
        name="recurrent_layer_backward",
        infer=_infer_backward,
        evaluate=BY_DECOMPOSITION,
        vjp=BY_DECOMPOSITION,
        cost=_cost(3, 1),
        axes=whole,
        lower=_lower,
        aten={},
        samples=tuple(_sample(*case, backward=True) for case in _CASES),
        decompose=_decompose_backward,
    )
)
