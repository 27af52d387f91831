"""Layers of a captured program: what its nodes and their derivatives run, by module.

Which values are cut by tensor parallelism follows from the weights, as in Megatron-LM: the first product with a weight
cuts its columns, so its result is cut; what is computed from that is cut; the next product with a weight cuts its rows,
and its result is the sum over the devices:

    x -> norm -> linear (columns) -> attention, gelu, ... -> linear (rows) -> sum over devices -> add -> ...

In the backward, the gradient of what went into a linear cut by columns is a sum over devices. An embedding is cut by
its rows. A normalisation needs whole values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from daggc.errors import PlanError
from daggc.ir.graph import Graph, Node, Program, Value
from daggc.ir.types import DTYPES
from daggc.ops import REGISTRY
from daggc.passes.split import split
from daggc.passes.vjp import differentiate
from daggc.plan.outline import cheap_values, origin_of, unit_of
from daggc.plan.parallel.kernels import Kernel, Product
from daggc.plan.parallel.layers import Layer, Layers
from daggc.plan.plan import simplify

_WHOLE = ("layer_norm", "rms_norm", "group_norm", "batch_norm")  # need all of what they normalise
_GRADIENTS = ("matmul", "linear")
_VIEWS = ("reshape", "permute", "cast", "broadcast", "transpose")


def layers_of(program: Program, samples: int | None = None) -> Layers:
    """The layers of a program.

    Args:
        program: has ``@forward``; it is differentiated here.
        samples: in the batch that it was captured with; by default the first size of the first input.

    Raises:
        PlanError: there is no input to tell the number of samples by.
        DifferentiationError: no output depends on a parameter.
    """
    forward = program.forward
    nodes = tuple(replace(node, origin=node.outputs[0].name) for node in forward.nodes)
    primal = replace(forward, nodes=nodes)
    joint = simplify(differentiate(primal))
    if samples is None:
        shapes = [port.value.type.shape for port in forward.inputs_of("input") if port.value.type.rank]
        if not shapes:
            raise PlanError("a program without inputs does not tell how many samples it was captured with")
        samples = shapes[0][0]
    return _Reading(primal, joint, samples).layers()


@dataclass
class _Draft:
    """A layer under construction."""

    forward: list[Kernel] = field(default_factory=list)
    backward: list[Kernel] = field(default_factory=list)
    parameters: list[float] = field(default_factory=lambda: [0.0, 0.0])
    kept: list[float] = field(default_factory=lambda: [0.0, 0.0])
    reduced: list[float] = field(default_factory=lambda: [0.0, 0.0])


class _Reading:
    """One program being read. ``cut`` has the values that tensor parallelism cuts."""

    def __init__(self, primal: Graph, joint: Graph, samples: int) -> None:
        self.primal, self.joint, self.samples = primal, joint, samples
        self.unit_of = _units(primal.nodes)
        self.names = list(dict.fromkeys(self.unit_of.values()))
        self.drafts = {name: _Draft() for name in self.names}
        self.params = {port.value.name: port.value for port in primal.inputs_of("param")}
        self.root = {name: name for name in self.params}
        self.cut: set[str] = set()
        self.batched = {port.value.name for port in primal.inputs_of("input")}
        self.cut_nodes: dict[str, str] = {}  # first output of a forward node -> rows, columns or inside
        self.homes: dict[str, tuple[str, bool]] = {}  # parameter -> its layer, and whether it is cut
        self.gradients = self._gradients()

    def layers(self) -> Layers:
        self._forward()
        self._backward()
        for name, (unit, cut) in self.homes.items():
            numel = self.params[name].type.numel
            self.drafts[unit].parameters[0 if cut else 1] += numel
            size = 3.0 * self.params[name].type.nbytes  # its gradient is added to those of other microbatches
            self.drafts[unit].backward.append(Kernel("elementwise", 0.0, 0.0, size, cut))
        self._kept()
        sent = self._sent()
        types = [value.type for value in self.params.values() if value.type.differentiable]
        itemsize = max((DTYPES[type_.dtype].itemsize for type_ in types), default=2)
        layers = tuple(
            Layer(
                name,
                _moving(draft.forward),
                _moving(draft.backward),
                (draft.parameters[0], draft.parameters[1]),
                (draft.kept[0], draft.kept[1]),
                sent[place],
                (draft.reduced[0], draft.reduced[1]),
            )
            for place, (name, draft) in enumerate(self.drafts.items())
        )
        return Layers(layers, itemsize, self._tied())

    def _forward(self) -> None:
        summed: set[str] = set()
        for node in self.primal.nodes:
            draft = self.drafts[self.unit_of[node.outputs[0].name]]
            kernel = self._read(node, draft, summed)
            if any(value.name in self.batched for value in node.inputs):
                self.batched.update(value.name for value in node.outputs)
            draft.forward.append(self._sized(node, kernel))

    def _read(self, node: Node, draft: _Draft, summed: set[str]) -> Kernel:
        """Note what a forward node does to its values, and which sums over devices it needs."""
        name = node.outputs[0].name
        roots = [self.root.get(value.name, "") for value in node.inputs]
        if node.inputs and roots[0] and REGISTRY[node.op].cost(node).op_class == "view":
            self.root.update((value.name, roots[0]) for value in node.outputs)  # a weight seen otherwise
            return Kernel("view", 0.0, 0.0)
        inside = any(value.name in self.cut for value in node.inputs)
        weight = roots[1] if node.op in _GRADIENTS and len(roots) > 1 else ""
        how = "inside" if inside else ""
        out = node.outputs[0].type.nbytes / self.samples
        if weight:
            how = "rows" if inside else "columns"
            if inside:
                draft.reduced[0] += out
            elif node.inputs[0].name not in summed:
                summed.add(node.inputs[0].name)
                draft.reduced[1] += node.inputs[0].type.nbytes / self.samples
        elif node.op == "embedding":
            how = "rows"
            draft.reduced[0] += out
        elif node.op in _WHOLE and inside:
            how = ""
            draft.reduced[0] += node.inputs[0].type.nbytes / self.samples
        self.cut_nodes[name] = how
        if how in ("columns", "inside"):
            self.cut.update(value.name for value in node.outputs)
        for root in filter(None, roots):
            bias = root != weight and node.op in _GRADIENTS
            cut = how == "columns" or (how == "rows" and not bias)
            self.homes.setdefault(root, (self.unit_of[name], cut))
        product = self._product(node, how) if node.op in _GRADIENTS else None
        return Kernel(REGISTRY[node.op].cost(node).op_class, 0.0, 0.0, 0.0, bool(how), product)

    def _product(self, node: Node, how: str) -> Product:
        x, y = node.inputs[0].type, node.outputs[0].type
        n, k = y.shape[-1], x.shape[-1]
        if how in ("rows", "columns"):
            return Product(1, y.numel / n / self.samples, n, k, "m", "k" if how == "rows" else "n")
        m = y.shape[-2] if y.rank > 1 else 1
        return Product(y.numel / n / m / self.samples, m, n, k, "count", "count" if how else "")

    def _sized(self, node: Node, kernel: Kernel) -> Kernel:
        """The kernel with its FLOPs and bytes; what does not come from the inputs is the same for any batch."""
        cost = REGISTRY[node.op].cost(node)
        if kernel.op_class == "view" or not cost.bytes:
            return replace(kernel, op_class="view", product=None)
        batched = any(value.name in self.batched for value in (*node.inputs, *node.outputs))
        own = sum(value.type.nbytes for value in (*node.inputs, *node.outputs) if self._constant(value))
        fixed = min(float(own), cost.bytes) if batched else cost.bytes
        flops = cost.flops / self.samples if batched else 0.0
        return replace(kernel, flops=flops, bytes=(cost.bytes - fixed) / self.samples, fixed=fixed)

    def _constant(self, value: Value) -> bool:
        return value.name not in self.batched or value.name in self.gradients

    def _gradients(self) -> frozenset[str]:
        """Names of gradients of parameters, and of what they are views or sums of."""
        makers = {value.name: node for node in self.joint.nodes for value in node.outputs}
        pending = [port.value.name for port in self.joint.outputs_of("grad")]
        found: set[str] = set()
        while pending:
            name = pending.pop()
            node = makers.get(name)
            if name in found or node is None:
                continue
            found.add(name)
            if node.op in (*_VIEWS, "add"):
                pending += [value.name for value in node.inputs if value.type.numel == node.output.type.numel]
        return frozenset(found)

    def _backward(self) -> None:
        primal = {node.outputs[0].name: node for node in self.primal.nodes}
        done = set(primal)
        for node in self.joint.nodes:
            name, origin = node.outputs[0].name, origin_of(node)
            if name in done or origin not in primal:
                continue
            self.batched.update(value.name for value in node.outputs)
            draft = self.drafts[self.unit_of[origin]]
            how = self.cut_nodes.get(origin, "")
            source = primal[origin]
            cut = how in ("columns", "inside") or (how == "rows" and source.op == "embedding")
            kernel = Kernel(REGISTRY[node.op].cost(node).op_class, 0.0, 0.0, 0.0, cut)
            if node.op in _GRADIENTS:
                product = self._derivative(node, source, how)
                kernel = replace(kernel, cut=bool(product.cut), product=product)
            draft.backward.append(self._sized(node, kernel))

    def _derivative(self, node: Node, source: Node, how: str) -> Product:
        """The shape of a product in the backward of a product."""
        if how not in ("rows", "columns"):
            return self._product(node, "inside" if how else "")
        n, k = source.outputs[0].type.shape[-1], source.inputs[0].type.shape[-1]
        rows = source.outputs[0].type.numel / n / self.samples
        if node.outputs[0].name in self.gradients:
            return Product(1, n, k, rows, "k", "n" if how == "rows" else "m")
        return Product(1, rows, k, n, "m", "n" if how == "rows" else "k")

    def _kept(self) -> None:
        """Residuals, where they are made."""
        forward, _ = split(self.joint, self.primal)
        makers = {value.name: origin_of(node) for node in self.joint.nodes for value in node.outputs}
        for port in forward.outputs_of("residual"):
            origin = makers.get(port.value.name, "")
            if origin in self.unit_of and port.value.name in self.batched:
                place = 0 if port.value.name in self.cut else 1
                self.drafts[self.unit_of[origin]].kept[place] += port.value.type.nbytes / self.samples

    def _sent(self) -> list[float]:
        """For each layer, the bytes of a sample that later layers read of it and of those before it."""
        cheap = cheap_values(self.primal)
        number = {name: place for place, name in enumerate(self.names)}
        made: dict[str, tuple[int, float]] = {}
        last: dict[str, int] = {}
        for node in self.primal.nodes:
            here = number[self.unit_of[node.outputs[0].name]]
            for value in node.inputs:
                last[value.name] = max(last.get(value.name, 0), here)
            for value in node.outputs:
                if value.name in self.batched and (value.name not in cheap or _is_data(value, node)):
                    made[value.name] = here, value.type.nbytes / self.samples
        sent = [0.0] * len(self.names)
        for name, (start, nbytes) in made.items():
            for place in range(start, last.get(name, start)):
                sent[place] += nbytes
        return sent

    def _tied(self) -> float:
        """Numbers of parameters that the first and the last layer share."""
        users: dict[str, set[str]] = {}
        for node in self.primal.nodes:
            for value in node.inputs:
                if root := self.root.get(value.name, ""):
                    users.setdefault(root, set()).add(self.unit_of[node.outputs[0].name])
        ends = {self.names[0], self.names[-1]}
        return float(sum(self.params[name].type.numel for name, own in users.items() if len(own & ends) == 2))


def _moving(kernels: Sequence[Kernel]) -> tuple[Kernel, ...]:
    """All but the views, which take no time."""
    return tuple(kernel for kernel in kernels if kernel.op_class != "view")


def _is_data(value: Value, node: Node) -> bool:
    """Whether a view is of numbers, not of integers or masks that are made again."""
    return node.op in _VIEWS and value.type.differentiable


def _units(nodes: Sequence[Node]) -> Mapping[str, str]:
    """The layer of each node, by its first output: its module down to the first number in its path.

    What is outside of numbered modules belongs to the layer before it, and before the first to one of its own; so does
    what follows the last. A model without numbered modules has a layer for each module.
    """
    units = [unit_of(node.path) for node in nodes]
    numbered = [any(part.isdigit() for part in unit.split(".")) for unit in units]
    if not any(numbered):
        return {node.outputs[0].name: unit or "model" for node, unit in zip(nodes, units, strict=True)}
    last = max(place for place, own in enumerate(numbered) if own)
    found: dict[str, str] = {}
    current = "before"
    for place, node in enumerate(nodes):
        current = units[place] if numbered[place] else ("after" if place > last else current)
        found[node.outputs[0].name] = current
    return found
