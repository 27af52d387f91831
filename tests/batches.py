"""Models as functions of their batch size, and the check that microbatches add up to the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import strategies as st

from daggc.errors import DifferentiationError
from daggc.interp import interpret
from daggc.ir.builder import Builder
from daggc.ir.graph import Graph, Program, Value
from daggc.ir.types import TensorType
from daggc.ir.verifier import verify
from daggc.ops import REGISTRY
from daggc.ops.build import broadcast, cast, full, reshape
from daggc.passes.microbatch import Microbatched, microbatched
from daggc.passes.vjp import vjp

Build = Callable[[int], Graph]
TIME, CHANNELS, CLASSES = 3, 4, 5


def f64(*shape: int) -> TensorType:
    return TensorType("f64", shape)


def i64(*shape: int) -> TensorType:
    return TensorType("i64", shape)


def model(body: Callable[[Builder, int], Value]) -> Build:
    """``body(builder, batch) -> loss`` as a function of the batch size."""

    def build(batch: int) -> Graph:
        b = REGISTRY.builder("forward")
        b.output(body(b, batch), "output", "0")
        return b.build()

    return build


def aten(b: Builder, overload: str, *args: object, **kwargs: object) -> Value:
    result = REGISTRY.importers[overload](b, *args, **kwargs)
    return result[0] if isinstance(result, tuple) else result


def arrays_for(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs by port; integers are class labels, some of them -100."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for port in graph.inputs:
        type_ = port.value.type
        if type_.differentiable:
            arrays[port.ref] = rng.normal(size=type_.shape).astype(type_.numpy_dtype)
        else:
            labels = rng.integers(0, CLASSES, type_.shape)
            arrays[port.ref] = np.where(rng.random(type_.shape) < 0.3, -100, labels).astype(type_.numpy_dtype)
    return arrays


def loss_and_gradients(forward: Graph, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    program = Program({"forward": forward})
    verify(program, REGISTRY)
    try:
        program = vjp(program, [port.ref for port in forward.inputs_of("param")])
    except DifferentiationError:
        return interpret(program, arrays)
    return interpret(program, {**arrays, "cotangent:output:0": np.ones(())})


def analyse(build: Build, batched_inputs: Sequence[str], batch: int, micro: int, force: bool = False) -> Microbatched:
    """The microbatched forward of ``micro`` samples; the second capture is that of the whole batch."""
    return microbatched(build(micro), batched_inputs, "0", build(batch), force)


def assert_adds_up(build: Build, batched_inputs: Sequence[str], batch: int, sizes: Sequence[int]) -> None:
    """Losses and gradients of microbatches of these sizes add up to those of the batch."""
    assert sum(sizes) == batch
    whole = build(batch)
    arrays = arrays_for(whole)
    wanted = loss_and_gradients(whole, arrays)
    parts = []
    start = 0
    for size in sizes:
        own = {
            ref: array[start : start + size] if ref.removeprefix("input:") in batched_inputs else array
            for ref, array in arrays.items()
        }
        own["scalar:fraction"] = np.asarray(size / batch)
        result = analyse(build, batched_inputs, batch, size)
        assert result.exact, str(result)
        parts.append((result, own))
        start += size
    totals: dict[str, np.ndarray] = {}
    for result, own in parts:
        if result.denominators is not None:
            verify(Program({"denominators": result.denominators}), REGISTRY)
            found = interpret(Program({"main": Graph("main", *_fields(result.denominators))}), own)
            for ref, array in found.items():
                key = ref.replace("denominator:", "scalar:total:")
                totals[key] = totals[key] + array if key in totals else array
    got: dict[str, np.ndarray] = {}
    for result, own in parts:
        for ref, array in loss_and_gradients(result.forward, {**own, **totals}).items():
            got[ref] = got[ref] + array if ref in got else array
    for ref, array in wanted.items():
        np.testing.assert_allclose(got[ref], array, rtol=1e-9, atol=1e-11, err_msg=ref)


def _fields(graph: Graph):
    return graph.inputs, graph.nodes, graph.outputs


# --- random models ------------------------------------------------------------------------------------

Step = tuple[int, int, int, int]


@st.composite
def recipes(draw: st.DrawFn) -> list[Step]:
    numbers = st.integers(0, 30)
    return draw(st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=9))


def from_recipe(recipe: Sequence[Step]) -> Build:
    """A model of the recipe's steps; what a step reads is chosen by shapes in terms of the batch size.

    Most steps keep samples apart; some mix them, so that the analysis has something to find.
    """

    def body(b: Builder, batch: int) -> Value:
        grower = _Grower(b, batch)
        for step in recipe:
            grower.step(*step)
        return grower.loss(*recipe[-1])

    return model(body)


Dims = tuple[tuple[int, int], ...]  # (n, k): a size n * batch ** k


class _Grower:
    def __init__(self, b: Builder, batch: int) -> None:
        self.b, self.batch = b, batch
        self.pool: list[tuple[Dims, Value]] = []
        t, c = (TIME, 0), (CHANNELS, 0)
        for index, dims in enumerate((((1, 1), t, c), ((1, 1), c))):
            self.add(dims, b.input(f64(*self.shape(dims)), "input", str(index)))
        self.add(
            (c, c),
            b.input(f64(CHANNELS, CHANNELS), "param", "w", name="w"),
        )
        self.add((c,), b.input(f64(CHANNELS), "param", "v", name="wv"))

    def shape(self, dims: Dims) -> tuple[int, ...]:
        return tuple(n * self.batch**k for n, k in dims)

    def add(self, dims: Dims, value: Value) -> None:
        assert value.type.shape == self.shape(dims), (dims, value)
        self.pool.append((dims, value))

    def pick(self, at: int) -> tuple[Dims, Value]:
        return self.pool[-1 - at % len(self.pool)]

    def step(self, what: int, first: int, second: int, third: int) -> None:
        b, (dims, x) = self.b, self.pick(first)
        rank = len(dims)
        axis = second % rank if rank else 0
        match what % 16:
            case 0:
                self.add(dims, b.emit("sin" if second % 2 else "cos", x))
            case 1:
                same = [value for own, value in self.pool if own == dims]
                self.add(dims, b.emit(("add", "mul")[third % 2], x, same[second % len(same)]))
            case 2 if rank:
                kept = dims[:axis] + dims[axis + 1 :]
                self.add(kept, b.emit(("sum", "mean")[third % 2], x, dims=(axis,), keepdim=False))
            case 3 if rank >= 2:
                order = [axis, *(other for other in range(rank) if other != axis)]
                self.add(tuple(dims[i] for i in order), b.emit("permute", x, dims=tuple(order)))
            case 4 if rank >= 2:
                at = axis % (rank - 1)
                (n, k), (m, j) = dims[at], dims[at + 1]
                merged = (*dims[:at], (n * m, k + j), *dims[at + 2 :])
                self.add(merged, reshape(b, x, self.shape(merged)))
            case 5 if rank and dims[axis][1] == 1 and dims[axis][0] > 1:
                n = dims[axis][0]
                parts = ((1, 1), (n, 0)) if third % 2 else ((n, 0), (1, 1))
                torn = (*dims[:axis], *parts, *dims[axis + 1 :])
                self.add(torn, reshape(b, x, self.shape(torn)))
            case 6 if rank < 4:
                size = ((1, 1), (2, 0))[third % 2]
                wide = (size, *dims)
                self.add(wide, broadcast(b, x, self.shape(wide)))
            case 7 if rank and dims[-1] == (CHANNELS, 0):
                weight = next(v for d, v in self.pool if d == ((CHANNELS, 0),) * 2)
                self.add(dims, b.emit("linear", x, weight))
            case 8 if rank:
                self.add(dims, b.emit("softmax", x, dim=axis))
            case 9 if rank and dims[axis] != (0, 0):
                double = (*dims[:axis], (2 * dims[axis][0], dims[axis][1]), *dims[axis + 1 :])
                self.add(double, b.emit("concat", x, b.emit("exp", b.emit("tanh", x)), dim=axis))
            case 10:
                value = float(self.batch) if second % 2 else 3.0
                self.add(dims, b.emit(("div_scalar", "mul_scalar", "add_scalar")[third % 3], x, value=value))
            case 11 if rank:
                self.add(dims, b.emit("flip", x, dims=(axis,)))
            case 12 if not rank:
                others = [value for own, value in self.pool if own == dims]
                self.add(dims, b.emit(("div", "mul", "add")[third % 3], x, others[second % len(others)]))
            case 13 if rank and self.shape(dims[axis : axis + 1])[0] > 1:
                narrow = (*dims[:axis], (1, 0), *dims[axis + 1 :])
                self.add(narrow, b.emit("slice", x, dim=axis, start=1, end=2, step=1))
            case 14:
                self.add(((1, 1),), full(b, float(1 + second % 3), (self.batch,), "f64"))
            case 15:
                count = cast(b, b.emit("iota", start=0, step=1, size=self.batch, dtype="i64"), "f64")
                self.add(((1, 1),), count)
            case _:
                self.add(dims, b.emit("tanh", x))

    def loss(self, what: int, first: int, second: int, third: int) -> Value:
        losses = []
        for at in (0, second):
            _, x = self.pick(at)
            rank = x.type.rank
            reduced = b_emit(self.b, ("sum", "mean")[third % 2], x) if rank else x
            losses.append(reduced)
        return self.b.emit(("add", "div", "mul")[what % 3], *losses)


def b_emit(b: Builder, op: str, x: Value) -> Value:
    return b.emit(op, x, dims=tuple(range(x.type.rank)), keepdim=False)
