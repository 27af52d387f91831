"""From what is known of each value to a forward whose losses add up over microbatches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from daggc.errors import DaggcError, IRError
from daggc.ir.builder import Builder
from daggc.ir.graph import Graph, Node, Port, Value
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.build import broadcast, cast
from daggc.passes.dce import eliminate, live_nodes
from daggc.passes.microbatch.follow import Follower
from daggc.passes.microbatch.sizes import compare, difference
from daggc.passes.microbatch.state import Edit, Factor, Mixing, State

FRACTION = "fraction"
_KNOWN = ("input", "buffer", "constant")  # kinds of inputs whose values are there before the forward


@dataclass(frozen=True)
class Microbatched:
    """A forward for one microbatch.

    Attributes:
        forward: gives the loss and new buffers only. Where ``cut``, the losses of all microbatches add up to
            that of the batch. Inputs of kind ``scalar`` beside the model's own: ``fraction``, an f64[] (samples
            of this microbatch / samples of the batch), and for each of ``denominators`` the sum of its values
            over all microbatches, ``total:<k>``. Otherwise it has no such inputs and wants the whole batch.
        denominators: ``denominator`` outputs ``<k>`` computed from (some of) the inputs of a microbatch; None
            if the loss has no such totals.
        mixing: why the microbatches do not add up to the batch; None if they do. With ``force`` the forward is
            rewritten all the same, each microbatch counted by its fraction.
        batch: samples in the microbatch.
        edits: the changes, by position of nodes of the forward that was analysed.
        loss: target of the ``output`` port of the loss.
        scales_loss: whether the loss is a mean over the batch, so that it is multiplied by ``fraction``.
        batched_inputs: as given.
    """

    forward: Graph
    denominators: Graph | None
    mixing: Mixing | None
    batch: int
    edits: tuple[Edit, ...]
    loss: str
    scales_loss: bool
    batched_inputs: tuple[str, ...]

    @property
    def exact(self) -> bool:
        return self.mixing is None

    @property
    def cut(self) -> bool:
        """Whether ``forward`` is for microbatches: it is if that is exact, or was forced."""
        return any(port.ref == f"scalar:{FRACTION}" for port in self.forward.inputs)

    def __str__(self) -> str:
        if self.mixing is not None:
            return f"microbatches do not add up to the batch: {self.mixing}"
        totals = len(self.denominators.outputs) if self.denominators else 0
        weight = ", weighted by their fractions of the batch" if self.scales_loss else ""
        over = f", over {totals} totals of the whole batch" if totals else ""
        return f"the losses of microbatches add up to that of the batch{weight}{over}"


def microbatched(
    forward: Graph,
    batched_inputs: Collection[str],
    loss_target: str = "0",
    other: Graph | None = None,
    force: bool = False,
) -> Microbatched:
    """Rewrite a forward so that the losses of microbatches add up, or say why that cannot be.

    Args:
        forward: captured at a batch of at least 2 samples: a microbatch's, or the whole batch's (then use
            :func:`rewrite_like` for the microbatches).
        batched_inputs: targets of the ``input`` ports whose axis 0 is the batch.
        loss_target: target of the ``output`` port that is the loss.
        other: the same model captured at another batch size. Without it, numbers that the model computes from
            the batch size (``loss / x.shape[0]``) are taken for constants: give it wherever it can be had.
        force: rewrite even if the batch cannot be cut exactly; ``mixing`` then says why not.

    Returns:
        The rewritten forward; if the batch cannot be cut, ``mixing`` says why, and nothing is rewritten.

    Raises:
        IRError: a port is named that is not there, or the batched inputs differ in size.
    """
    loss = _loss_port(forward, loss_target)
    batch, other_batch = _batch_size(forward, batched_inputs), 0
    problem = None
    if batch < 2:
        problem = Mixing("", f"an analysis needs a batch of at least 2 samples, got {batch}")
    if other is not None:
        other_batch = _batch_size(other, batched_inputs)
        problem = problem or difference(forward, other) or _input_sizes(forward, other, batched_inputs)
        if problem is None and batch == other_batch:
            problem = Mixing("", f"two captures of one batch size, {batch}, tell nothing apart")
    if problem is not None:
        if not force:
            return _uncut(forward, problem, batch, loss, batched_inputs)
        other = None
    sizes = compare(forward, other, batch, other_batch)
    follower = Follower(forward, _inputs(forward, batched_inputs, batch), sizes, force)
    state = follower.states[loss.value.name]
    problem = problem or next(iter(follower.forced), None) or _result_problem(loss, state)
    problem = problem or _buffer_problem(forward, follower.states)
    if problem is not None and not force:
        return _uncut(forward, problem, batch, loss, batched_inputs)
    scales = state.kind != "sum"
    result = _rewrite(forward, follower.edits, loss, scales)
    return Microbatched(*result, problem, batch, tuple(follower.edits), loss_target, scales, tuple(batched_inputs))


def rewrite_like(forward: Graph, analysed: Graph, result: Microbatched) -> Microbatched:
    """Rewrite another capture of the model, at another batch size, as ``analysed`` was.

    Raises:
        IRError: the two captures are not the same graph but for sizes, or ``analysed`` was not rewritten.
    """
    if not result.cut:
        raise IRError(f"the batch cannot be cut: {result.mixing}")
    problem = difference(analysed, forward)
    if problem is not None:
        raise IRError(str(problem))
    rewritten = _rewrite(forward, result.edits, _loss_port(forward, result.loss), result.scales_loss)
    batch = _batch_size(forward, result.batched_inputs)
    graph, denominators = rewritten
    return replace(result, forward=graph, denominators=denominators, batch=batch)


def require_alike(forward: Graph, analysed: Graph, result: Microbatched) -> None:
    """Check that a capture at another batch size is what was analysed: equal nodes can have other numbers.

    Python sees the size of a batch (``if len(x) > 4``), and a slice ends where its input does (``x[:4]``).

    Raises:
        IRError: it is another program.
    """
    if not result.exact:
        return  # each microbatch is on its own
    again = microbatched(analysed, result.batched_inputs, result.loss, other=forward)
    if again.mixing is not None or again.edits != result.edits:
        batch = _batch_size(forward, result.batched_inputs)
        raise IRError(f"with {batch} samples it is another program than with {result.batch}: {again.mixing or 'sums'}")


def _uncut(forward: Graph, problem: Mixing, batch: int, loss: Port, batched_inputs: Collection[str]) -> Microbatched:
    """The forward as it is, for the whole batch."""
    outputs = (loss, *forward.outputs_of("buffer"))
    graph = eliminate(replace(forward, outputs=outputs))
    return Microbatched(graph, None, problem, batch, (), loss.target, False, tuple(batched_inputs))


# --- what comes in ------------------------------------------------------------------------------------


def _loss_port(forward: Graph, target: str) -> Port:
    for port in forward.outputs_of("output"):
        if port.target == target:
            return port
    raise IRError(f"@{forward.name} has no output {target!r} to be the loss")


def _batch_size(forward: Graph, batched_inputs: Collection[str]) -> int:
    ports = {port.target: port.value.type for port in forward.inputs_of("input")}
    unknown = [target for target in batched_inputs if target not in ports]
    if unknown or not batched_inputs:
        raise IRError(f"batched inputs are among {', '.join(ports) or 'none'}; got {', '.join(unknown) or 'none'}")
    sizes = {target: ports[target].shape[0] if ports[target].rank else None for target in batched_inputs}
    if None in sizes.values() or len(set(sizes.values())) != 1:
        raise IRError(f"batched inputs have one size along axis 0; got {sizes}")
    return next(size for size in sizes.values() if size is not None)


def _input_sizes(forward: Graph, other: Graph, batched_inputs: Collection[str]) -> Mixing | None:
    """The reason if an input changes with the batch size along other axes than the batch axis."""
    for port, twin in zip(forward.inputs, other.inputs, strict=True):
        skip = 1 if port.kind == "input" and port.target in batched_inputs else 0
        if port.value.type.shape[skip:] != twin.value.type.shape[skip:]:
            return Mixing("", f"{port.ref} is a {port.value.type} at one batch size, {twin.value.type} at another")
    return None


def _inputs(forward: Graph, batched_inputs: Collection[str], batch: int) -> dict[str, State]:
    states: dict[str, State] = {}
    for port in forward.inputs:
        known = port.kind in _KNOWN
        if port.kind == "input" and port.target in batched_inputs:
            states[port.value.name] = State("batched", known, batch=Factor(0, batch))
        else:
            states[port.value.name] = State("invariant", known)
    return states


def _result_problem(loss: Port, state: State) -> Mixing | None:
    if state.mixing is not None:
        return state.mixing
    type_ = loss.value.type
    if type_.shape != () or not type_.is_float:
        return Mixing("", f"a loss is one real number, got {type_}")
    if state.kind in ("batched", "random"):
        return Mixing("", f"the loss is not a sum or mean over the batch, but {state.kind}")
    return None


def _buffer_problem(forward: Graph, states: dict[str, State]) -> Mixing | None:
    for port in forward.outputs_of("buffer"):
        state = states[port.value.name]
        if state.mixing is not None:
            return state.mixing
        if state.kind != "invariant":
            return Mixing("", f"buffer {port.target!r} is given a value that depends on the samples of a batch")
    return None


# --- rewriting ----------------------------------------------------------------------------------------


def _rewrite(forward: Graph, edits: Sequence[Edit], loss: Port, scales_loss: bool) -> tuple[Graph, Graph | None]:
    by_node: dict[int, list[Edit]] = {}
    for edit in edits:
        by_node.setdefault(edit.node, []).append(edit)
    work = _Rewriting(forward)
    for index, node in enumerate(forward.nodes):
        work.node(node, by_node.get(index, ()))
    return work.finish(loss, scales_loss)


class _Rewriting:
    """One walk over the forward."""

    def __init__(self, forward: Graph) -> None:
        self.b: Builder = REGISTRY.builder(forward.name)
        self.b.reserve(value.name for value in forward.values())
        self.forward = forward
        self.values = {port.value.name: self.b.adopt(port) for port in forward.inputs}
        self.fraction = self.b.input(TensorType("f64", ()), "scalar", FRACTION)
        self.totals: dict[str, tuple[Value, Value]] = {}  # value -> its own, the total that stands for it

    def node(self, node: Node, edits: Sequence[Edit]) -> None:
        b = self.b
        inputs = [self.values[value.name] for value in node.inputs]
        with b.at(node.path, node.source, node.origin):
            for edit in edits:
                if edit.kind in ("total", "total_of_means"):
                    inputs[edit.operand] = self._total(node.inputs[edit.operand], edit.kind == "total_of_means")
                elif edit.kind == "scale_input":
                    inputs[edit.operand] = self._scaled(inputs[edit.operand])
            if any(edit.kind == "scale_constant" for edit in edits):
                outputs: Sequence[Value] = (self._plus_constant(node, inputs[0]),)
            else:
                outputs = b.append(node, inputs)
            for edit in edits:
                if edit.kind == "scale_output":
                    outputs = [self._scaled(value) for value in outputs]
                elif edit.kind == "unscale_output":
                    outputs = [b.emit("div", value, self._fraction_like(value)) for value in outputs]
        self.values.update(zip((value.name for value in node.outputs), outputs, strict=True))

    def _fraction_like(self, x: Value) -> Value:
        return broadcast(self.b, cast(self.b, self.fraction, x.type.dtype), x.type.shape)

    def _scaled(self, x: Value) -> Value:
        return self.b.emit("mul", x, self._fraction_like(x))

    def _plus_constant(self, node: Node, x: Value) -> Value:
        constant = self.b.emit("mul_scalar", self._fraction_like(x), value=node.attrs["value"])
        return self.b.emit("add", x, constant)

    def _total(self, value: Value, of_means: bool) -> Value:
        if value.name not in self.totals:
            own = self.values[value.name]
            own = self._scaled(own) if of_means else own
            total = self.b.input(own.type, "scalar", f"total:{len(self.totals)}")
            self.totals[value.name] = own, total
        return self.totals[value.name][1]

    def finish(self, loss: Port, scales_loss: bool) -> tuple[Graph, Graph | None]:
        result = self.values[loss.value.name]
        self.b.output(self._scaled(result) if scales_loss else result, "output", loss.target)
        for port in self.forward.outputs_of("buffer"):
            self.b.output(self.values[port.value.name], port.kind, port.target)
        graph = eliminate(self.b.build())
        return graph, self._denominators()

    def _denominators(self) -> Graph | None:
        if not self.totals:
            return None
        outputs = tuple(Port(own, "denominator", str(index)) for index, (own, _) in enumerate(self.totals.values()))
        graph = self.b.build()
        nodes = live_nodes(graph, {port.value.name for port in outputs})
        reads = {value.name for node in nodes for value in node.inputs} | {port.value.name for port in outputs}
        inputs = tuple(port for port in graph.inputs if port.value.name in reads)
        if any(port.kind not in (*_KNOWN, "scalar") or port.target.startswith("total:") for port in inputs):
            raise DaggcError("a total of the batch depends on more than its data; this is a defect of the analysis")
        return Graph("denominators", inputs, tuple(nodes), outputs)
