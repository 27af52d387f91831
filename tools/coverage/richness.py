"""How rich programs are: their ops, pairs of ops, dtypes, depth and fan-out; generated ones beside captured models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from daggc.ir.graph import Program
from daggc.passes.split import join

Json = dict[str, Any]
_FREQUENT = 3  # a pair that models have so often, in all five together, is a frequent one
_SHOWN = 20


@dataclass
class Richness:
    """Histograms over graphs: of forward and backward together where there is a backward.

    Attributes:
        pairs: by ``maker op``, the maker of a value and an op that reads it.
        depth: of each graph, the longest chain of nodes.
        nodes: of each graph.
        fan_out: of each value, how many nodes read it; ``widest``: the largest of each graph.
    """

    ops: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    depth: Counter[int] = field(default_factory=Counter)
    nodes: Counter[int] = field(default_factory=Counter)
    fan_out: Counter[int] = field(default_factory=Counter)
    widest: Counter[int] = field(default_factory=Counter)

    def add(self, program: Program) -> None:
        """Count a program."""
        graph = join(program.forward, program.backward) if "backward" in program.graphs else program.forward
        makers: dict[str, str] = {}
        depth: dict[str, int] = {}
        reads: Counter[str] = Counter()
        for node in graph.nodes:
            self.ops[node.op] += 1
            level = 1 + max((depth.get(value.name, 0) for value in node.inputs), default=0)
            for name in {value.name for value in node.inputs}:
                reads[name] += 1
            self.pairs.update(f"{makers[value.name]} {node.op}" for value in node.inputs if value.name in makers)
            for value in node.outputs:
                makers[value.name] = node.op
                depth[value.name] = level
        self.dtypes.update(value.type.dtype for value in graph.values())
        self.depth[max(depth.values(), default=0)] += 1
        self.nodes[len(graph.nodes)] += 1
        self.fan_out.update(reads[value.name] for value in graph.values())
        self.widest[max(reads.values(), default=0)] += 1

    def to_json(self) -> Json:
        return {name: dict(sorted(counter.items(), key=str)) for name, counter in vars(self).items()}

    @classmethod
    def sum(cls, parts: Iterable[Mapping[str, Mapping[str, int]]]) -> Richness:
        """Of what :meth:`to_json` gave, also after a round through a file."""
        total = cls()
        for part in parts:
            for name, counter in part.items():
                own = getattr(total, name)
                own.update({key if name in ("ops", "pairs", "dtypes") else int(key): n for key, n in counter.items()})
        return total


def of_programs(programs: Iterable[Program]) -> Richness:
    found = Richness()
    for program in programs:
        found.add(program)
    return found


def quantile(counter: Counter[int], part: float) -> int:
    """The number below which this part of all counted ones lies."""
    left = part * counter.total()
    for number in sorted(counter):
        left -= counter[number]
        if left <= 0:
            return number
    return max(counter, default=0)


def compare(generated: Richness, models: Mapping[str, Richness]) -> Json:
    """What of the models the generated programs have: shares of ops and pairs, and what is missing."""
    every = Richness.sum(model.to_json() for model in models.values())
    frequent = {pair for pair, count in every.pairs.items() if count >= _FREQUENT}
    return {
        "models": {name: model.to_json() for name, model in models.items()},
        "generated": generated.to_json(),
        "ops of models": len(every.ops),
        "ops of models missing": sorted(set(every.ops) - set(generated.ops)),
        "pairs of models": len(every.pairs),
        "pairs of models missing": sorted(set(every.pairs) - set(generated.pairs)),
        "frequent pairs": len(frequent),
        "frequent pairs missing": sorted(frequent - set(generated.pairs)),
    }


def table(generated: Richness, models: Mapping[str, Richness]) -> str:
    """Lines that show the histograms side by side."""
    columns = {**models, "generated": generated}
    every = Richness.sum(model.to_json() for model in models.values())
    found = compare(generated, models)
    lines = [f"{'':28}" + "".join(f"{name:>11}" for name in columns)]

    def row(title: str, cells: Iterable[Any]) -> None:
        lines.append(f"{title:28}" + "".join(f"{cell:>11}" for cell in cells))

    row("graphs", (c.nodes.total() for c in columns.values()))
    row("different ops", (len(c.ops) for c in columns.values()))
    row("different pairs of ops", (len(c.pairs) for c in columns.values()))
    for part, title in ((0.5, "median"), (0.99, "99 %"), (1.0, "largest")):
        row(f"nodes, {title}", (quantile(c.nodes, part) for c in columns.values()))
    for part, title in ((0.5, "median"), (0.99, "99 %"), (1.0, "largest")):
        row(f"depth, {title}", (quantile(c.depth, part) for c in columns.values()))
    for part, title in ((0.5, "median"), (1.0, "largest")):
        row(f"fan-out of a graph, {title}", (quantile(c.widest, part) for c in columns.values()))
    row("fan-out, mean", (f"{_mean(c.fan_out):.2f}" for c in columns.values()))
    for dtype in sorted({dtype for c in columns.values() for dtype in c.dtypes}):
        row(f"values of {dtype}", (_share(c.dtypes, dtype) for c in columns.values()))
    for op, _ in every.ops.most_common(_SHOWN):
        row(f"nodes of {op}", (_share(c.ops, op) for c in columns.values()))
    for pair, _ in every.pairs.most_common(_SHOWN):
        row(pair.replace(" ", " -> "), (_share(c.pairs, pair) for c in columns.values()))
    for what in ("ops of models", "pairs of models", "frequent pairs"):
        missing = found[f"{what} missing"]
        named = f"; not {', '.join(missing[:10])}{' ...' if len(missing) > 10 else ''}" if missing else ""
        lines.append(f"generated programs have {found[what] - len(missing)} of {found[what]} {what}{named}")
    return "\n".join(lines)


def _mean(counter: Counter[int]) -> float:
    return sum(number * count for number, count in counter.items()) / max(counter.total(), 1)


def _share(counter: Counter[str], key: str) -> str:
    return f"{counter[key] / max(counter.total(), 1):.1%}" if counter[key] else "-"
