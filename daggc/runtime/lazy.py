"""Lazy calls of a compiled module: its result, and the gradients its pullback gives, as Dask collections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from daggc.backend.dask_graph import Emission, Found, Source
from daggc.errors import DifferentiationError, RunError
from daggc.frontend.dtypes import TO_TORCH, ir_type
from daggc.frontend.pytree import flatten
from daggc.ir.graph import Port
from daggc.ir.tree import Tree
from daggc.runtime.dask_executor import DaskExecutor, Inputs, new_token
from daggc.runtime.thunk import Thunk, join_thunk

if TYPE_CHECKING:  # the module hands itself over; nothing of it is needed here at run time
    from daggc.runtime.module import CompiledModule, Entry

Pullback = Callable[[Any], tuple[dict[str, Thunk], tuple[Thunk | None, ...]]]


def lazy_call(module: CompiledModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Thunk:
    """See :meth:`CompiledModule.lazy`."""
    leaves, spec = flatten((tuple(args), dict(kwargs)))
    with torch.no_grad():
        entry = module.entry(leaves, spec)
        inputs = module.inputs(entry, leaves)
    _refuse_writes(entry)
    executor = _dask_executor(entry)
    emission, given = executor.forward_tasks(inputs, new_token())
    return _result_thunk(entry, executor, emission, given)


def lazy_vjp(module: CompiledModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Thunk, Pullback]:
    """See :meth:`CompiledModule.vjp`."""
    leaves, spec = flatten((tuple(args), dict(kwargs)))
    wanting = [x.detach().requires_grad_(x.is_floating_point() or x.is_complex()) for x in leaves]
    with torch.enable_grad():
        entry = module.entry(wanting, spec)
    if entry.function is None:
        raise DifferentiationError("no result of the model depends differentiably on its parameters or inputs")
    inputs = module.inputs(entry, leaves)
    _refuse_writes(entry)
    executor = _dask_executor(entry)
    emission, placed = executor.forward_tasks(inputs, new_token())
    result = _result_thunk(entry, executor, emission, placed)
    return result, partial(_pull_back, entry, executor, emission, placed.sources | emission.outputs, result.keep)


def _refuse_writes(entry: Entry) -> None:
    """A lazy run is over when nobody waits for it: it cannot write to what it was given."""
    written = entry.program.forward.outputs_of("input")
    if written:
        raise RunError(f"forward writes to its argument {written[0].target!r}, which a lazy call would not; clone it")


def _pull_back(
    entry: Entry,
    executor: DaskExecutor,
    forward: Emission,
    sources: Mapping[str, Source],
    keep: Sequence[Any],
    cotangent: Any,
) -> tuple[dict[str, Thunk], tuple[Thunk | None, ...]]:
    """The gradients: by parameter name, and one for each tensor among the inputs (None if it has none)."""
    given = _cotangents(entry, executor, cotangent)
    backward, sent = executor.backward_tasks(sources, given, new_token())
    emission = Emission(
        tasks=forward.tasks | backward.tasks,
        device=forward.device | backward.device,
        priority=forward.priority | backward.priority,
        calls=[*forward.calls, *backward.calls],
    )

    thunks: dict[str, Thunk] = {}
    for port in executor.program.backward.outputs:
        found = backward.outputs[port.ref]
        thunks[port.target] = join_thunk(emission, [found], _first, executor.pool, (*keep, *sent))
    parameters = {ref.removeprefix("param:"): t for ref, t in thunks.items() if ref.startswith("param:")}
    ports = entry.program.forward.inputs_of("input")
    return parameters, tuple(thunks.get(port.ref) for port in ports)


def _cotangents(entry: Entry, executor: DaskExecutor, cotangent: Any) -> list[torch.Tensor]:
    """One tensor for each cotangent port, from a structure like the model's result."""
    outputs: list[Port] = list(entry.program.forward.outputs_of("output"))
    leaves = _leaves_like(entry.out_spec.tree, cotangent)
    by_ref = {f"cotangent:{port.ref}": leaf for port, leaf in zip(outputs, leaves, strict=True)}
    forward_refs = {port.ref for port in executor.program.forward.inputs}
    given: list[torch.Tensor] = []
    for port in executor.program.backward.inputs_of("cotangent"):
        if port.ref in forward_refs:
            continue
        type_ = port.value.type.with_(device=None)
        leaf = by_ref[port.ref]
        if leaf is None:
            leaf = torch.zeros(type_.shape, dtype=TO_TORCH[type_.dtype])
        if ir_type(leaf) != type_:
            raise RunError(f"the cotangent of {port.target!r} must be a {type_}, got a {ir_type(leaf)}")
        given.append(leaf)
    return given


def _leaves_like(tree: Tree, value: Any, path: str = "") -> list[torch.Tensor | None]:
    """The leaves of a cotangent, of the structure of the model's result; None stands for any part of it."""
    if value is None or tree.kind == "const":
        return [None] * tree.leaves
    where = f" at {path}" if path else ""
    if tree.kind == "leaf":
        if not isinstance(value, torch.Tensor):
            raise RunError(f"a cotangent{where} is a tensor or None, got a {type(value).__name__}")
        return [value]
    if isinstance(value, torch.Tensor):
        raise RunError(f"the result{where} is a {tree.kind} of {len(tree.children)}: its cotangent is one too, or None")
    if isinstance(value, Mapping):
        named = {str(key): item for key, item in value.items()}
    elif isinstance(value, list | tuple):
        named = dict(zip(_keys(tree), value, strict=False))
        if len(value) != len(tree.children):
            raise RunError(f"the cotangent{where} needs {len(tree.children)} parts as the result has, got {len(value)}")
    else:
        named = vars(value)
    unknown = set(named) - set(_keys(tree)) if isinstance(value, Mapping) else None
    if unknown:
        raise RunError(f"the result{where} has no {', '.join(sorted(unknown))}; it has {', '.join(_keys(tree))}")
    leaves: list[torch.Tensor | None] = []
    for key, child in zip(_keys(tree), tree.children, strict=True):
        leaves += _leaves_like(child, named.get(key), f"{path}.{key}" if path else key)
    return leaves


def _keys(tree: Tree) -> tuple[str, ...]:
    return tree.keys or tuple(map(str, range(len(tree.children))))


def _result_thunk(entry: Entry, executor: DaskExecutor, emission: Emission, given: Inputs) -> Thunk:
    ports = executor.program.forward.outputs_of("output")
    found: list[Found] = [emission.outputs[port.ref] for port in ports]
    assemble = partial(_rebuild, entry.out_spec.rebuild)
    return join_thunk(emission, found, assemble, executor.pool, (executor, *given.futures))


def _rebuild(rebuild: Callable[[Any], Any], values: list[Any]) -> Any:
    return rebuild(iter(values))


def _first(values: list[Any]) -> Any:
    return values[0]


def _dask_executor(entry: Entry) -> DaskExecutor:
    """The entry's executor if it runs on workers; else one for Dask's scheduler in this process."""
    if isinstance(entry.executor, DaskExecutor):
        return entry.executor
    if entry.local_tasks is None:
        refs = () if entry.function is None else [port.target for port in entry.executor.program.backward.outputs]
        entry.local_tasks = DaskExecutor(entry.program, refs, None)
    return entry.local_tasks
