"""``torch.utils.checkpoint``: the nodes of a region become one ``checkpoint`` node, which keeps nothing for backward.

Export traces through a region. While it does, nodes made inside are annotated with the region's number; the nodes
from the first to the last of them are then enclosed. Dropout inside draws the same mask when it is run again, for
its key is an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import fx
from torch.fx.traceback import annotate, preserve_node_meta

from daggc.errors import CaptureError, located
from daggc.frontend.opaque import capturing
from daggc.ir.attrs import Attrs
from daggc.ir.graph import Graph, Node, Port

_KEY = "daggc.checkpoint"
Spans = dict[int, tuple[int, int]]  # of each region: its first node, and the one after its last


@contextmanager
def marking_checkpoints() -> Iterator[None]:
    """While this thread captures: regions are marked rather than run by torch's own machinery."""
    numbers = count(1)
    inside: list[int] = []

    @contextmanager
    def region() -> Iterator[None]:
        inside.append(inside[0] if inside else next(numbers))  # one in another is part of it
        try:
            with preserve_node_meta(), annotate({_KEY: inside[0]}):
                yield
        finally:
            inside.pop()

    def generator(*args: Any, **kwargs: Any) -> Iterator[None]:
        if not capturing():
            yield from original(*args, **kwargs)
            return
        with region():
            yield

    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        if not capturing():
            return reentrant(function, preserve, *args)
        wanted = any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)
        with region(), torch.set_grad_enabled(wanted and torch.is_grad_enabled()):  # as torch's reentrant one has it
            return function(*args)

    reentrant = torch_checkpoint.CheckpointFunction.apply
    original = torch_checkpoint._checkpoint_without_reentrant_generator
    torch_checkpoint._checkpoint_without_reentrant_generator = generator
    torch_checkpoint.CheckpointFunction.apply = staticmethod(apply)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch_checkpoint._checkpoint_without_reentrant_generator = original
        del torch_checkpoint.CheckpointFunction.apply


def note_span(spans: Spans, node: fx.Node, start: int, stop: int) -> None:
    """Note that a node of the exported graph became the nodes from ``start`` to before ``stop``."""
    region = node.meta.get("custom", {}).get(_KEY)
    if region is not None and stop > start:
        first, _ = spans.get(region, (start, stop))
        spans[region] = (first, stop)


def enclose(graph: Graph, spans: Mapping[int, tuple[int, int]], refuse_buffers: bool) -> Graph:
    """Put the nodes of each region into one.

    Args:
        refuse_buffers: raise CaptureError for a buffer that is written inside: when torch runs the region again in
            its backward, it writes it once more.
    """
    nodes: list[Node] = []
    at = 0
    for start, stop in sorted(spans.values()):
        if start < at:
            continue
        nodes += graph.nodes[at:start]
        nodes += _enclosed(graph, start, stop, refuse_buffers)
        at = stop
    return replace(graph, nodes=(*nodes, *graph.nodes[at:]))


def _enclosed(graph: Graph, start: int, stop: int, refuse_buffers: bool) -> tuple[Node, ...]:
    inside = graph.nodes[start:stop]
    made = {value.name for node in inside for value in node.outputs}
    for port in graph.outputs_of("buffer") if refuse_buffers else ():
        if port.value.name in made:
            raise CaptureError(
                located(
                    f"the buffer {port.target!r} is written inside torch.utils.checkpoint, which in eager writes it "
                    "again when it recomputes the region in the backward; keep the layer out of the region",
                    inside[0].path,
                    inside[0].source,
                )
            )
    reads = dict.fromkeys(value for node in inside for value in node.inputs if value.name not in made)
    wanted = {port.value.name for port in graph.outputs}
    wanted |= {value.name for node in graph.nodes[stop:] for value in node.inputs}
    results = [value for node in inside for value in node.outputs if value.name in wanted]
    if not results or not any(value.type.differentiable for value in results):
        return inside
    body = Graph(
        "region",
        tuple(Port(value, "input", str(place)) for place, value in enumerate(reads)),
        inside,
        tuple(Port(value, "output", str(place)) for place, value in enumerate(results)),
    )
    return (Node("checkpoint", tuple(reads), tuple(results), Attrs({"body": body}), _path(inside), inside[-1].source),)


def _path(nodes: tuple[Node, ...]) -> str:
    """What the module paths of nodes begin with."""
    paths = [node.path.split(".") for node in nodes if node.path]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
