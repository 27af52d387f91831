"""What a training step is assembled from, and the step itself."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from daggc.errors import PlanError
from daggc.ir.graph import Graph, Program
from daggc.plan.schedule import Schedule

FRACTION, TOTAL = "fraction", "total:"  # targets of scalar inputs


@dataclass(frozen=True)
class Part:
    """What one microbatch of a certain size runs, before placement.

    Attributes:
        main: the graph of calls that ``outline`` made of the joint graph.
        bodies: by name.
        denominators: see :class:`daggc.passes.microbatch.Microbatched`.
        batched_inputs: targets of the inputs that each microbatch has its own part of.
        loss: target of the loss.
    """

    main: Graph
    bodies: Mapping[str, Graph]
    denominators: Graph | None = None
    batched_inputs: tuple[str, ...] = ()
    loss: str = "0"


@dataclass(frozen=True)
class Step:
    """A training step.

    Attributes:
        program: the graph ``step`` and the bodies of its calls.
        schedule: the order that its calls are in.
        sizes: samples of each microbatch (and what else tells their parts apart).
    """

    program: Program
    schedule: Schedule
    sizes: tuple[Hashable, ...]

    @property
    def graph(self) -> Graph:
        return self.program["step"]

    def __str__(self) -> str:
        lines = [f"step of {len(self.sizes)} microbatches of {', '.join(map(str, self.sizes))} samples"]
        for device in dict.fromkeys(node.attrs["device"] for node in self.graph.nodes if node.op == "call"):
            tasks = [n.attrs["task"] for n in self.graph.nodes if n.op == "call" and n.attrs["device"] == device]
            lines.append(f"  {device}: {' '.join(tasks)}")
        moved = [node for node in self.graph.nodes if node.op == "transfer"]
        lines.append(f"  {len(moved)} transfers, {sum(node.output.type.nbytes for node in moved):,} bytes")
        return "\n".join(lines)


def check_parts(parts: Mapping[Hashable, Part], sizes: Sequence[Hashable], stages: int) -> None:
    """Raises PlanError if the parts of a step do not fit together, or there are fewer stages than they name."""
    if not sizes or not stages:
        raise PlanError("a step has microbatches and devices")
    missing = [size for size in sizes if size not in parts]
    if missing:
        raise PlanError(
            f"there is no part for microbatches of {missing[0]} samples; there are {', '.join(map(str, parts))}"
        )
    first = parts[sizes[0]]
    summary = _summary(first)
    for size, part in parts.items():
        last = max((int(node.attrs["stage"]) for node in part.main.nodes), default=0)
        if last >= stages:
            raise PlanError(f"stage {last} has no device; there are {stages} devices")
        if _summary(part) != summary:
            raise PlanError(f"microbatches of {sizes[0]} and of {size} samples are cut into different stages")


def _summary(part: Part) -> dict[str, object]:
    """What must be alike in parts of different sizes: where each gradient and new buffer is made."""
    stage = {value.name: node.attrs["stage"] for node in part.main.nodes for value in node.outputs}
    alike: dict[str, object] = {}
    together: dict[str, list[str]] = {}
    for port in part.main.outputs_of("grad", "buffer"):
        alike[port.ref] = stage.get(port.value.name)
        together.setdefault(port.value.name, []).append(port.ref)
    alike["together"] = sorted(together.values())
    alike["inputs"] = [port.ref for port in part.main.inputs if not port.target.startswith(TOTAL)]
    return alike
