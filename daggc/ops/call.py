"""Ops that lead out of the portable set or hold a plan together: call, transfer, torch.call, python.call.

``call`` runs another graph of the program; in a placed graph its results are on its device. ``transfer``
moves a value. ``torch.call`` runs any ATen op and ``python.call`` a registered Python function; what they
give is declared in ``dtypes`` and ``shapes``, trusted where torch is absent and checked where it is present.
Their VJPs are ops of the same kind: torch runs the derivative on the worker, recomputing the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from daggc.errors import RunError, located
from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.opdef import (
    AS_IT_IS,
    NOT_DIFFERENTIABLE,
    Cost,
    OpDef,
    node_bytes,
    out_numel,
    register,
    require,
    same_axes,
    view_cost,
    whole,
)


def declared_types(attrs: Attrs) -> tuple[TensorType, ...]:
    """Output types from the ``dtypes`` and ``shapes`` attributes."""
    require(len(attrs["dtypes"]) == len(attrs["shapes"]), "as many dtypes as shapes are required")
    return tuple(TensorType(dtype, shape) for dtype, shape in zip(attrs["dtypes"], attrs["shapes"], strict=True))


def declare(types: Sequence[TensorType]) -> dict[str, Any]:
    """The attributes that :func:`declared_types` reads."""
    return {"dtypes": tuple(type_.dtype for type_ in types), "shapes": tuple(type_.shape for type_ in types)}


def _infer_call(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    require(isinstance(attrs["callee"], str), "callee names a graph of the program")
    device = attrs.get("device")
    for type_ in inputs:
        require(type_.device == device, f"an input is on {type_.device}, the call on {device}; transfer it")
    return tuple(type_.with_(device=device) for type_ in declared_types(attrs))


def _infer_transfer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    require(x.device is not None, "what is transferred is on a device")
    require(isinstance(attrs["device"], str), "device names where the value goes")
    return (x.with_(device=attrs["device"]),)


def _infer_declared(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    require(isinstance(attrs["target"], str), "target names the op or function")
    return declared_types(attrs)


def _not_portable(node: Node, *arrays: object) -> NoReturn:
    raise RunError(
        located(
            f"{node.op} {{target={node.attrs.get('target')!r}}} needs torch: the interpreter runs portable ops only",
            node.path,
            node.source,
        )
    )


def _by_program(node: Node, *arrays: object) -> NoReturn:
    raise RunError("a call is run by whatever has the program (the interpreter, a backend): it means nothing alone")


def _opaque_cost(node: Node) -> Cost:
    """Nothing is known of it: as if it read and wrote each element once, at 100 FLOPs an element of its result."""
    return Cost(100.0 * out_numel(node), node_bytes(node), "opaque")


def _opaque_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    """A node of the same op with ``vjp=True``: inputs, then cotangents; gives cotangents of the float inputs.

    ``given`` says which outputs had a cotangent, so that torch is not handed zeros for the others.
    """
    differentiable = [index for index, value in enumerate(node.inputs) if value.type.differentiable]
    if node.attrs.get("vjp"):
        raise RunError(located(f"{node.op}: a second derivative is not available", node.path, node.source))
    given = [ct for ct in cts if ct is not None]
    attrs = {
        **node.attrs,
        **declare([node.inputs[index].type for index in differentiable]),
        "vjp": True,
        "given": tuple(index for index, ct in enumerate(cts) if ct is not None),
        "operands": len(node.inputs),
    }
    results = b.emit_many(node.op, *node.inputs, *given, **attrs)
    cotangents: list[Value | None] = [None] * len(node.inputs)
    for index, result in zip(differentiable, results, strict=True):
        cotangents[index] = result
    return cotangents


def _lower_door(function: str):
    def lower(node: Node, args: Sequence[str]) -> str:
        names = ("target", "args", "vjp", "given", "operands", "dtypes", "shapes")
        options = {name: node.attrs[name] for name in names if name in node.attrs}
        return f"kernels.{function}(({', '.join(args)}{',' if args else ''}), {options!r})" + (
            "[0]" if len(node.outputs) == 1 else ""
        )

    return lower


register(
    OpDef(
        name="call",
        infer=_infer_call,
        evaluate=_by_program,
        vjp=NOT_DIFFERENTIABLE,
        cost=lambda node: Cost(0, node_bytes(node), "opaque"),
        axes=whole,
        lower=_by_program,
        aten={},
        samples=(),
    )
)
register(
    OpDef(
        name="transfer",
        infer=_infer_transfer,
        evaluate=lambda node, x: x,
        vjp=NOT_DIFFERENTIABLE,
        cost=view_cost,
        axes=same_axes,
        lower=lambda node, args: args[0],
        aten={},
        samples=(),
    )
)
for _name, _function in (("torch.call", "torch_call"), ("python.call", "python_call")):
    register(
        OpDef(
            name=_name,
            infer=_infer_declared,
            evaluate=_not_portable,
            vjp=_opaque_vjp,
            complex=AS_IT_IS,
            cost=_opaque_cost,
            axes=whole,
            lower=_lower_door(_function),
            aten={},
            samples=(),
        )
    )
