"""How often an op reads the result of another in models: what makes generated programs like real ones.

``model_pairs.json`` holds counts of five captured models (GPT-2, BERT, a ResNet, T5, ViT); ``tools/generated --learn``
writes it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path

from daggc.ir.graph import Graph

FILE = Path(__file__).with_name("model_pairs.json")


class Likeness:
    """Counts of (maker, op, argument): the result of ``maker`` is read as that argument of ``op``."""

    def __init__(self, counts: Mapping[tuple[str, str, int], int]) -> None:
        self.counts = counts

    @cached_property
    def readers(self) -> dict[str, dict[tuple[str, int], int]]:
        """For each maker the ops that read it, and as which argument."""
        found: dict[str, dict[tuple[str, int], int]] = {}
        for (maker, op, at), count in self.counts.items():
            found.setdefault(maker, {})[op, at] = count
        return found

    @cached_property
    def ops(self) -> dict[str, int]:
        """How often each op occurs, as a reader of its first argument."""
        found: Counter[str] = Counter()
        for (maker, op, at), count in self.counts.items():
            found[op] += count if at == 0 else 0
            if maker:
                found[maker] += 0
        return {op: max(count, 1) for op, count in sorted(found.items())}

    def weight(self, maker: str, op: str, at: int) -> int:
        return self.counts.get((maker, op, at), 0)

    @classmethod
    def of(cls, graphs: Iterable[Graph]) -> Likeness:
        """Count in graphs; inputs are made by ``""``."""
        counts: Counter[tuple[str, str, int]] = Counter()
        for graph in graphs:
            makers = {value.name: node.op for node in graph.nodes for value in node.outputs}
            counts.update(
                (makers.get(value.name, ""), node.op, at)
                for node in graph.nodes
                for at, value in enumerate(node.inputs)
            )
        return cls(dict(sorted(counts.items())))

    def save(self, path: Path = FILE) -> None:
        rows = [f"  {json.dumps([*key, count])}" for key, count in self.counts.items()]
        path.write_text("[\n" + ",\n".join(rows) + "\n]\n")


@lru_cache(maxsize=1)
def of_models() -> Likeness:
    """The counts of the captured models."""
    return Likeness({(maker, op, at): count for maker, op, at, count in json.loads(FILE.read_text())})
