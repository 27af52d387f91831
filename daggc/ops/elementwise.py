"""Arithmetic, comparisons and logic, element by element; inputs have one shape and, mostly, one dtype.

Operations with a Python scalar are ops of their own (``add_scalar``): torch computes them without rounding
the scalar to a 16-bit dtype first, and without reading a second tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import DTYPES, TensorType
from daggc.ops.build import (
    Operand,
    Scalar,
    broadcast_together,
    cast,
    full,
    kind,
    mul,
    neg,
    result_dtype,
    scale,
)
from daggc.ops.opdef import (
    NOT_DIFFERENTIABLE,
    VJP,
    Arg,
    Axes,
    Derivative,
    Importer,
    OpDef,
    Sample,
    copy_cost,
    elementwise_cost,
    letters,
    register,
    require,
    same_axes,
    sample,
    scalar,
    t,
    torch_dtype,
    upcast,
)

# --- type rules ---------------------------------------------------------------------------------------


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


def _samples(shapes: Sequence[tuple[int, ...]], count: int, kinds: str, domain: str, **attrs: Attr) -> list[Sample]:
    """``count`` inputs of each shape: f64, or bool and i64 for ops of bits."""
    if "f" in kinds:
        return [sample(*[shape] * count, domain=domain, **attrs) for shape in shapes]
    return [
        Sample((Arg(t(*shape, dtype=dtype), kind_domain),) * count, attrs)
        for shape in shapes
        for dtype, kind_domain in (("bool", "bool"), ("i64", "small"))
    ]


def one_input(rule: Callable[[Builder, Node, Value], Value | None]) -> VJP:
    """The VJP rule of an op of one input and one output, from ``(builder, node, ct) -> ct of the input``."""

    def vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
        (ct,) = cts
        assert ct is not None, "a rule is asked only when the output has a cotangent"
        return (rule(b, node, ct),)

    return vjp


# --- unary --------------------------------------------------------------------------------------------


def _import_unary(op: str, to_float: bool) -> Importer:
    def importer(b: Builder, x: Value, **_: Any) -> Value:
        if to_float and not x.type.differentiable:
            x = cast(b, x, "f32")
        return b.emit(op, x)

    return importer


def unary(
    name: str,
    function: Callable[[np.ndarray], np.ndarray],
    vjp: Callable[[Builder, Node, Value], Value] | Derivative,
    lower: str | None = None,
    *,
    flops: float = 1,
    domain: str = "real",
    predicate: bool = False,
    to_float: bool = True,
    kinds: str = "",
    aten: Sequence[str] | None = None,
) -> None:
    """Register ``y = name(x)``. ``vjp(builder, node, ct)`` gives the cotangent of x.

    ``to_float``: integers are cast to f32 first, as torch does for functions of real numbers.
    ``kinds``: see :func:`of_kinds`; by default floats and complex numbers, and integers unless ``to_float``.
    """
    kinds = kinds or ("fc" if to_float else "ifc")
    rule = vjp if isinstance(vjp, Derivative) else one_input(vjp)
    register(
        OpDef(
            name=name,
            infer=_arity(1, of_kinds(kinds, to_bool if predicate else same_types)),
            evaluate=upcast(lambda node, x: function(x)),
            vjp=rule,
            cost=elementwise_cost(flops),
            axes=same_axes,
            lower=lambda node, args: f"{lower or f'torch.{name}'}({args[0]})",
            aten={overload: _import_unary(name, to_float) for overload in aten or (f"{name}.default",)},
            samples=_samples(((3, 4), (), (2, 1, 5)), 1, kinds, domain),
        )
    )


def _square(b: Builder, x: Value) -> Value:
    return mul(b, x, x)


def _one_minus(b: Builder, x: Value) -> Value:
    return b.emit("add_scalar", neg(b, x), value=1)


unary("neg", np.negative, lambda b, n, ct: neg(b, ct), to_float=False)
unary(
    "abs",
    np.abs,
    lambda b, n, ct: mul(b, ct, b.emit("sign", n.inputs[0])),
    domain="nonzero",
    to_float=False,
    kinds="if",
)
unary(
    "sign",
    lambda x: np.where(x == x, np.sign(x), 0),  # torch's sign of NaN is 0
    NOT_DIFFERENTIABLE,
    to_float=False,
    kinds="if",
    domain="nonzero",
    aten=("sign.default", "sgn.default"),
)
unary("exp", np.exp, lambda b, n, ct: mul(b, ct, n.output), flops=8)
unary(
    "exp2",
    np.exp2,
    lambda b, n, ct: mul(b, ct, scale(b, n.output, float(np.log(2)))),
    flops=8,
    kinds="f",
)
unary("expm1", np.expm1, lambda b, n, ct: mul(b, ct, b.emit("add_scalar", n.output, value=1)), flops=8)
unary("log", np.log, lambda b, n, ct: b.emit("div", ct, n.inputs[0]), flops=8, domain="positive")
unary(
    "log2",
    np.log2,
    lambda b, n, ct: b.emit("div", ct, scale(b, n.inputs[0], float(np.log(2)))),
    flops=8,
    domain="positive",
)
unary(
    "log1p",
    np.log1p,
    lambda b, n, ct: b.emit("div", ct, b.emit("add_scalar", n.inputs[0], value=1)),
    flops=8,
    domain="positive",
)
unary("sqrt", np.sqrt, lambda b, n, ct: b.emit("div", ct, scale(b, n.output, 2)), flops=4, domain="positive")
unary(
    "rsqrt",
    lambda x: 1 / np.sqrt(x),
    lambda b, n, ct: mul(b, scale(b, ct, -0.5), b.emit("pow_scalar", n.output, value=3)),
    flops=5,
    domain="positive",
)
unary(
    "reciprocal",
    np.reciprocal,
    lambda b, n, ct: neg(b, mul(b, ct, _square(b, n.output))),
    domain="positive",
)
unary("sin", np.sin, lambda b, n, ct: mul(b, ct, b.emit("cos", n.inputs[0])), flops=8)
unary("cos", np.cos, lambda b, n, ct: mul(b, ct, neg(b, b.emit("sin", n.inputs[0]))), flops=8)
unary("tan", np.tan, lambda b, n, ct: mul(b, ct, b.emit("add_scalar", _square(b, n.output), value=1)), flops=8)
unary(
    "atan",
    np.arctan,
    lambda b, n, ct: b.emit("div", ct, b.emit("add_scalar", _square(b, n.inputs[0]), value=1)),
    flops=8,
)
unary("sinh", np.sinh, lambda b, n, ct: mul(b, ct, b.emit("cosh", n.inputs[0])), flops=8)
unary("cosh", np.cosh, lambda b, n, ct: mul(b, ct, b.emit("sinh", n.inputs[0])), flops=8)
unary(
    "erf",
    special.erf,
    lambda b, n, ct: mul(b, ct, scale(b, b.emit("exp", neg(b, _square(b, n.inputs[0]))), float(2 / np.sqrt(np.pi)))),
    flops=12,
    kinds="f",
)
unary("floor", np.floor, NOT_DIFFERENTIABLE, to_float=False, kinds="if")
unary("ceil", np.ceil, NOT_DIFFERENTIABLE, to_float=False, kinds="if")
unary("trunc", np.trunc, NOT_DIFFERENTIABLE, to_float=False, kinds="if")
unary("round", np.round, NOT_DIFFERENTIABLE, to_float=False, kinds="if")
unary("isnan", np.isnan, NOT_DIFFERENTIABLE, predicate=True, to_float=False, kinds="bifc")
unary("isinf", np.isinf, NOT_DIFFERENTIABLE, predicate=True, to_float=False, kinds="bifc")
unary("logical_not", np.logical_not, NOT_DIFFERENTIABLE, predicate=True, to_float=False, kinds="bifc")
unary("bitwise_not", np.invert, NOT_DIFFERENTIABLE, to_float=False, kinds="bi")


# --- binary -------------------------------------------------------------------------------------------


def _import_binary(op: str, operand_dtype: Callable[[str], str], commutes: bool) -> Importer:
    """Promote, broadcast, and choose between the op of two tensors and the op with a scalar."""

    def importer(b: Builder, x: Operand, y: Operand, **_: Any) -> Value:
        dtype = operand_dtype(result_dtype(x, y))
        if isinstance(x, Value) and isinstance(y, Value):
            return b.emit(op, *broadcast_together(b, cast(b, x, dtype), cast(b, y, dtype)))
        if isinstance(x, Value):
            return b.emit(f"{op}_scalar", cast(b, x, dtype), value=y)
        assert isinstance(y, Value), "one operand is a tensor"
        if commutes:
            return b.emit(f"{op}_scalar", cast(b, y, dtype), value=x)
        return b.emit(f"r{op}_scalar", cast(b, y, dtype), value=x)

    return importer


def _keep(dtype: str) -> str:
    return dtype


def _floating(dtype: str) -> str:
    """True division of integers is done in the default float."""
    return dtype if kind(dtype) in "fc" else "f32"


def binary(
    name: str,
    function: Callable[[np.ndarray, Any], np.ndarray],
    vjp: VJP | Derivative,
    scalar_vjp: Callable[[Builder, Node, Value], Value | None] | Derivative,
    lower: str,
    *,
    flops: float = 1,
    domain: str = "real",
    predicate: bool = False,
    commutes: bool = False,
    with_scalar: bool = True,
    kinds: str = "bifc",
    operand_dtype: Callable[[str], str] = _keep,
    aten: Sequence[str] | None = None,
    importers: Mapping[str, Importer] | None = None,
) -> None:
    """Register ``name(x, y)`` and ``name_scalar(x) {value}``. ``lower`` is a format of ``{0}`` and ``{1}``.

    ``kinds``: see :func:`of_kinds`.
    """
    rule = to_bool if predicate else same_types
    importer = _import_binary(name, operand_dtype, commutes)
    overloads = (f"{name}.Tensor", f"{name}.Scalar") if aten is None else aten
    register(
        OpDef(
            name=name,
            infer=_arity(2, of_kinds(kinds, rule)),
            evaluate=upcast(lambda node, x, y: function(x, y)),
            vjp=vjp,
            cost=elementwise_cost(flops),
            axes=same_axes,
            lower=lambda node, args: lower.format(*args),
            aten=dict.fromkeys(overloads, importer) if importers is None else importers,
            samples=_samples(((3, 4), ()), 2, kinds, domain),
        )
    )
    if with_scalar:
        value = True if domain == "bool" else 2.5
        register_scalar(name, function, scalar_vjp, lower, rule, flops, domain, value, kinds=kinds)


def register_scalar(
    name: str,
    function: Callable[[np.ndarray, Any], np.ndarray],
    vjp: Callable[[Builder, Node, Value], Value | None] | Derivative,
    lower: str,
    rule: Callable = same_types,
    flops: float = 1,
    domain: str = "real",
    value: float = 2.5,
    prefix: str = "",
    kinds: str = "bifc",
) -> None:
    """Register ``name_scalar(x) {value}``; with prefix ``r`` the scalar is the first operand."""

    def infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        value = attrs["value"]
        require(isinstance(value, bool | int | float), f"value is a number, got {value!r}")
        fits = kind(inputs[0].dtype) in {bool: "bifc", int: "ifc", float: "fc"}[type(value)]
        require(fits, f"value={value!r} would change the dtype {inputs[0].dtype}; cast first")
        return _arity(1, of_kinds(kinds, rule))(inputs, attrs)

    register(
        OpDef(
            name=f"{prefix}{name}_scalar",
            infer=infer,
            evaluate=upcast(lambda node, x: function(x, _weak(node.attrs["value"], x.dtype))),
            vjp=vjp if isinstance(vjp, Derivative) else one_input(vjp),
            cost=elementwise_cost(flops),
            axes=same_axes,
            lower=lambda node, args: lower.format(args[0], scalar(node.attrs["value"])),
            aten={},
            samples=_samples(((3, 4), ()), 1, kinds, domain, value=value),
        )
    )


def _weak(value: float, dtype: np.dtype) -> Any:
    """A scalar of an array's dtype (NumPy and torch agree on values that fit)."""
    return np.asarray(value).astype(dtype)[()]


def _where_zero(b: Builder, mask: Value, ct: Value) -> Value:
    """``ct`` where the mask holds, zero elsewhere."""
    return b.emit("where_scalar", mask, ct, value=0.0)


def _extremum_vjp(wins: str) -> VJP:
    """Ties share the cotangent in halves, as in torch."""

    def vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
        (ct,), (x, y) = cts, node.inputs
        assert ct is not None
        share = b.emit("where", b.emit("eq", x, y), scale(b, ct, 0.5), ct)
        first = _where_zero(b, b.emit("logical_not", b.emit(wins, y, x)), share)
        second = _where_zero(b, b.emit("logical_not", b.emit(wins, x, y)), share)
        return first, second

    return vjp


def _add_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    return cts[0], cts[0]


def _sub_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,) = cts
    assert ct is not None
    return ct, neg(b, ct)


def _mul_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,), (x, y) = cts, node.inputs
    assert ct is not None
    return mul(b, ct, y), mul(b, ct, x)


def _div_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,), y = cts, node.inputs[1]
    assert ct is not None
    return b.emit("div", ct, y), neg(b, mul(b, ct, b.emit("div", node.output, y)))


def _pow_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    """torch's pow_backward: zero where the exponent is zero, and for 0 ** y with y >= 0."""
    (ct,), (x, y) = cts, node.inputs
    assert ct is not None
    slope = mul(b, y, b.emit("pow", x, b.emit("add_scalar", y, value=-1)))
    first = _where_zero(b, b.emit("ne_scalar", y, value=0), mul(b, ct, slope))
    zero = b.emit("logical_and", b.emit("eq_scalar", x, value=0), b.emit("ge_scalar", y, value=0))
    second = mul(b, ct, mul(b, node.output, b.emit("log", x)))
    return first, _where_zero(b, b.emit("logical_not", zero), second)


def _pow_scalar_vjp(b: Builder, node: Node, ct: Value) -> Value:
    exponent = node.attrs["value"]
    if exponent == 0:
        return scale(b, ct, 0)
    return mul(b, ct, scale(b, b.emit("pow_scalar", node.inputs[0], value=exponent - 1), exponent))


def _above(b: Builder, node: Node, ct: Value) -> Value:
    return _where_zero(b, b.emit("ge_scalar", node.inputs[0], value=node.attrs["value"]), ct)


def _below(b: Builder, node: Node, ct: Value) -> Value:
    return _where_zero(b, b.emit("le_scalar", node.inputs[0], value=node.attrs["value"]), ct)


def _import_scaled(op: str) -> Importer:
    """add and sub multiply their second operand by ``alpha`` first."""
    plain = _import_binary(op, _keep, commutes=True)

    def importer(b: Builder, x: Operand, y: Operand, *rest: Any, alpha: float = 1, **_: Any) -> Value:
        alpha = rest[0] if rest else alpha
        if alpha != 1:
            y = scale(b, cast(b, y, result_dtype(x, y)), alpha) if isinstance(y, Value) else y * alpha
        if op == "sub" and not isinstance(x, Value):
            assert isinstance(y, Value)
            return plain_add(b, neg(b, y), x)
        return plain(b, x, y)

    plain_add = _import_binary("add", _keep, commutes=True)
    return importer


def _import_rsub(b: Builder, x: Value, y: Operand, alpha: float = 1, **_: Any) -> Value:
    """``y - alpha * x``; the negation is exact, so nothing is rounded twice."""
    return _import_scaled("add")(b, neg(b, scale(b, x, alpha)), y)


binary(
    "add",
    np.add,
    _add_vjp,
    lambda b, n, ct: ct,
    "{0} + {1}",
    importers=dict.fromkeys(("add.Tensor", "add.Scalar"), _import_scaled("add")),
)
binary(
    "sub",
    np.subtract,
    _sub_vjp,
    lambda b, n, ct: ct,
    "{0} - {1}",
    kinds="ifc",
    importers={
        "sub.Tensor": _import_scaled("sub"),
        "sub.Scalar": _import_scaled("sub"),
        "rsub.Scalar": _import_rsub,
        "rsub.Tensor": _import_rsub,
    },
)
binary("mul", np.multiply, _mul_vjp, lambda b, n, ct: scale(b, ct, n.attrs["value"]), "{0} * {1}", commutes=True)
binary(
    "div",
    np.divide,
    _div_vjp,
    lambda b, n, ct: b.emit("div_scalar", ct, value=n.attrs["value"]),
    "{0} / {1}",
    domain="positive",
    kinds="fc",
    operand_dtype=_floating,
)
binary(
    "pow",
    np.power,
    _pow_vjp,
    _pow_scalar_vjp,
    "torch.pow({0}, {1})",
    flops=10,
    domain="positive",
    kinds="ifc",
    aten=("pow.Tensor_Tensor", "pow.Tensor_Scalar", "pow.Scalar"),
)
binary(
    "maximum",
    np.maximum,
    _extremum_vjp("gt"),
    _above,
    "torch.maximum({0}, {1})",
    aten=("maximum.default",),
    with_scalar=False,
    kinds="bif",
)
binary(
    "minimum",
    np.minimum,
    _extremum_vjp("lt"),
    _below,
    "torch.minimum({0}, {1})",
    aten=("minimum.default",),
    with_scalar=False,
    kinds="bif",
)
register_scalar("maximum", np.maximum, _above, "torch.clamp_min({0}, {1})", value=0.3, kinds="if")
register_scalar("minimum", np.minimum, _below, "torch.clamp_max({0}, {1})", value=0.3, kinds="if")
register_scalar(
    "div",
    lambda x, value: np.divide(value, x),
    lambda b, n, ct: neg(b, mul(b, ct, b.emit("div", n.output, n.inputs[0]))),
    "{1} / {0}",
    domain="positive",
    prefix="r",
    kinds="fc",
)
register_scalar(
    "pow",
    lambda x, value: np.power(value, x),
    lambda b, n, ct: mul(b, ct, scale(b, n.output, float(np.log(n.attrs["value"])))),
    "torch.pow({1}, {0})",
    flops=10,
    prefix="r",
    kinds="if",
)
binary(
    "floor_divide",
    np.floor_divide,
    lower="torch.floor_divide({0}, {1})",
    domain="positive",
    kinds="if",
    aten=("floor_divide.default", "floor_divide.Scalar"),
    vjp=NOT_DIFFERENTIABLE,
    scalar_vjp=NOT_DIFFERENTIABLE,
)
binary(
    "remainder",
    np.remainder,
    NOT_DIFFERENTIABLE,
    lambda b, n, ct: ct,
    "torch.remainder({0}, {1})",
    domain="positive",
    kinds="if",
)
for _name, _function, _symbol in (
    ("eq", np.equal, "=="),
    ("ne", np.not_equal, "!="),
    ("lt", np.less, "<"),
    ("le", np.less_equal, "<="),
    ("gt", np.greater, ">"),
    ("ge", np.greater_equal, ">="),
):
    binary(
        _name,
        _function,
        lower=f"{{0}} {_symbol} {{1}}",
        predicate=True,
        kinds="bifc" if _name in ("eq", "ne") else "bif",
        vjp=NOT_DIFFERENTIABLE,
        scalar_vjp=NOT_DIFFERENTIABLE,
    )
for _name, _function in (
    ("logical_and", np.logical_and),
    ("logical_or", np.logical_or),
    ("logical_xor", np.logical_xor),
):
    binary(
        _name,
        _function,
        lower=f"torch.{_name}({{0}}, {{1}})",
        predicate=True,
        with_scalar=False,
        aten=(f"{_name}.default",),
        domain="bool",
        vjp=NOT_DIFFERENTIABLE,
        scalar_vjp=NOT_DIFFERENTIABLE,
    )
for _name, _function, _symbol in (
    ("bitwise_and", np.bitwise_and, "&"),
    ("bitwise_or", np.bitwise_or, "|"),
    ("bitwise_xor", np.bitwise_xor, "^"),
):
    binary(
        _name,
        _function,
        lower=f"{{0}} {_symbol} {{1}}",
        domain="bool",
        kinds="bi",
        aten=(*(f"{_name}.{o}" for o in ("Tensor", "Scalar")), *(f"__{_name[8:]}__.{o}" for o in ("Tensor", "Scalar"))),
        commutes=True,
        vjp=NOT_DIFFERENTIABLE,
        scalar_vjp=NOT_DIFFERENTIABLE,
    )


# --- where, cast, full --------------------------------------------------------------------------------


def _infer_where(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    mask, x, y = inputs
    require(mask.dtype == "bool" and mask.shape == x.shape, "a bool mask of the shape of the choices is required")
    require(x == y, "choices of one type are required")
    return (x,)


def _infer_where_scalar(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    mask, x = inputs
    require(isinstance(attrs["value"], bool | int | float), "value is a number")
    return _infer_where((mask, x, x), attrs)


def _where_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,), mask = cts, node.inputs[0]
    assert ct is not None
    return None, _where_zero(b, mask, ct), _where_zero(b, b.emit("logical_not", mask), ct)


def _where_scalar_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    assert cts[0] is not None
    return None, _where_zero(b, node.inputs[0], cts[0])


def _import_where(b: Builder, mask: Value, x: Operand, y: Operand) -> Value:
    dtype = result_dtype(x, y)
    values = [
        cast(b, item, dtype) if isinstance(item, Value) else b.emit("full", value=item, shape=(), dtype=dtype)
        for item in (x, y)
    ]
    return b.emit("where", *broadcast_together(b, cast(b, mask, "bool"), *values))


def _import_masked_fill(b: Builder, x: Value, mask: Value, value: Operand) -> Value:
    """``masked_fill``: x where the mask does not hold, the value elsewhere, in x's dtype."""
    if isinstance(value, Value):
        return b.emit("where", *broadcast_together(b, mask, cast(b, value, x.type.dtype), x))
    mask, x = broadcast_together(b, mask, x)
    value = {"b": bool, "i": int}.get(kind(x.type.dtype), float)(value)
    return b.emit("where_scalar", b.emit("logical_not", mask), x, value=value)


_MASK = Arg(t(3, 4, dtype="bool"), "bool")
_REAL = Arg(t(3, 4))
register(
    OpDef(
        name="where",
        infer=_infer_where,
        evaluate=lambda node, mask, x, y: np.where(mask, x, y),
        vjp=_where_vjp,
        cost=elementwise_cost(1),
        axes=same_axes,
        lower=lambda node, args: f"torch.where({', '.join(args)})",
        aten={"where.self": _import_where, "where.ScalarOther": _import_where, "where.ScalarSelf": _import_where},
        samples=(Sample((_MASK, _REAL, _REAL)),),
    )
)
register(
    OpDef(
        name="where_scalar",
        infer=_infer_where_scalar,
        evaluate=lambda node, mask, x: np.where(mask, x, _weak(node.attrs["value"], x.dtype)),
        vjp=_where_scalar_vjp,
        cost=elementwise_cost(1),
        axes=same_axes,
        lower=lambda node, args: f"torch.where({args[0]}, {args[1]}, {scalar(node.attrs['value'])})",
        aten={"masked_fill.Scalar": _import_masked_fill, "masked_fill.Tensor": _import_masked_fill},
        samples=(Sample((_MASK, _REAL), {"value": -1.5}),),
    )
)


def _infer_cast(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    return (x.with_(dtype=attrs["dtype"]),)


def _cast_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    assert cts[0] is not None
    return (cast(b, cts[0], node.inputs[0].type.dtype),)


def _import_to(b: Builder, x: Value, *args: Any, dtype: str | None = None, **_: Any) -> Value:
    """``to``, ``_to_copy``, ``type_as``: the dtype, if one is given; devices are the planner's business."""
    for arg in (dtype, *args):
        if isinstance(arg, str) and arg in DTYPES:
            return cast(b, x, arg)
        if isinstance(arg, Value):
            return cast(b, x, arg.type.dtype)
    return x


register(
    OpDef(
        name="cast",
        infer=_infer_cast,
        evaluate=lambda node, x: (x if node.output.type.is_complex else x.real).astype(node.output.type.numpy_dtype),
        vjp=_cast_vjp,
        cost=copy_cost,
        axes=same_axes,
        lower=lambda node, args: f"{args[0]}.to({torch_dtype(node.attrs['dtype'])})",
        aten=dict.fromkeys(
            ("to.dtype", "to.dtype_layout", "to.device", "to.other", "_to_copy.default", "type_as.default"), _import_to
        ),
        samples=(
            sample((3, 4), dtype="f32"),
            sample((3, 4), dtype="bf16"),
            Sample((Arg(t(3, dtype="i64"), "small"),), {"dtype": "f64"}),
        ),
    )
)


def _infer_full(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    require(not inputs and isinstance(attrs["value"], bool | int | float), "no input and a number are required")
    return (TensorType(attrs["dtype"], attrs["shape"]),)


def _import_full(b: Builder, size: Sequence[int], value: Scalar, *, dtype: str | None = None, **_: Any) -> Value:
    return full(b, value, size, dtype or result_dtype(value))


def _import_full_like(b: Builder, x: Value, value: Scalar, *, dtype: str | None = None, **_: Any) -> Value:
    return full(b, value, x.type.shape, dtype or x.type.dtype)


def _constant_importers(value: int) -> dict[str, Importer]:
    name = "zeros" if value == 0 else "ones"
    return {
        f"{name}.default": lambda b, size, *, dtype=None, **_: full(b, value, size, dtype or "f32"),
        f"new_{name}.default": lambda b, x, size, *, dtype=None, **_: full(b, value, size, dtype or x.type.dtype),
        f"{name}_like.default": lambda b, x, *, dtype=None, **_: full(b, value, x.type.shape, dtype or x.type.dtype),
    }


register(
    OpDef(
        name="full",
        infer=_infer_full,
        evaluate=lambda node: np.full(node.attrs["shape"], node.attrs["value"], node.output.type.numpy_dtype),
        vjp=NOT_DIFFERENTIABLE,
        cost=copy_cost,
        axes=lambda node: Axes((), (letters(node.output.type.rank),)),
        lower=lambda node, args: (
            f"torch.full({node.attrs['shape']}, {scalar(node.attrs['value'])}, "
            f"dtype={torch_dtype(node.attrs['dtype'])}, device=device)"
        ),
        aten={
            "full.default": _import_full,
            "full_like.default": _import_full_like,
            "new_full.default": lambda b, x, size, value, *, dtype=None, **_: full(
                b, value, size, dtype or x.type.dtype
            ),
            "scalar_tensor.default": lambda b, value, *, dtype=None, **_: full(
                b, value, (), dtype or result_dtype(value)
            ),
            **_constant_importers(0),
            **_constant_importers(1),
        },
        samples=(Sample((), {"value": 1.5, "shape": (3, 4), "dtype": "f64"}),),
    )
)
