"""Keep ``detach`` and ``torch.no_grad`` through functionalization, which forgets them.

``ExportedProgram.run_decompositions`` inlines no-grad regions and turns ``detach`` into an alias. Before it
runs, each becomes a call of the custom op ``daggc::stop_gradient``, which survives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from daggc.errors import CaptureError

_library = torch.library.Library("daggc", "FRAGMENT")
_library.define("stop_gradient(Tensor x) -> Tensor")


@torch.library.impl(_library, "stop_gradient", "CompositeExplicitAutograd")
def _stop_gradient(x: torch.Tensor) -> torch.Tensor:
    """Run when constants are folded during export."""
    return x.detach().clone()


@torch.library.register_fake("daggc::stop_gradient", lib=_library)
def _fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


_DETACH = (torch.ops.aten.detach.default, torch.ops.aten.detach_.default)


def mark_gradient_stops(root: fx.GraphModule) -> None:
    """Rewrite an exported graph in place. Raises CaptureError if a detached tensor is written to."""
    for module in root.modules():
        if isinstance(module, fx.GraphModule):
            for node in list(module.graph.nodes):
                if node.op == "call_function":
                    _mark(module, node)
                    _stop_writes(module, node)
            _refuse_writes(module)
            module.recompile()


def _mark(module: fx.GraphModule, node: fx.Node) -> None:
    if node.target in _DETACH:
        node.target = torch.ops.daggc.stop_gradient.default
    if _is_no_grad(node):
        for item in list(node.users):
            if _is_differentiable(item):
                _stop_after(module, item)


def _stop_after(module: fx.GraphModule, node: fx.Node) -> None:
    with module.graph.inserting_after(node):
        stop = module.graph.call_function(torch.ops.daggc.stop_gradient.default, (node,))
    stop.meta = dict(node.meta)
    node.replace_all_uses_with(stop, delete_user_cb=lambda user: user is not stop)


def _refuse_writes(module: fx.GraphModule) -> None:
    """In eager a detached tensor shares memory with its source; the marked one does not."""
    for node in module.graph.nodes:
        written = node.args[0] if node.args else None
        if node.target is torch.ops.aten.embedding_renorm_.default:
            raise CaptureError(
                "an embedding with max_norm rewrites its weight in forward; scale the weight after each optimizer step"
            )
        if _is_write(node) and _views_a_stop(written):
            raise CaptureError(
                f"{node.target} writes in place to a tensor that was detached or made under torch.no_grad(); "
                "clone it before writing"
            )


def _stop_writes(module: fx.GraphModule, region: fx.Node) -> None:
    """What is written in place under no_grad has no gradient, in tensors made outside (buffers, say) as well.

    Raises CaptureError if such a tensor has a gradient itself: eager would leave it as it was before the write.
    """
    if not _is_no_grad(region):
        return
    body = getattr(module, str(region.args[1].target))  # pyright: ignore  # a get_attr node
    operands = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), region.args[2:], strict=True))
    for node in [node for node in body.graph.nodes if _is_write(node)]:
        outer = _base(operands.get(_base(node.args[0])))  # pyright: ignore[reportArgumentType]
        if isinstance(outer, fx.Node) and _has_gradient(outer):
            raise CaptureError(
                f"{node.target} writes in place, under torch.no_grad(), to a tensor that has a gradient, which daggc "
                "cannot keep; write outside of torch.no_grad(), or to a detached clone"
            )
        for source in {arg for arg in node.args[1:] if isinstance(arg, fx.Node) and _is_differentiable(arg)}:
            with body.graph.inserting_before(node):
                stop = body.graph.call_function(torch.ops.daggc.stop_gradient.default, (source,))
            stop.meta = dict(source.meta)
            node.replace_input_with(source, stop)
    body.recompile()


def _is_differentiable(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _is_no_grad(node: fx.Node) -> bool:
    target = node.target
    region = isinstance(target, torch._ops.HigherOrderOperator) and target.name() == "wrap_with_set_grad_enabled"
    return region and node.args[0] is False


def _is_write(node: Any) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _base(node: Any) -> Any:
    """What a tensor is a view of."""
    while (
        isinstance(node, fx.Node)
        and isinstance(node.target, torch._ops.OpOverload)
        and any(argument.alias_info is not None for argument in node.target._schema.arguments)
        and node.args
    ):
        node = node.args[0]
    return node


def _has_gradient(node: fx.Node) -> bool:
    if node.op == "placeholder":
        return bool(getattr(node.meta.get("val"), "requires_grad", False))
    meta = node.meta.get("tensor_meta")
    return meta is None or bool(getattr(meta, "requires_grad", True))


def _views_a_stop(node: Any) -> bool:
    while isinstance(node, fx.Node) and isinstance(node.target, torch._ops.OpOverload):
        if node.target is torch.ops.daggc.stop_gradient.default:
            return not _fresh(node.args[0])
        if not any(a.alias_info is not None for a in node.target._schema.arguments):
            return False
        node = node.args[0] if node.args else None
    return False


def _fresh(node: Any) -> bool:
    """Whether a node's tensor has memory of its own: a constant made in place, or the result of a computation."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    aliases = any(a.alias_info is not None for a in node.target._schema.arguments)
    return not aliases and len(node.users) == 1
