"""``torch.autocast`` made explicit: the casts that eager makes become nodes of the exported graph.

``torch.export`` records where autocast is entered and left, and each op as it was called, before its inputs are
cast. Here every op in such a region is run once more on tensors without data, under the same autocast, by a mode
that sees which inputs are cast to what; these casts are written into the graph. An op that autocast does not know
itself, but ops that it is made of (``einsum``, ``lstm``), is taken apart.

A weight is cast once a region, as eager caches it, so its gradient is added up in the lower precision; other
tensors are cast for each use. This runs inside export, before it takes regions apart for ``torch.no_grad`` (which
it forgets where autocast is on).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._export.passes import replace_set_grad_with_hop_pass as export_passes
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from daggc.errors import CaptureError

State = tuple[tuple[str, torch.dtype, bool], ...]  # for each device type where autocast is on: dtype, weights cached
Region = tuple[str, torch.dtype, bool]  # device type, dtype, enabled

_ENTER = torch.amp.autocast_mode._enter_autocast
_EXIT = torch.amp.autocast_mode._exit_autocast
_DEVICES = ("cpu", "cuda")


def autocast_state() -> State:
    """Where autocast is on in this thread: part of what decides what a model computes."""
    return tuple(
        (device, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled())
        for device in _DEVICES
        if torch.is_autocast_enabled(device)
    )


@contextmanager
def autocast_off() -> Iterator[None]:
    """No autocast inside, whatever is on around."""
    with ExitStack() as stack:
        for device, _, _ in autocast_state():
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def autocast_of(state: Sequence[tuple[str, torch.dtype, bool]]) -> Iterator[None]:
    """Autocast as it was when :func:`autocast_state` was asked."""
    with ExitStack() as stack:
        for device, dtype, cached in state:
            stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=cached))
        yield


@contextmanager
def explicit_casts(root: nn.Module, inputs: Sequence[torch.Tensor]) -> Iterator[None]:
    """While exporting this module in this block, autocast regions become casts. Not for several threads at once."""
    original = export_passes.replace_set_grad_with_hop_pass

    def replaced(module: fx.GraphModule, signature: Any) -> Any:
        named = dict(root.named_parameters(remove_duplicate=False))
        leaves: dict[str, torch.Tensor] = {name: named[path] for name, path in signature.inputs_to_parameters.items()}
        leaves.update(zip(signature.user_inputs, inputs, strict=True))
        for node in module.graph.nodes:
            leaf = leaves.get(node.name) if node.op == "placeholder" else None
            if leaf is not None and leaf.requires_grad and leaf.is_leaf and not leaf._is_view():
                node.meta[_LEAF] = id(leaf)  # tied ones are one
        with module._set_replace_hook(signature.get_replace_hook()):
            _make_explicit(module, [], {})
            module.recompile()
        return original(module, signature)

    export_passes.replace_set_grad_with_hop_pass = replaced
    try:
        yield
    finally:
        export_passes.replace_set_grad_with_hop_pass = original


_LEAF = "daggc.leaf"  # marks a placeholder whose casts eager caches
_Cache = dict[tuple[int, torch.dtype], fx.Node]


def _make_explicit(module: fx.GraphModule, regions: list[Region], cache: _Cache) -> None:
    """Rewrite a graph in place.

    Args:
        regions: those around it, outermost first.
        cache: casts of weights made so far in the outermost region.
    """
    depth, outside = len(regions), cache
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _ENTER:
            device, dtype, enabled, _ = node.args
            regions.append((device, dtype, enabled))
        elif node.target is _EXIT:
            regions.pop()
            module.graph.erase_node(node)
            if not regions:
                outside.clear()
        elif node.target is torch._C._set_grad_enabled:
            cache = outside if node.args[0] else {}  # casts made without gradients serve none that has them
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            for inner in _bodies(module, node):
                _make_explicit(inner, list(regions), {})
        elif isinstance(node.target, torch._ops.OpOverload) and any(enabled for _, _, enabled in regions):
            _cast_inputs(module, node, regions, cache)
    assert len(regions) == depth, "autocast is left as often as it is entered"
    for node in reversed(list(module.graph.nodes)):
        if node.op == "call_function" and node.target is _ENTER:
            module.graph.erase_node(node)
    module.recompile()


def _bodies(module: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    found = [getattr(module, str(arg.target)) for arg in node.args if isinstance(arg, fx.Node) and arg.op == "get_attr"]
    return [body for body in found if isinstance(body, fx.GraphModule)]


def _has_kernel(op: torch._ops.OpOverload, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key)


def _cast_inputs(module: fx.GraphModule, node: fx.Node, regions: Sequence[Region], cache: _Cache) -> None:
    op: torch._ops.OpOverload = node.target  # pyright: ignore[reportAssignmentType]
    known = any(_has_kernel(op, f"Autocast{device.upper()}") for device, _, enabled in regions if enabled)
    composite = _has_kernel(op, "CompositeImplicitAutograd")
    if not known and not composite:
        return
    watch = _run(node, regions)
    if not known:
        if watch.count > _run(node, ()).count:
            if op._schema.name == "aten::lstm":
                raise CaptureError(
                    "an LSTM under torch.autocast: the CPU's kernel then gives another dtype than torch.export sees; "
                    'call it inside "with torch.autocast(..., enabled=False)", on tensors of its own dtype'
                )
            _take_apart(module, node, regions)
        return
    casts = {id(value): dtype for value, dtype in _own_casts(watch, node)}

    def cast(source: fx.Node) -> fx.Node:
        dtype = casts.get(id(source.meta.get("val")))
        return source if dtype is None else _cast(module, node, source, dtype, regions, cache)

    if casts:
        node.args = fx.map_arg(node.args, cast)
        node.kwargs = fx.map_arg(node.kwargs, cast)
    _check(node)


def _cast(
    module: fx.GraphModule, user: fx.Node, source: fx.Node, dtype: torch.dtype, regions: Sequence[Region], cache: _Cache
) -> fx.Node:
    value = source.meta["val"]
    low = any(enabled and dtype == fast for _, fast, enabled in regions)
    leaf = source.meta.get(_LEAF) if value.dtype == torch.float32 and low else None
    if leaf is not None and (leaf, dtype) in cache:
        return cache[leaf, dtype]
    with module.graph.inserting_before(user):
        made = module.graph.call_function(torch.ops.aten._to_copy.default, (source,), {"dtype": dtype})
    made.meta = {name: user.meta[name] for name in ("nn_module_stack", "stack_trace") if name in user.meta}
    mode: Any = value.fake_mode  # pyright: ignore[reportAttributeAccessIssue]  # a tensor without data
    with mode, autocast_off():
        made.meta["val"] = value.detach().to(dtype, copy=True)
    if leaf is not None:
        cache[leaf, dtype] = made
    return made


def _own_casts(watch: _Watch, node: fx.Node) -> list[tuple[torch.Tensor, torch.dtype]]:
    """The casts that autocast made; attention in 16 bits begins with some of its own."""
    try:
        if _run(node, ()).casts == watch.casts:
            return []
    except RuntimeError:  # without autocast its inputs do not fit
        pass
    return [(value, dtype) for value, dtype in watch.casts if dtype == watch.casts[0][1]]


def _take_apart(module: fx.GraphModule, node: fx.Node, regions: Sequence[Region]) -> None:
    """Put the ops that a composite op is made of, and the casts between them, in its place."""
    sources = list(dict.fromkeys(node.all_input_nodes))

    def call(*values: Any) -> Any:
        given = dict(zip(sources, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
        return node.target(*args, **kwargs)  # pyright: ignore

    values = [source.meta["val"] for source in sources]
    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    with mode, torch.no_grad(), _entered(regions):
        inner = make_fx(call)(*values)
    made: dict[fx.Node, Any] = dict(zip((n for n in inner.graph.nodes if n.op == "placeholder"), sources, strict=True))
    results: Any = None
    with module.graph.inserting_before(node):
        for part in inner.graph.nodes:
            if part.op == "output":
                results = fx.map_arg(part.args[0], made.__getitem__)
            elif part.op == "call_function":
                made[part] = copied = module.graph.node_copy(part, made.__getitem__)
                notes = {name: node.meta[name] for name in ("nn_module_stack", "stack_trace") if name in node.meta}
                copied.meta = {**part.meta, **notes}
            elif part.op == "get_attr":
                raise CaptureError(f"{node.target} makes a constant under torch.autocast, which daggc cannot keep")
    if isinstance(results, tuple | list):
        for item in list(node.users):  # of several results, each is picked out
            item.replace_all_uses_with(results[item.args[1]])  # pyright: ignore
            module.graph.erase_node(item)
    else:
        node.replace_all_uses_with(results)
    module.graph.erase_node(node)


# --- looking on -----------------------------------------------------------------------------------------


@dataclass
class _Watch:
    """What was seen of one op.

    Attributes:
        casts: inputs that were cast before anything else was done, and to what.
        count: of casts, in it and in what it is made of.
    """

    casts: list[tuple[torch.Tensor, torch.dtype]] = field(default_factory=list)
    count: int = 0
    begun: bool = False


class _Mode(TorchDispatchMode):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is not None:
            self.watch.count += 1
            if not self.watch.begun:
                self.watch.casts.append((args[0], kwargs["dtype"]))
        elif func is not torch.ops.prim.device.default:  # only asked for
            self.watch.begun = True
        return func(*args, **kwargs)


@contextmanager
def _entered(regions: Sequence[Region]) -> Iterator[None]:
    with autocast_off(), ExitStack() as stack:
        for device, dtype, enabled in regions:
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


def _run(node: fx.Node, regions: Sequence[Region]) -> _Watch:
    watch = _Watch()
    _call(node, regions, _Mode(watch))
    return watch


def _call(node: fx.Node, regions: Sequence[Region], *modes: Any) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    fakes = [source.meta["val"] for source in node.all_input_nodes]
    mode = next((value.fake_mode for value in fakes if hasattr(value, "fake_mode")), None)
    with ExitStack() as stack:
        for context in (mode, torch.no_grad(), _entered(regions), *modes):
            if context is not None:
                stack.enter_context(context)
        return node.target(*args, **kwargs)  # pyright: ignore


def _check(node: fx.Node) -> None:
    """Refuse an op whose results have other dtypes than eager's were, with its inputs cast as it was seen."""
    wanted, got = node.meta.get("val"), _call(node, ())
    pairs = zip(wanted, got, strict=True) if isinstance(wanted, tuple | list) else ((wanted, got),)
    for expected, result in pairs:
        if isinstance(expected, torch.Tensor) and expected.dtype != result.dtype:
            raise CaptureError(
                f"{node.target} under torch.autocast gives {expected.dtype}, but {result.dtype} on the inputs that "
                "autocast casts; call it outside of the region, on tensors of the dtype it is to compute in"
            )
