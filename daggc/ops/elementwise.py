"""How elementwise ops are defined: one call of :func:`unary` or :func:`binary` registers an op whole.

Operations with a Python scalar are ops of their own (``add_scalar``): torch computes them without rounding
the scalar to a 16-bit dtype first, and without reading a second tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import (
    Operand,
    broadcast_together,
    cast,
    full,
    kind,
    result_dtype,
    zeros_like,
)
from daggc.ops.opdef import (
    HOLOMORPHIC,
    VJP,
    Arg,
    ComplexRule,
    Derivative,
    Importer,
    OpDef,
    Sample,
    elementwise_cost,
    register,
    require,
    same_axes,
    sample,
    scalar,
    t,
    upcast,
)

# (builder, node, ct) -> the cotangent of the one input; or piecewise_constant
ScalarRule = Callable[..., Any]


def same_types(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    """All inputs and the one output have one type."""
    require(len(set(inputs)) == 1, "inputs of one type are required (cast and broadcast are ops)")
    return (inputs[0],)


def to_bool(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    """Inputs of one type; a bool for each element."""
    return (same_types(inputs, attrs)[0].with_(dtype="bool"),)


def _arity(count: int, rule: Callable) -> Callable:
    def infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        require(len(inputs) == count, f"{count} inputs are required, got {len(inputs)}")
        return rule(inputs, attrs)

    return infer


_KIND_NAMES = {"b": "bool", "i": "integer", "f": "float", "c": "complex"}


def of_kinds(kinds: str, rule: Callable) -> Callable:
    """A type rule for inputs of some kinds of dtype only: a string of ``b``, ``i``, ``f``, ``c``."""

    def infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        wanted = " or ".join(_KIND_NAMES[letter] for letter in kinds)
        require(all(kind(x.dtype) in kinds for x in inputs), f"inputs of a {wanted} dtype are required")
        return rule(inputs, attrs)

    return infer


def not_half(rule: Callable) -> Callable:
    """A type rule without f16 and bf16, for which torch has no kernel."""

    def infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        require(all(x.dtype not in ("f16", "bf16") for x in inputs), "inputs of f32 or f64 are required")
        return rule(inputs, attrs)

    return infer


def _samples(shapes: Sequence[tuple[int, ...]], count: int, kinds: str, domain: str, **attrs: Attr) -> list[Sample]:
    """``count`` inputs of each shape: f64, or bool and i64 for ops of bits."""
    if "f" in kinds:
        return [sample(*[shape] * count, domain=domain, **attrs) for shape in shapes]
    return [
        Sample((Arg(t(*shape, dtype=dtype), kind_domain),) * count, attrs)
        for shape in shapes
        for dtype, kind_domain in (("bool", "bool"), ("i64", "small"))
        if kind(dtype) in kinds
    ]


def one_input(rule: Callable[[Builder, Node, Value], Value | None]) -> VJP:
    """The VJP rule of an op of one input and one output, from ``(builder, node, ct) -> ct of the input``."""

    def vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
        (ct,) = cts
        assert ct is not None, "a rule is asked only when the output has a cotangent"
        return (rule(b, node, ct),)

    return vjp


def _import_unary(op: str, to_float: bool) -> Importer:
    def importer(b: Builder, x: Value, **_: Any) -> Value:
        if to_float and not x.type.differentiable:
            x = cast(b, x, "f32")
        return b.emit(op, x)

    return importer


def unary(
    name: str,
    function: Callable[[np.ndarray], np.ndarray],
    vjp: ScalarRule | Derivative,
    lower: str | None = None,
    *,
    flops: float = 1,
    domain: str = "real",
    predicate: bool = False,
    to_float: bool = True,
    kinds: str = "",
    aten: Sequence[str] | None = None,
    shapes: Sequence[tuple[int, ...]] = ((3, 4), (), (2, 1, 5)),
    half: bool = True,
    complex_rule: ComplexRule = HOLOMORPHIC,
) -> None:
    """Register ``y = name(x)``. ``vjp(builder, node, ct)`` gives the cotangent of x.

    ``to_float``: integers are cast to f32 first, as torch does for functions of real numbers.
    ``kinds``: see :func:`of_kinds`; by default floats and complex numbers, and integers unless ``to_float``.
    ``shapes``: of the samples. ``half``: whether torch has kernels for f16 and bf16.
    """
    kinds = kinds or ("fc" if to_float else "ifc")
    rule = vjp if isinstance(vjp, Derivative) or vjp is piecewise_constant else one_input(vjp)
    types = of_kinds(kinds, to_bool if predicate else same_types)
    register(
        OpDef(
            name=name,
            infer=_arity(1, types if half else not_half(types)),
            evaluate=upcast(lambda node, x: function(x)),
            vjp=rule,
            cost=elementwise_cost(flops),
            axes=same_axes,
            lower=lambda node, args: f"{lower or f'torch.{name}'}({args[0]})",
            aten={overload: _import_unary(name, to_float) for overload in aten or (f"{name}.default",)},
            samples=_samples(shapes, 1, kinds, domain),
            complex=complex_rule,
        )
    )


_REVERSED = ("sub", "div", "pow")  # those with an op for a scalar as the first operand


def import_binary(op: str, operand_dtype: Callable[[str], str], commutes: bool, with_scalar: bool = True) -> Importer:
    """Promote, broadcast, and choose between the op of two tensors and, if there is one, the op with a scalar."""

    def importer(b: Builder, x: Operand, y: Operand, **_: Any) -> Value:
        dtype = operand_dtype(result_dtype(x, y))
        if isinstance(x, Value) and isinstance(y, Value):
            return b.emit(op, *broadcast_together(b, cast(b, x, dtype), cast(b, y, dtype)))
        if isinstance(x, Value):
            assert not isinstance(y, Value)  # it would have been met above
            if not with_scalar:
                return b.emit(op, cast(b, x, dtype), full(b, y, x.type.shape, dtype))
            return b.emit(f"{op}_scalar", cast(b, x, dtype), value=y)
        assert isinstance(y, Value), "one operand is a tensor"
        if commutes:
            return b.emit(f"{op}_scalar", cast(b, y, dtype), value=x)
        if op in _REVERSED:
            return b.emit(f"r{op}_scalar", cast(b, y, dtype), value=x)
        return b.emit(op, full(b, x, y.type.shape, dtype), cast(b, y, dtype))

    return importer


def keep(dtype: str) -> str:
    return dtype


def floating(dtype: str) -> str:
    """True division of integers is done in the default float."""
    return dtype if kind(dtype) in "fc" else "f32"


def binary(
    name: str,
    function: Callable[[np.ndarray, Any], np.ndarray],
    vjp: VJP | Derivative,
    scalar_vjp: ScalarRule | Derivative,
    lower: str,
    *,
    flops: float = 1,
    domain: str = "real",
    predicate: bool = False,
    commutes: bool = False,
    with_scalar: bool = True,
    kinds: str = "bifc",
    operand_dtype: Callable[[str], str] = keep,
    aten: Sequence[str] | None = None,
    importers: Mapping[str, Importer] | None = None,
    shapes: Sequence[tuple[int, ...]] = ((3, 4), ()),
    half: bool = True,
    complex_rule: ComplexRule = HOLOMORPHIC,
) -> None:
    """Register ``name(x, y)`` and ``name_scalar(x) {value}``. ``lower`` is a format of ``{0}`` and ``{1}``.

    ``kinds``: see :func:`of_kinds`; ``shapes`` and ``half``: see :func:`unary`.
    """
    rule = to_bool if predicate else same_types
    importer = import_binary(name, operand_dtype, commutes and with_scalar, with_scalar)
    overloads = (f"{name}.Tensor", f"{name}.Scalar") if aten is None else aten
    register(
        OpDef(
            name=name,
            infer=_arity(2, of_kinds(kinds, rule) if half else not_half(of_kinds(kinds, rule))),
            evaluate=upcast(lambda node, x, y: function(x, y)),
            vjp=vjp,
            cost=elementwise_cost(flops),
            axes=same_axes,
            lower=lambda node, args: lower.format(*args),
            aten=dict.fromkeys(overloads, importer) if importers is None else importers,
            samples=_samples(shapes, 2, kinds, domain),
            complex=complex_rule,
        )
    )
    if with_scalar:
        value = True if domain == "bool" else 2.5
        register_scalar(
            name, function, scalar_vjp, lower, rule, flops, domain, value, kinds=kinds, complex_rule=complex_rule
        )


def register_scalar(
    name: str,
    function: Callable[[np.ndarray, Any], np.ndarray],
    vjp: ScalarRule | Derivative,
    lower: str,
    rule: Callable = same_types,
    flops: float = 1,
    domain: str = "real",
    value: float = 2.5,
    prefix: str = "",
    kinds: str = "bifc",
    complex_rule: ComplexRule = HOLOMORPHIC,
) -> None:
    """Register ``name_scalar(x) {value}``; with prefix ``r`` the scalar is the first operand."""

    def infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        value = attrs["value"]
        require(isinstance(value, bool | int | float | complex), f"value is a number, got {value!r}")
        fits = kind(inputs[0].dtype) in {bool: "bifc", int: "ifc", float: "fc", complex: "c"}[type(value)]
        require(fits, f"value={value!r} would change the dtype {inputs[0].dtype}; cast first")
        return _arity(1, of_kinds(kinds, rule))(inputs, attrs)

    register(
        OpDef(
            name=f"{prefix}{name}_scalar",
            infer=infer,
            evaluate=upcast(lambda node, x: function(x, weak(node.attrs["value"], x.dtype))),
            vjp=vjp if isinstance(vjp, Derivative) or vjp is piecewise_constant else one_input(vjp),
            cost=elementwise_cost(flops),
            axes=same_axes,
            lower=lambda node, args: lower.format(args[0], scalar(node.attrs["value"])),
            aten={},
            samples=_samples(((3, 4), ()), 1, kinds, domain, value=value),
            complex=complex_rule,
        )
    )


def weak(value: complex, dtype: np.dtype) -> Any:
    """A scalar of an array's dtype (NumPy and torch agree on values that fit)."""
    return np.asarray(value).astype(dtype)[()]


def piecewise_constant(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    """The VJP rule of rounding, signs and the like: zeros, as autograd has it, and not the absence of a gradient."""
    return tuple(zeros_like(b, value) if value.type.differentiable else None for value in node.inputs)


def where_zero(b: Builder, mask: Value, ct: Value) -> Value:
    """``ct`` where the mask holds, zero elsewhere."""
    return b.emit("where_scalar", mask, ct, value=0.0)
