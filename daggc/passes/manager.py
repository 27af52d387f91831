"""Passes with contracts, run in order, the program verified after each; pipelines as text.

run(program, pipeline("fold,cse,canonicalize,dce"))
run(program, pipeline("vjp{wrt=params},dce"))
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import ClassVar

from daggc.errors import DaggcError, IRError
from daggc.ir.graph import Program
from daggc.ir.verifier import verify
from daggc.ops import REGISTRY


@dataclass(frozen=True)
class Pass:
    """A pass is a frozen dataclass; its fields are the options a pipeline's text can set.

    ``requires`` and ``ensures`` are its contract: they raise IRError when the program that comes in, or the
    pair of programs before and after, breaks it.
    """

    name: ClassVar[str]

    def requires(self, program: Program) -> None:
        """Check the program that comes in."""

    def apply(self, program: Program) -> Program:
        raise NotImplementedError

    def ensures(self, before: Program, after: Program) -> None:
        """Check the program that goes out; by default the ports of graphs that stay are unchanged."""
        for name, graph in before.graphs.items():
            if name in after.graphs and not same_ports(graph, after.graphs[name]):
                raise IRError(f"pass {self.name} changed the inputs or outputs of @{name}")

    def __str__(self) -> str:
        options = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return f"{self.name}{{{options}}}" if options else self.name


def same_ports(before, after) -> bool:
    """Whether two graphs stand for the same inputs and outputs, of the same types."""
    return all(
        [(p.ref, p.value.type) for p in ports] == [(p.ref, p.value.type) for p in others]
        for ports, others in ((before.inputs, after.inputs), (before.outputs, after.outputs))
    )


PASSES: dict[str, type[Pass]] = {}


def register_pass(cls: type[Pass]) -> type[Pass]:
    """Make a pass known to pipelines by its name."""
    if cls.name in PASSES:
        raise IRError(f"pass {cls.name!r} is registered twice")
    PASSES[cls.name] = cls
    return cls


def run(program: Program, passes: Iterable[Pass], check: bool = True) -> Program:
    """Apply passes in order. With ``check``, verify the program and the contract after each.

    Raises IRError naming the pass that broke the program.
    """
    for step in passes:
        step.requires(program)
        after = step.apply(program)
        if check:
            try:
                step.ensures(program, after)
                verify(after, REGISTRY)
            except DaggcError as wrong:
                raise IRError(f"after pass {step}: {wrong}") from wrong
        program = after
    return program


_STEP = re.compile(r"\s*([a-z_]+)\s*(?:\{([^}]*)\})?\s*(?:,|$)")


def pipeline(text: str) -> list[Pass]:
    """Read ``"fold,cse,vjp{wrt=params}"``. Raises IRError naming what is unknown."""
    steps: list[Pass] = []
    at = 0
    while at < len(text):
        match = _STEP.match(text, at)
        if match is None:
            raise IRError(f"not a pipeline at {text[at:]!r}; one looks like 'fold,cse,vjp{{wrt=params}}'")
        name, options = match.groups()
        if name not in PASSES:
            raise IRError(f"there is no pass {name!r}; there are {', '.join(sorted(PASSES))}")
        steps.append(PASSES[name](**_options(PASSES[name], options or "")))
        at = match.end()
    return steps


def _options(cls: type[Pass], text: str) -> dict[str, object]:
    kinds = {f.name: type(f.default) for f in fields(cls)}
    options: dict[str, object] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in kinds:
            raise IRError(f"pass {cls.name} has no option {key!r}; it has {', '.join(kinds) or 'none'}")
        try:
            options[key] = value.lower() in ("1", "true", "yes") if kinds[key] is bool else kinds[key](value)
        except ValueError:
            raise IRError(f"option {key} of pass {cls.name} is a {kinds[key].__name__}, got {value!r}") from None
    return options
