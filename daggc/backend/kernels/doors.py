"""The two doors at run time: any op of torch, any registered Python function, and their derivatives.

A derivative recomputes the forward with autograd on, then runs torch's backward (or the user's own, for an
``autograd.Function``): stateless, so a task may run it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from daggc.errors import RunError
from daggc.frontend.dtypes import ir_type
from daggc.frontend.opaque import call_registered
from daggc.ir.types import TensorType

Options = Mapping[str, Any]


def torch_call(args: Sequence[torch.Tensor], options: Options) -> tuple[torch.Tensor, ...]:
    """Run the ATen (or custom) op ``options["target"]``, as ``aten.cumsum.default``.

    ``options["args"]`` is ``[positional, [[name, value], ...]]`` with ``%0`` for the first tensor.
    """
    namespace, name, overload = options["target"].split(".")
    op = getattr(getattr(getattr(torch.ops, namespace), name), overload)

    def run(tensors: Sequence[torch.Tensor]) -> Any:
        positional, named = options["args"]
        return op(*_fill(positional, tensors), **{key: _fill_one(value, tensors) for key, value in named})

    return _run(run, args, options)


def python_call(args: Sequence[torch.Tensor], options: Options) -> tuple[torch.Tensor, ...]:
    """Run the function registered under ``options["target"]``, with arguments as in :func:`torch_call`."""
    versions = [arg._version for arg in args]
    results = _run(lambda tensors: call_registered(options["target"], options["args"], tensors), args, options)
    if versions != [arg._version for arg in args]:
        raise RunError(f"{options['target']!r} wrote to one of its inputs; an opaque function must not: clone it first")
    return results


def _run(run: Callable[[Sequence[torch.Tensor]], Any], args: Sequence[torch.Tensor], options: Options):
    if not options.get("vjp"):
        return _checked(_flat(run(args)), options)
    inputs, cotangents = args[: options["operands"]], args[options["operands"] :]
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(x.is_floating_point() or x.is_complex()) for x in inputs]
        # An in-place function may not write to a leaf: it gets a view of it, as it would inside a model.
        outputs = _flat(run([leaf.view_as(leaf) for leaf in leaves]))
        pairs = [
            (outputs[index], ct)
            for index, ct in zip(options["given"], cotangents, strict=True)
            if outputs[index].requires_grad
        ]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(leaf) for leaf in wanted)
        gradients = torch.autograd.grad([y for y, _ in pairs], wanted, [ct for _, ct in pairs], allow_unused=True)
    zeros_for_unused = (
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(wanted, gradients, strict=True)
    )
    return _checked(tuple(zeros_for_unused), options)


def _checked(outputs: tuple[torch.Tensor, ...], options: Options) -> tuple[torch.Tensor, ...]:
    """The outputs. Raises RunError if they are not what the program declares."""
    declared = tuple(TensorType(*pair) for pair in zip(options["dtypes"], options["shapes"], strict=True))
    got = tuple(ir_type(output) for output in outputs)
    if got != declared:
        raise RunError(
            f"{options['target']!r} was declared to give ({', '.join(map(str, declared))}), "
            f"it gave ({', '.join(map(str, got))})"
        )
    return tuple(output.detach() for output in outputs)


def _flat(result: Any) -> tuple[torch.Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _fill(items: Sequence[Any], tensors: Sequence[torch.Tensor]) -> list[Any]:
    return [_fill_one(item, tensors) for item in items]


def _fill_one(item: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """Put tensors and dtypes back in the place of their text forms."""
    if isinstance(item, str) and item.startswith("%"):
        return tensors[int(item[1:])]
    if isinstance(item, str) and item.startswith("torch."):
        return getattr(torch, item.removeprefix("torch."))
    return _fill(item, tensors) if isinstance(item, tuple | list) else item
