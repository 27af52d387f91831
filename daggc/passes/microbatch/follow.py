"""Following the batch axis through a forward graph, node by node.

The rules for most ops are their ``axes`` (:class:`daggc.ops.opdef.Axes`): a batched value's batch axis has a
label; it passes to the outputs that have the label, provided that every other input with that label is a batched
value cut the same way or does not change along it; a label that no output has is reduced. Sums over samples, and
what linear ops make of them, add up over microbatches; a sum that depends on the data alone (a count of
targets) may also be had from a first look at the whole batch, and then be used in any op.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from daggc.ir.attrs import Attr, format_attr
from daggc.ir.graph import Graph, Node, Value
from daggc.ops import REGISTRY
from daggc.ops.opdef import Axes
from daggc.passes.microbatch.sizes import Sizes, counting_axis
from daggc.passes.microbatch.state import (
    Edit,
    Factor,
    Mixing,
    State,
    batched,
    merged,
    mixed,
    refit,
    uniform_axes,
    whole_axes,
)

_RANDOM = ("bernoulli", "uniform", "normal", "randint", "randperm")
# f(x + y) = f(x) + f(y), of one input
_LINEAR = frozenset(
    ("neg", "stop_gradient", "mul_scalar", "div_scalar", "reshape", "permute", "broadcast", "sum", "mean", "slice",
     "split", "flip", "cast")
)  # fmt: skip
_SHARED_DRAW = "one random draw is shared by all samples of a batch; microbatches would draw anew"


class Follower:
    """Gives each value of a graph its :class:`State` and collects the edits that microbatches need.

    Attributes:
        states: by name of a value.
        edits: in order of nodes.
        forced: why the batch cannot be cut, where ``force`` made the analysis go on regardless.
    """

    def __init__(self, forward: Graph, inputs: dict[str, State], sizes: Sizes, force: bool) -> None:
        self.states = dict(inputs)
        self.edits: list[Edit] = []
        self.forced: list[Mixing] = []
        self._sizes = sizes
        self._force = force
        for index, node in enumerate(forward.nodes):
            states = self._outputs(index, node)
            self.states.update(zip((value.name for value in node.outputs), states, strict=True))

    # --- one node -------------------------------------------------------------------------------------

    def _outputs(self, index: int, node: Node) -> Sequence[State]:
        states = [self.states[value.name] for value in node.inputs]
        problems = [state.mixing for state in states if state.mixing is not None]
        if problems:
            return [mixed(min(problems, key=lambda problem: problem.index))] * len(node.outputs)
        start = len(self.edits)
        results = self._follow(index, node, states)
        results = self._adjust_numbers(index, node, results)
        results = [self._checked(node, value, state) for value, state in zip(node.outputs, results, strict=True)]
        problem = next((state.mixing for state in results if state.mixing is not None), None)
        if problem is None:
            return results
        problem = replace(problem, index=index)
        if not self._force:
            return [mixed(problem)] * len(node.outputs)
        del self.edits[start:]
        self.forced.append(problem)
        return [self._guess(value, node, states) for value in node.outputs]

    def _guess(self, output: Value, node: Node, states: Sequence[State]) -> State:
        """Each microbatch on its own: an output with the input's batch axis is its part, others are averaged."""
        for value, state in zip(node.inputs, states, strict=True):
            factor = state.batch
            if factor is not None and output.type.shape[: factor.axis + 1] == value.type.shape[: factor.axis + 1]:
                return batched(factor, known=False)
        return State("mean")

    def _checked(self, node: Node, value: Value, state: State) -> State:
        """Where two captures show which axes are as long as the batch, they must be those the analysis knows."""
        if value.name not in self._sizes.changing or state.kind in ("invariant", "random", "mixed"):
            return state
        expected = {state.batch.axis} if state.batch is not None else set()
        if self._sizes.changing[value.name] == self._sizes.growing[value.name] == expected:
            return state
        return mixed(Mixing.at(node, "it makes an axis as long as the batch that is not the batch axis"))

    def _adjust_numbers(self, index: int, node: Node, results: Sequence[State]) -> Sequence[State]:
        """Attributes computed from the batch size: divisions by it make means of sums."""
        changed = self._sizes.attrs.get(index)
        if not changed or results[0].kind == "mixed":
            return results
        growth = self._sizes.proportional(changed["value"]) if set(changed) == {"value"} else 0
        growth = -growth if node.op == "div_scalar" else growth
        scalable = node.op in ("mul_scalar", "div_scalar", "full") and node.output.type.is_float
        if not growth or not scalable:
            names = ", ".join(f"{name}={_short(pair[0])}" for name, pair in changed.items())
            return self._mix(node, f"its attributes ({names}) change with the batch size")
        (state,) = results
        if growth == -1 and state.kind == "sum":
            return [replace(state, kind="mean")]
        if growth == 1 and state.kind == "mean":
            return [replace(state, kind="sum")]
        self.edits.append(Edit(index, "scale_output" if growth == -1 else "unscale_output"))
        return [state]

    def _follow(self, index: int, node: Node, states: Sequence[State]) -> Sequence[State]:
        if not node.inputs:
            return [_from_nothing(node)]
        if node.op in _RANDOM:
            shape = node.output.type.shape
            return [State("random", uniform=whole_axes(shape) if node.op == "randperm" else ())]
        if any(state.additive for state in states):
            linear = self._linear(index, node, states)
            if linear is not None:
                return linear
            states = self._totals(index, states)
            if any(state.additive for state in states):
                return self._mix(node, "it is not linear, and reads a sum over the samples of the batch")
        if node.op == "reshape":
            return [_reshape(node, states[0])]
        if node.op == "broadcast":
            return [_broadcast(node, states[0])]
        if node.op == "slice" and node.output.type == node.inputs[0].type:
            return states
        if node.op == "index":
            chosen = _index_samples(node, states) or _index_copies(node, states)
            if chosen is not None:
                return [chosen]
        return self._by_axes(node, states)

    def _mix(self, node: Node, message: str) -> list[State]:
        return [mixed(Mixing.at(node, message))] * len(node.outputs)

    # --- sums over samples ----------------------------------------------------------------------------

    def _totals(self, index: int, states: Sequence[State], only: Sequence[int] | None = None) -> list[State]:
        """Read whole-batch totals in place of sums that depend on the data alone."""
        result = list(states)
        for operand in range(len(states)) if only is None else only:
            if states[operand].additive and states[operand].known:
                self.edits.append(Edit(index, "total" if states[operand].kind == "sum" else "total_of_means", operand))
                result[operand] = State("invariant")
        return result

    def _linear(self, index: int, node: Node, states: Sequence[State]) -> Sequence[State] | None:
        """The states of outputs if the node is linear in what adds up; None if it is not."""
        known = all(state.known for state in states)
        kind = "sum" if any(state.kind == "sum" for state in states) else "mean"
        constant = [state.kind == "invariant" for state in states]
        if node.op in _LINEAR:
            spreads = node.op == "broadcast" and (states[0].known or self._sized(node.output))
            rounds = node.op == "cast" and not _keeps_sums(node)
            sized = node.op in ("sum", "mean") and self._sized(node.inputs[0])
            return None if spreads or rounds or sized else [State(kind, known)] * len(node.outputs)
        if node.op == "add_scalar":
            if kind == "sum":
                self.edits.append(Edit(index, "scale_constant"))
            return [State(kind, known)] if kind == "mean" or node.output.type.is_float else None
        if node.op in ("add", "sub", "concat") and all(s.additive or c for s, c in zip(states, constant, strict=True)):
            if kind == "sum":
                if not node.output.type.is_float and not all(state.kind == "sum" for state in states):
                    return None
                pairs = enumerate(states)
                self.edits += [Edit(index, "scale_input", operand) for operand, s in pairs if s.kind != "sum"]
            return [State(kind, known)]
        if node.op in ("mul", "div"):
            return self._product(index, node, states)
        if node.op in ("where", "where_scalar") and constant[0]:
            if kind == "mean":
                fits = all(state.additive or fixed for state, fixed in zip(states, constant, strict=True))
            else:
                fits = all(state.kind == "sum" for state in states[1:])
                fits = fits and (node.op == "where" or node.attrs["value"] == 0)
            return [State(kind, known)] if fits else None
        return None

    def _product(self, index: int, node: Node, states: Sequence[State]) -> Sequence[State] | None:
        """A sum times, or divided by, what is the same for all microbatches or can be made so; one of both is a sum."""
        x, y = states
        if y.kind == "invariant":
            return [State(x.kind, x.known and y.known)]
        if node.op == "mul" and x.kind == "invariant":
            return [State(y.kind, x.known and y.known)]
        if x.additive and y.additive and y.known:
            self._totals(index, states, [1])
            return [State(x.kind)]
        if node.op == "mul" and x.additive and y.additive and x.known:
            self._totals(index, states, [0])
            return [State(y.kind)]
        return None

    # --- every other op, by its axes ------------------------------------------------------------------

    def _sized(self, value: Value) -> bool:
        return bool(self._sizes.changing.get(value.name))

    def _by_axes(self, node: Node, states: Sequence[State]) -> Sequence[State]:
        axes = REGISTRY[node.op].axes(node)
        if any(state.kind == "batched" for state in states):
            return self._batched(node, states, axes)
        known = all(state.known for state in states)
        lost = [value for value in node.inputs if self._sized(value)]
        if axes is None:
            if lost:
                return self._mix(node, "it needs all of an axis as long as the batch")
            kind = "random" if any(state.kind == "random" for state in states) else "invariant"
            return [State(kind, known)] * len(node.outputs)
        if lost:
            reduced = self._reduce_sized(node, states, axes, known)
            if reduced is not None:
                return reduced
        kind = "random" if any(state.kind == "random" for state in states) else "invariant"
        return [
            State(kind, known, uniform=_uniform(node, states, axes, labels, value))
            for labels, value in zip(axes.outputs, node.outputs, strict=True)
        ]

    def _reduce_sized(self, node: Node, states: Sequence[State], axes: Axes, known: bool) -> Sequence[State] | None:
        """An axis as long as the batch, of a value that is no batched input, is reduced: ``ones(batch).sum()``."""
        given = {label for labels in axes.outputs for label in labels}
        how: list[str] = []  # one a reduced axis
        for value, state, labels in zip(node.inputs, states, axes.inputs, strict=True):
            for axis in self._sizes.changing.get(value.name, ()):
                label = labels[axis]
                if label is not None and label in given:
                    continue
                if label is None or not state.uniform_along(Factor(axis, value.type.shape[axis])):
                    return self._mix(node, "it needs all of an axis as long as the batch")
                grows = axis in self._sizes.growing[value.name]
                how.append(axes.reduced.get(label, "whole") if grows else "whole")
        if not how:
            return None
        if set(how) == {"mean"}:
            return [State("invariant", known)] * len(node.outputs)
        if how == ["sum"] and node.op == "sum":  # over two such axes, it would grow as the square of the batch
            return [State("sum", known)] * len(node.outputs)
        return self._mix(node, "it needs all of an axis as long as the batch")

    def _batched(self, node: Node, states: Sequence[State], axes: Axes | None) -> Sequence[State]:
        if axes is None:
            return self._mix(node, "it needs the whole batch")
        batches = [
            (labels[state.batch.axis], value.type.shape[state.batch.axis], state.batch)
            for value, state, labels in zip(node.inputs, states, axes.inputs, strict=True)
            if state.batch is not None
        ]
        label, size, factor = batches[0]
        if any(other is None for other, _, _ in batches):
            return self._mix(node, "it needs the whole batch axis")
        assert label is not None
        if any((other, own, f.moved(0)) != (label, size, factor.moved(0)) for other, own, f in batches):
            return self._mix(node, "it combines samples with other samples: two batch axes meet")
        for value, state, labels in zip(node.inputs, states, axes.inputs, strict=True):
            if state.batch is None:
                problem = _meets(value, state, labels, label, size, factor)
                if problem:
                    return self._mix(node, problem)
        known = all(state.known for state in states)
        return [
            self._batched_output(node, axes, labels, value, label, size, factor, known)
            for labels, value in zip(axes.outputs, node.outputs, strict=True)
        ]

    def _batched_output(
        self,
        node: Node,
        axes: Axes,
        labels: Sequence[str | None],
        value: Value,
        label: str,
        size: int,
        factor: Factor,
        known: bool,
    ) -> State:
        places = [axis for axis, own in enumerate(labels) if own == label]
        if len(places) == 1 and value.type.shape[places[0]] == size:
            return batched(factor.moved(places[0]), known)
        how = axes.reduced.get(label) if not places else None
        if how in ("sum", "mean"):
            return State(how, known)
        return self._mix(node, "it takes all samples of the batch together")[0]


def _meets(
    value: Value, state: State, labels: Sequence[str | None], label: str, size: int, factor: Factor
) -> str | None:
    """Why a value that is not batched cannot meet a batched one; None if it can."""
    places = [axis for axis, own in enumerate(labels) if own == label]
    if state.kind == "random" and not places:
        return _SHARED_DRAW
    for axis in places:
        if value.type.shape[axis] != size:
            return f"{value} has another size along the batch axis"
        same = state.uniform_along(factor.moved(axis))
        if state.kind == "random" and any(f.covers(factor.moved(axis)) for f in state.uniform):
            return _SHARED_DRAW
        if state.kind == "invariant" and not same:
            return f"{value} changes along the batch axis, but is not computed from a batched input"
    return None


def _uniform(
    node: Node, states: Sequence[State], axes: Axes, labels: Sequence[str | None], output: Value
) -> tuple[Factor, ...]:
    """The factors along which an output does not change, since no input does."""
    result: list[Factor] = []
    for axis, label in enumerate(labels):
        sources: list[list[Factor]] = []
        for value, state, own in zip(node.inputs, states, axes.inputs, strict=True):
            for place in (place for place, name in enumerate(own) if label is not None and name == label):
                same_size = value.type.shape[place] == output.type.shape[axis]
                sources.append([f.moved(axis) for f in state.uniform if f.axis == place] if same_size else [])
        if sources:
            result += [f for f in sources[0] if all(any(g.covers(f) for g in rest) for rest in sources[1:])]
    return merged(result)


def _short(value: Attr) -> str:
    text = format_attr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _from_nothing(node: Node) -> State:
    type_ = node.output.type
    if node.op == "full":
        return State("invariant", True, whole_axes(type_.shape))
    if node.op == "constant":
        array = node.attrs["value"].numpy()
        axis = counting_axis(array)
        position = None if axis is None else Factor(axis, array.shape[axis])
        return State("invariant", True, uniform_axes(array), position=position)
    counts = node.op == "iota" and node.attrs["start"] == 0 and node.attrs["step"] == 1 and type_.is_integer
    return State("invariant", True, position=Factor(0, type_.shape[0]) if counts else None)


def _reshape(node: Node, state: State) -> State:
    source, target = node.inputs[0].type.shape, node.output.type.shape
    if state.batch is not None:
        parts = refit(state.batch, source, target)
        if len(parts) != 1 or parts[0].size != state.batch.size:
            return mixed(Mixing.at(node, f"reshaping {source} to {target} tears the batch axis apart"))
        return batched(parts[0], state.known)
    uniform = merged(part for factor in state.uniform for part in refit(factor, source, target))
    position = None
    if state.position is not None:
        parts = refit(state.position, source, target)
        position = parts[0] if len(parts) == 1 and parts[0].size == state.position.size else None
    return State(state.kind, state.known, uniform, position=position)


def _broadcast(node: Node, state: State) -> State:
    source, target = node.inputs[0].type.shape, node.output.type.shape
    lead = len(target) - len(source)
    if state.batch is not None:
        return batched(state.batch.moved(state.batch.axis + lead), state.known)
    copied = [axis for axis, size in enumerate(target) if axis < lead or source[axis - lead] != size]
    kept = [factor.moved(factor.axis + lead) for factor in state.uniform if factor.axis + lead not in copied]
    position = state.position.moved(state.position.axis + lead) if state.position else None
    return State(state.kind, state.known, merged((*kept, *whole_axes(target, copied))), position=position)


def _index_samples(node: Node, states: Sequence[State]) -> State | None:
    """``x[arange(batch), index]`` reads, of each sample, what that sample's index says."""
    x, *indices = states
    dims = node.attrs["dims"]
    if x.batch is None or x.batch.axis not in dims or x.batch.stride != 1:
        return None
    if x.batch.size != node.inputs[0].type.shape[x.batch.axis]:
        return None
    own = dims.index(x.batch.axis)
    position = indices[own].position
    if position is None or (position.size, position.stride) != (x.batch.size, 1):
        return None
    others = [state for place, state in enumerate(indices) if place != own]
    aligned = all(s.batch == position if s.batch is not None else s.uniform_along(position) for s in others)
    if not aligned or any(s.kind not in ("batched", "invariant") for s in others):
        return None
    return batched(position.moved(_index_place(dims) + position.axis), all(state.known for state in states))


def _index_copies(node: Node, states: Sequence[State]) -> State | None:
    """An index of an axis along which nothing changes does not matter, even one that counts samples."""
    x, *indices = states
    dims, shape = node.attrs["dims"], node.inputs[0].type.shape
    free = [dim for dim in dims if x.uniform_along(Factor(dim, shape[dim]))]
    chosen = [state for dim, state in zip(dims, indices, strict=True) if dim not in free]
    if not free or any(state.kind != "invariant" for state in (x, *chosen)):
        return None
    index_shape, place = node.inputs[1].type.shape, _index_place(dims)
    shared = list(chosen[0].uniform if chosen else whole_axes(index_shape))
    shared = [f for f in shared if all(state.uniform_along(f) for state in chosen)]
    kept = [axis for axis in range(len(shape)) if axis not in dims]
    moves = {axis: at if at < place else at + len(index_shape) for at, axis in enumerate(kept)}
    uniform = [f.moved(moves[f.axis]) for f in x.uniform if f.axis in moves]
    uniform += [f.moved(place + f.axis) for f in shared]
    return State("invariant", all(state.known for state in (x, *chosen)), merged(uniform))


def _index_place(dims: Sequence[int]) -> int:
    """Where the axes of the index go: in place of the indexed axes if those are neighbours, else first."""
    return dims[0] if list(dims) == list(range(dims[0], dims[0] + len(dims))) else 0


def _keeps_sums(node: Node) -> bool:
    """Whether a cast is linear: not to integers from floats, nor to bool."""
    source, target = node.inputs[0].type, node.output.type
    return source.dtype != "bool" and (target.differentiable or (target.is_integer and source.is_integer))
