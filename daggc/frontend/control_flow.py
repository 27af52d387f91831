"""torch's higher-order ops in an exported graph -> nodes with graphs inside: cond, while_loop, scan, map.

``torch.associative_scan`` needs nothing: export writes it out as slices and combinations of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx

from daggc.errors import CaptureError
from daggc.ir.builder import Builder
from daggc.ir.graph import Graph, Value
from daggc.ops.build import reshape


class Importer(Protocol):
    """What importing an fx module needs of the importer around it."""

    b: Builder
    values: dict[fx.Node, Any]

    def inside(self, b: Builder, module: fx.GraphModule) -> Importer:
        """An importer of a module that emits elsewhere."""
        ...

    def nodes(self, module: fx.GraphModule, values: dict[fx.Node, Any]) -> None: ...


@dataclass(frozen=True)
class _Body:
    """A graph under construction, so that a key can still be added to its inputs."""

    b: Builder

    @property
    def draws(self) -> bool:
        return any(port.kind == "key" for port in self.b.build().inputs)


def import_control_flow(importer: Importer, name: str, args: Sequence[Any]) -> tuple[Value, ...] | None:
    """Emit a higher-order op of control flow; None if it is not one.

    Raises CaptureError for what has no meaning in the IR: random numbers in a loop, results that are not tensors.
    """
    rule = _RULES.get(name)
    return None if rule is None else rule(importer, *args)


def _cond(importer: Importer, predicate: Any, then: Any, otherwise: Any, operands: Sequence[Any] = ()):
    b = importer.b
    if isinstance(predicate, bool):
        chosen = then if predicate else otherwise
        return tuple(_run(importer, b, chosen, list(operands)))
    predicate = reshape(b, predicate, ())
    if predicate.type.dtype != "bool":
        predicate = b.emit("ne_scalar", predicate, value=0)
    bodies = [_body(importer, name, module, operands) for name, module in (("then", then), ("otherwise", otherwise))]
    tensors = [operand for operand in operands if isinstance(operand, Value)]
    if any(body.draws for body in bodies):
        tensors.append(b.random_key())
        for body in bodies:
            body.b.random_key()
    first, second = (body.b.build() for body in bodies)
    results = b.emit_many("cond", predicate, *tensors, true=first, false=second)
    b.skip_streams(b.nodes[-1])
    return results


def _while(importer: Importer, goes_on: Any, body: Any, carries: Sequence[Any], extra: Sequence[Any] = ()):
    b = importer.b
    carries = [_tensor(carry, "a while_loop carries") for carry in carries]
    operands = [*carries, *extra]
    graphs: dict[str, Any] = {
        "cond": _pure(_body(importer, "more", goes_on, operands), "while_loop"),
        "body": _pure(_body(importer, "body", body, operands), "while_loop"),
    }
    tensors = [operand for operand in operands if isinstance(operand, Value)]
    return b.emit_many("while_loop", *tensors, carries=len(carries), **graphs)


def _scan(importer: Importer, combine: Any, init: Sequence[Any], xs: Sequence[Any], extra: Sequence[Any] = ()):
    return _steps(importer, "scan", combine, init, xs, extra)


def _map(importer: Importer, function: Any, xs: Sequence[Any], extra: Sequence[Any] = ()):
    return _steps(importer, "map", function, [], xs, extra)


def _steps(importer: Importer, name: str, module: Any, init: Sequence[Any], xs: Sequence[Any], extra: Sequence[Any]):
    b = importer.b
    carries = [_tensor(carry, f"a {name} carries") for carry in init]
    scanned = [_tensor(x, f"a {name} goes over") for x in xs]
    parts = [x.type.with_(shape=x.type.shape[1:]) for x in scanned]
    body = _body(importer, "step", module, [*carries, *(Value("", part) for part in parts), *extra])
    tensors = [*carries, *scanned, *(operand for operand in extra if isinstance(operand, Value))]
    return b.emit_many(
        "scan",
        *tensors,
        body=_pure(body, name),
        carries=len(carries),
        xs=len(scanned),
        length=scanned[0].type.shape[0],
        reverse=False,
    )


_RULES: Mapping[str, Callable[..., tuple[Value, ...]]] = {
    "cond": _cond,
    "while_loop": _while,
    "scan": _scan,
    "map_impl": _map,
}


def _tensor(item: Any, what: str) -> Value:
    if not isinstance(item, Value):
        raise CaptureError(f"{what} a {type(item).__name__}; make it a tensor")
    return item


def _pure(body: _Body, name: str) -> Graph:
    if body.draws:
        raise CaptureError(
            f"random numbers inside a {name} (dropout, say): every step would draw the same; draw them before it and "
            "hand them in"
        )
    return body.b.build()


def _body(importer: Importer, name: str, module: fx.GraphModule, operands: Sequence[Any]) -> _Body:
    """The graph of a module; operands that are not tensors become part of it."""
    b = importer.b.like(name)
    for node in importer.b.nodes:
        b.skip_streams(node)
    inputs = [
        b.input(operand.type, "input", str(b.arity)) if isinstance(operand, Value) else operand for operand in operands
    ]
    for place, result in enumerate(_run(importer, b, module, inputs)):
        b.output(_tensor(result, "a branch or body gives"), "output", str(place))
    return _Body(b)


def _run(importer: Importer, b: Builder, module: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Emit a module's nodes on these inputs; returns its results."""
    inner = importer.inside(b, module)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    inner.values.update(zip(placeholders, inputs, strict=True))
    inner.nodes(module, inner.values)
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    results = output.args[0]
    results = results if isinstance(results, tuple | list) else (results,)
    return [inner.values[item] if isinstance(item, fx.Node) else item for item in results]
