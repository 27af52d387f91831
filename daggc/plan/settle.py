"""The stage of every node of a joint graph, from those of the forward nodes.

A node goes to the stage of its origin: cotangents are made where their primals are. Three things need more:

* Equal nodes were merged (:mod:`daggc.passes.cse`), also of stages that have nothing to do with each other: the
  gradient of the bias that ends each of eight branches is one and the same sum. Made in one stage and sent to the
  others it would make them wait for all that stage does. So it is made in each stage that wants it. ("Has to do"
  means: a value of the primal goes from one stage to the other, or a cotangent back.) What cannot be copied goes
  where every arrow of forward tasks points up, and of backward tasks down.

* The cotangents that come back to one value from several stages are added where the last of them arrived in the
  text of the program, which is in one of those stages; it would wait for the others. They are added where the value
  was made.

      stage 0: x --+--> stage 1: f(x) --+--> stage 3          ct(x) = ct_f + ct_g is added in stage 0
                   +--> stage 2: g(x) --+

* The gradient of a parameter may be a cotangent that another stage makes (a bias that is added, unbroadcast): then
  the parameter's stage passes it on, for a parameter and its gradient live together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from daggc.errors import PlanError, located
from daggc.ir.attrs import Attrs
from daggc.ir.graph import Graph, Node, Port, Value
from daggc.passes.split import RECOMPUTED

_EFFECTS = ("python.call",)
_DEPTH = 3  # of nodes that are copied for a copy's sake
_RESIDENT = ("param", "buffer", "constant", "state")


@dataclass(frozen=True)
class Settled:
    """A joint graph in which every node has a stage.

    Attributes:
        graph: nodes that several stages make are there several times.
        stages: of each node, by its first output.
        forward: first outputs of the nodes of the forward phase.
    """

    graph: Graph
    stages: Mapping[str, int]
    forward: frozenset[str]


def settle(
    joint: Graph, primal: Graph, forward: Set[str], stage_of: Mapping[str, int], cheap: frozenset[str]
) -> Settled:
    """Give every node a stage, or several.

    Args:
        forward: first outputs of the joint nodes of the forward phase.
        stage_of: first output of each node of ``primal`` -> stage; it falls along no edge.
        cheap: values that every stage makes for itself.

    Raises:
        PlanError: a node's origin has no stage.
    """
    stages = _Stages.of(joint, primal, forward, stage_of, cheap)
    results = {port.ref for port in primal.outputs}  # a second derivative's primal has gradients among its results
    readers = {port.ref: stages.readers.get(port.value.name, ()) for port in joint.inputs_of("param")}
    gradients = {
        port.ref: readers[port.target]
        for port in joint.outputs_of("grad")
        if port.ref not in results and readers.get(port.target)
    }
    search = _Settling(joint, forward, stage_of, stages, gradients)
    copies = search.copies()
    homes = search.homes
    if all(len(own) == 1 for own in copies.values()) and not homes:
        found = {name: own[0] for name, own in copies.items()}
        return Settled(joint, found, frozenset(forward))
    return _rebuilt(joint, forward, copies, homes, stages, gradients)


@dataclass(frozen=True)
class _Stages:
    """What stages have to do with each other.

    Attributes:
        before: for each stage, all that it reads of, directly or not, and itself, as a set of bits.
        after: for each stage, all that read of it, and itself.
        readers: for each parameter's value, the stages that read it or a view of it, ascending.
    """

    before: Sequence[int]
    after: Sequence[int]
    readers: Mapping[str, tuple[int, ...]]

    @staticmethod
    def of(
        joint: Graph, primal: Graph, forward: Set[str], stage_of: Mapping[str, int], cheap: frozenset[str]
    ) -> _Stages:
        count = max(stage_of.values(), default=0) + 1
        before = [1 << stage for stage in range(count)]
        made: dict[
            str, int
        ] = {}  # value -> the stages that it comes from: of cheap ones, those of what they are made of
        pulled_back = {node.origin for node in joint.nodes if node.outputs[0].name not in forward}
        for node in primal.nodes:
            stage = stage_of.get(node.outputs[0].name)
            if stage is None:
                continue
            sources = 0
            for value in node.inputs:
                sources |= made.get(value.name, 0)
            for value in node.outputs:
                again = value.name in cheap and node.outputs[0].name not in pulled_back
                made[value.name] = sources if again else sources | 1 << stage if value.name in cheap else 1 << stage
            if not all(value.name in cheap for value in node.outputs) or node.outputs[0].name in pulled_back:
                before[stage] |= sources
        for stage in range(count):  # along no edge a stage falls, so that those before are complete
            for other in range(stage):
                if before[stage] >> other & 1:
                    before[stage] |= before[other]
        after = [
            sum(1 << other for other in range(stage, count) if before[other] >> stage & 1) for stage in range(count)
        ]
        return _Stages(before, after, _readers(joint, primal, forward, stage_of))

    def feeds(self, source: int, target: int) -> bool:
        """Whether values go from one stage to the other (cotangents: the other way), or they are the same."""
        return bool(self.before[target] >> source & 1)


def _readers(joint: Graph, primal: Graph, forward: Set[str], stage_of: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Stages of the nodes of ``primal`` that read each parameter, or a view of it; none if no task will."""
    read = {v.name for node in joint.nodes if node.outputs[0].name in forward for v in node.inputs}
    params = {port.value.name: port.value.name for port in primal.inputs_of("param") if port.value.name in read}
    readers: dict[str, set[int]] = {name: set() for name in params}
    for node in primal.nodes:
        stage = stage_of.get(node.outputs[0].name)
        for value in node.inputs:
            if value.name in params and stage is not None:
                readers[params[value.name]].add(stage)
        if node.op in RECOMPUTED and node.inputs and node.inputs[0].name in params:
            params.update((value.name, params[node.inputs[0].name]) for value in node.outputs)
    return {name: tuple(sorted(own)) for name, own in readers.items()}


@dataclass
class _Settling:
    """One walk over the joint graph from its end: when a node's turn comes, its readers' stages are known."""

    joint: Graph
    forward: Set[str]
    stage_of: Mapping[str, int]
    stages: _Stages
    gradients: Mapping[str, tuple[int, ...]]  # ref of a parameter's gradient -> the stages that read the parameter
    homes: dict[str, int] = field(default_factory=dict)  # ref of a gradient -> the stage that has to pass it on

    def __post_init__(self) -> None:
        self.makers = {value.name: node for node in self.joint.nodes for value in node.outputs}
        self.resident = {port.value.name for port in self.joint.inputs if port.kind in _RESIDENT}
        self.ahead: dict[str, set[int]] = {}  # value -> stages of its readers in the forward phase
        self.behind: dict[str, set[int]] = {}  # and in the backward phase
        self.kept: set[str] = set()  # values that are results, and stay with their origin
        self.displaced: dict[str, int] = {}

    def copies(self) -> dict[str, tuple[int, ...]]:
        """Stages of each node by its first output; the first has the node's own names."""
        self.displaced = self.find_displaced()
        self.read_outputs()
        found: dict[str, tuple[int, ...]] = {}
        for node in reversed(self.joint.nodes):
            name = node.outputs[0].name
            own = self.forward_copies(node) if name in self.forward else self.backward_copies(node)
            found[name] = own
            readers = self.ahead if name in self.forward else self.behind
            for value in node.inputs:
                readers.setdefault(value.name, set()).update(own)
        self.pass_on(found)
        return found

    def read_outputs(self) -> None:
        """What results want: gradients of parameters to be where their parameters are."""
        for port in self.joint.outputs:
            readers = self.gradients.get(port.ref)
            if readers:
                wanted = self.home_near(port, readers)
                self.behind.setdefault(port.value.name, set()).add(wanted)
            else:
                self.kept.add(port.value.name)

    def home_near(self, port: Port, readers: Sequence[int]) -> int:
        """The reader's stage where the gradient is made anyway, or else the first."""
        node = self.makers.get(port.value.name)
        if node is None:
            return readers[0]
        sources = self.displaced.get(node.outputs[0].name)
        own = self.own(node) if sources is None else lowest_of(sources)
        return own if own is not None and own in readers else readers[0]

    def own(self, node: Node) -> int | None:
        """The stage of a node's origin."""
        name = node.outputs[0].name
        stage = self.stage_of.get(node.origin or name)
        # The sum of the cotangents of one value that is two outputs is of no node; it goes to its reader.
        if stage is None and (name in self.forward or node.origin):
            raise PlanError(located(f"{node.op} %{name} belongs to no stage", node.path, node.source))
        return stage

    def find_displaced(self) -> dict[str, int]:
        """Sums of cotangents from stages that have nothing to do with their own: all stages they come from, as bits."""
        come_from: dict[str, int] = {}
        found: dict[str, int] = {}
        for node in self.joint.nodes:
            name = node.outputs[0].name
            if name in self.forward:
                continue
            own = self.own(node)
            sources = 0
            for value in node.inputs:
                sources |= come_from.get(value.name, 0)
            if own is not None:
                if node.op == "add" and sources & ~self.stages.after[own]:
                    sources |= 1 << own
                    found[name] = sources
                else:
                    sources = 1 << own
            come_from.update((value.name, sources) for value in node.outputs)
        return found

    def forward_copies(self, node: Node) -> tuple[int, ...]:
        own = self.own(node)
        assert own is not None
        ahead = {stage for value in node.outputs for stage in self.ahead.get(value.name, ())}
        behind = {stage for value in node.outputs for stage in self.behind.get(value.name, ())}
        # A derivative that makes what a later stage has made in its forward makes it itself, in its own forward.
        wanted = sorted(ahead | behind)
        apart = [stage for stage in wanted if not self.stages.feeds(own, stage)]
        if not apart:
            return (own,)
        if not all(self.copyable(node, stage) for stage in apart):
            lowest = min((own, *ahead))
            homes = [home for home in self.homes_of(node) if home <= lowest]
            return (max(homes, default=lowest),)
        kept = len(apart) < len(wanted) or any(value.name in self.kept for value in node.outputs)
        made: list[int] = [own] if kept else []
        for stage in apart:
            if not any(self.stages.feeds(other, stage) for other in made):
                made.append(stage)
        return tuple(made)

    def backward_copies(self, node: Node) -> tuple[int, ...]:
        own = self.own(node)
        wanted = sorted({stage for value in node.outputs for stage in self.behind.get(value.name, ())}, reverse=True)
        if own is None:
            return (wanted[0] if wanted else 0,)
        sources = self.displaced.get(node.outputs[0].name)
        if sources is not None:
            below = bool(wanted) and not sources & ~self.stages.after[wanted[0]]
            own = wanted[0] if below else lowest_of(sources)
        apart = [stage for stage in wanted if not self.stages.feeds(stage, own)]
        if not apart:
            return (own,)
        if sources is not None or not all(self.copyable(node, stage) for stage in apart):
            highest = max(own, *wanted)
            homes = [home for home in self.homes_of(node) if home >= highest]
            return (min(homes, default=highest),)
        kept = len(apart) < len(wanted) or any(value.name in self.kept for value in node.outputs)
        made = [own] if kept else []
        for stage in apart:
            if not any(self.stages.feeds(stage, other) for other in made):
                made.append(stage)
        return tuple(made)

    def copyable(self, node: Node, stage: int, depth: int = _DEPTH) -> bool:
        """Whether a stage may make a node too: it has the inputs, or makes them from what it has in a few steps.

        Effects happen once, and what lives on one device is read there.
        """
        if node.holds(*_EFFECTS) or any(value.name in self.resident for value in node.inputs):
            return False
        for value in node.inputs:
            maker = self.makers.get(value.name)
            own = self.own(maker) if maker else None
            if maker is None or own is None:
                continue
            back = maker.outputs[0].name not in self.forward
            here = self.stages.feeds(stage, own) if back else self.stages.feeds(own, stage)
            if not here and not (depth and self.copyable(maker, stage, depth - 1)):
                return False
        return True

    def homes_of(self, node: Node) -> list[int]:
        """Stages that read all the parameters that a node reads."""
        reads = [self.stages.readers[value.name] for value in node.inputs if self.stages.readers.get(value.name)]
        return sorted(set(reads[0]).intersection(*reads[1:])) if reads else []

    def pass_on(self, found: Mapping[str, tuple[int, ...]]) -> None:
        """Note gradients that no stage of their parameter makes."""
        for port in self.joint.outputs:
            readers = self.gradients.get(port.ref)
            if readers and port.value.name not in self.makers:
                if len(self.stages.before) > 1:  # a cotangent that is given; it may be wherever it is read
                    self.homes[port.ref] = readers[0]
            elif readers:
                made = found[self.makers[port.value.name].outputs[0].name]
                if not set(made) & set(readers):
                    self.homes[port.ref] = self.home_near(port, readers)


def lowest_of(stages: int) -> int:
    """The lowest of a set of bits."""
    return (stages & -stages).bit_length() - 1


def _rebuilt(
    joint: Graph,
    forward: Set[str],
    copies: Mapping[str, tuple[int, ...]],
    homes: Mapping[str, int],
    stages: _Stages,
    gradients: Mapping[str, tuple[int, ...]],
) -> Settled:
    """The graph with a node for each stage that makes it."""
    taken = {value.name for value in joint.values()}
    made: dict[str, dict[int, Value]] = {}  # value -> its copy in each stage
    makers = {value.name: node.outputs[0].name for node in joint.nodes for value in node.outputs}
    nodes: list[Node] = []
    found: dict[str, int] = {}
    ahead: set[str] = set()

    def fresh(name: str, stage: int) -> str:
        new = f"{name}_at{stage}"
        while new in taken:
            new += "_"
        taken.add(new)
        return new

    def read(value: Value, stage: int, is_forward: bool) -> Value:
        own = made.get(value.name)
        if own is None or stage in own:
            return own[stage] if own else value
        if len(own) > 1:
            down = not is_forward and makers[value.name] not in forward  # a cotangent comes from a later stage
            near = [s for s in own if (stages.feeds(stage, s) if down else stages.feeds(s, stage))]
            if near:
                return own[near[0]]
            right = [s for s in own if (s >= stage if down else s <= stage)]
            return own[right[0]] if right else next(iter(own.values()))
        return next(iter(own.values()))

    for node in joint.nodes:
        name = node.outputs[0].name
        for place, stage in enumerate(copies[name]):
            inputs = tuple(read(value, stage, name in forward) for value in node.inputs)
            outputs = tuple(
                value if place == 0 else Value(fresh(value.name, stage), value.type) for value in node.outputs
            )
            for value, new in zip(node.outputs, outputs, strict=True):
                made.setdefault(value.name, {})[stage] = new
            nodes.append(replace(node, inputs=inputs, outputs=outputs))
            found[outputs[0].name] = stage
            if name in forward:
                ahead.add(outputs[0].name)
    results: list[Port] = []
    for port in joint.outputs:
        readers = gradients.get(port.ref)
        own = made.get(port.value.name, {})
        value = port.value
        if readers and own:
            here = [stage for stage in own if stage in readers]
            value = own[here[0]] if here else next(iter(own.values()))
        if port.ref in homes:
            stage = homes[port.ref]
            source = read(port.value, stage, False)
            value = Value(fresh(value.name, stage), value.type)
            attrs = Attrs({"shape": value.type.shape})
            nodes.append(Node("reshape", (source,), (value,), attrs, "", "", ""))
            found[value.name] = stage
        results.append(replace(port, value=value))
    return Settled(Graph(joint.name, joint.inputs, tuple(nodes), tuple(results)), found, frozenset(ahead))
