"""Complex numbers: their parts, conjugate, size and direction.

The cotangent of a complex number is dL/d(re) + i dL/d(im), as in torch. So the VJP of a function that is linear
over the complex numbers multiplies by the conjugate of its factor (see ``ComplexRule.HOLOMORPHIC``), and that of
a part of a number is the part put back in its place. Here are the ops that are not holomorphic; their rules say
so themselves (``AS_IT_IS``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import (
    add,
    broadcast_together,
    cast,
    conj,
    kind,
    mul,
    neg,
    sub,
    zeros_like,
)
from daggc.ops.elementwise import one_input, where_zero
from daggc.ops.opdef import (
    AS_IT_IS,
    Arg,
    Axes,
    Importer,
    OpDef,
    Sample,
    elementwise_cost,
    letters,
    register,
    require,
    same_axes,
    sample,
    t,
    upcast,
    view_cost,
)

_PARTS = {"c64": "f32", "c128": "f64"}
_WHOLE = {part: whole for whole, part in _PARTS.items()}


def part_type(x: TensorType) -> TensorType:
    """The type of the real part. Raises TypeRuleError if x is not complex."""
    require(x.is_complex, f"complex numbers are required, got {x}")
    return x.with_(dtype=_PARTS[x.dtype])


def complex_type(x: TensorType) -> TensorType:
    """The type of complex numbers with parts of type x. Raises TypeRuleError if there is none."""
    require(x.dtype in _WHOLE, f"numbers of dtype f32 or f64 are required, got {x}")
    return x.with_(dtype=_WHOLE[x.dtype])


def _infer(rule: Callable[[TensorType], TensorType]) -> Callable[[Sequence[TensorType], Attrs], tuple[TensorType, ...]]:
    def infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        (x,) = inputs
        return (rule(x),)

    return infer


def _same_complex(x: TensorType) -> TensorType:
    part_type(x)
    return x


def real(b: Builder, x: Value) -> Value:
    """The real part; of real numbers, the numbers themselves."""
    return b.emit("real", x) if x.type.is_complex else x


def imag(b: Builder, x: Value) -> Value:
    """The imaginary part; of real numbers, zeros."""
    return b.emit("imag", x) if x.type.is_complex else zeros_like(b, x)


def make_complex(b: Builder, re: Value, im: Value | None = None) -> Value:
    """Complex numbers of two parts of one type; the imaginary part is zero if it is not given."""
    return b.emit("complex", re, zeros_like(b, re) if im is None else im)


_SHAPES = ((3, 4), (2, 1, 5))
_COMPLEX = tuple(Sample((Arg(t(*shape, dtype="c128")),)) for shape in _SHAPES)

# --- conjugate and parts ------------------------------------------------------------------------------


def _identity(b: Builder, x: Value) -> Value:
    return x


register(
    OpDef(
        name="conj",
        infer=_infer(_same_complex),
        evaluate=lambda node, x: np.conj(x),
        vjp=one_input(lambda b, node, ct: conj(b, ct)),
        cost=elementwise_cost(1),
        axes=same_axes,
        lower=lambda node, args: f"torch.conj_physical({args[0]})",
        aten={
            **dict.fromkeys(
                (
                    "conj.default",
                    "_conj.default",
                    "conj_physical.default",
                    "_conj_physical.default",
                    "_conj_copy.default",
                ),
                conj,
            ),
            "resolve_conj.default": _identity,
            "resolve_neg.default": _identity,
            "_neg_view.default": neg,
            "_neg_view_copy.default": neg,
        },
        samples=_COMPLEX,
        complex=AS_IT_IS,
    )
)
register(
    OpDef(
        name="real",
        infer=_infer(part_type),
        evaluate=lambda node, x: x.real,
        vjp=one_input(lambda b, node, ct: make_complex(b, ct)),
        cost=view_cost,
        axes=same_axes,
        lower=lambda node, args: f"torch.real({args[0]})",
        aten={"real.default": real},
        samples=_COMPLEX,
        complex=AS_IT_IS,
    )
)
register(
    OpDef(
        name="imag",
        infer=_infer(part_type),
        evaluate=lambda node, x: x.imag,
        vjp=one_input(lambda b, node, ct: make_complex(b, zeros_like(b, ct), ct)),
        cost=view_cost,
        axes=same_axes,
        lower=lambda node, args: f"torch.imag({args[0]})",
        aten={
            "imag.default": lambda b, x: imag(b, _complex_only(x, "imag")),
            "isreal.default": lambda b, x: b.emit(
                "eq_scalar", imag(b, x) if x.type.is_complex else zeros_like(b, x), value=0
            ),
        },
        samples=_COMPLEX,
        complex=AS_IT_IS,
    )
)


def _complex_only(x: Value, name: str) -> Value:
    if not x.type.is_complex:
        raise TypeRuleError(f"{name} takes complex numbers, got {x.type}")
    return x


# --- complex numbers of two parts ---------------------------------------------------------------------


def _infer_complex(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    re, im = inputs
    require(re == im, f"parts of one type are required, got {re} and {im}")
    return (complex_type(re),)


def _evaluate_complex(node: Node, re: np.ndarray, im: np.ndarray) -> np.ndarray:
    result = np.empty(re.shape, node.output.type.numpy_dtype)  # re + 1j * im would make NaN of infinite parts
    result.real, result.imag = re, im
    return result


def _complex_vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    (ct,) = cts
    assert ct is not None
    return real(b, ct), imag(b, ct)


def _import_complex(b: Builder, re: Value, im: Value) -> Value:
    return b.emit("complex", *broadcast_together(b, re, im))


def _import_polar(b: Builder, size: Value, angle: Value) -> Value:
    size, angle = broadcast_together(b, size, angle)
    return b.emit("complex", mul(b, size, b.emit("cos", angle)), mul(b, size, b.emit("sin", angle)))


register(
    OpDef(
        name="complex",
        infer=_infer_complex,
        evaluate=_evaluate_complex,
        vjp=_complex_vjp,
        cost=elementwise_cost(0),
        axes=same_axes,
        lower=lambda node, args: f"torch.complex({args[0]}, {args[1]})",
        aten={"complex.default": _import_complex, "polar.default": _import_polar},
        samples=(sample((3, 4), (3, 4)), sample((), ())),
        complex=AS_IT_IS,
    )
)


def _view_as_real_type(x: TensorType) -> TensorType:
    return part_type(x).with_(shape=(*x.shape, 2))


def _view_as_complex_type(x: TensorType) -> TensorType:
    require(x.rank > 0 and x.shape[-1] == 2, f"an innermost axis of size 2 is required, got {x}")
    return complex_type(x).with_(shape=x.shape[:-1])


def _view_axes(node: Node) -> Axes:
    """Labels of all axes, the one of the parts whole."""
    labels = letters(min(node.inputs[0].type.rank, node.output.type.rank))
    into, out = (labels, (*labels, None)) if node.inputs[0].type.is_complex else ((*labels, None), labels)
    return Axes((into,), (out,))


register(
    OpDef(
        name="view_as_real",
        infer=_infer(_view_as_real_type),
        evaluate=lambda node, x: np.stack([x.real, x.imag], axis=-1),
        vjp=one_input(lambda b, node, ct: b.emit("view_as_complex", ct)),
        cost=view_cost,
        axes=_view_axes,
        lower=lambda node, args: f"torch.view_as_real({args[0]})",
        aten=dict.fromkeys(
            ("view_as_real.default", "view_as_real_copy.default", "_view_as_real_physical.default"),
            lambda b, x: b.emit("view_as_real", x),
        ),
        samples=_COMPLEX,
        complex=AS_IT_IS,
    )
)
register(
    OpDef(
        name="view_as_complex",
        infer=_infer(_view_as_complex_type),
        evaluate=lambda node, x: _evaluate_complex(node, x[..., 0], x[..., 1]),
        vjp=one_input(lambda b, node, ct: b.emit("view_as_real", ct)),
        cost=view_cost,
        axes=_view_axes,
        lower=lambda node, args: f"kernels.view_as_complex({args[0]})",
        aten=dict.fromkeys(
            ("view_as_complex.default", "view_as_complex_copy.default"), lambda b, x: b.emit("view_as_complex", x)
        ),
        samples=(sample((3, 2)), sample((2,))),
        complex=AS_IT_IS,
    )
)

# --- size and direction -------------------------------------------------------------------------------


def _squared_size(b: Builder, x: Value) -> Value:
    re, im = real(b, x), imag(b, x)
    return add(b, mul(b, re, re), mul(b, im, im))


def _abs_type(x: TensorType) -> TensorType:
    require(kind(x.dtype) in "ifc", f"numbers are required, got {x}")
    return part_type(x) if x.is_complex else x


def _abs_vjp(b: Builder, node: Node, ct: Value) -> Value:
    """``ct x / |x|``, zero where x is, as torch has it."""
    (x,) = node.inputs
    if x.type.is_complex:
        return mul(b, make_complex(b, ct), b.emit("sgn", x))
    return mul(b, ct, b.emit("sign", x))


def _sgn(node: Node, x: np.ndarray) -> np.ndarray:
    size = np.abs(x)
    return np.where(size == 0, 0, x / np.where(size == 0, 1, size))


def _sgn_vjp(b: Builder, node: Node, ct: Value) -> Value:
    """The part of the cotangent across x, over the size of x; zero where x is (torch's ``sgn_backward``)."""
    (x,), sgn = node.inputs, node.output
    size = b.emit("abs", x)
    nonzero = b.emit("ne_scalar", size, value=0)
    safe = make_complex(b, b.emit("where_scalar", nonzero, size, value=1.0))
    along = mul(b, make_complex(b, real(b, mul(b, ct, conj(b, sgn)))), sgn)
    return where_zero(b, nonzero, b.emit("div", sub(b, ct, along), safe))


def _angle_type(x: TensorType) -> TensorType:
    require(x.differentiable, f"floats or complex numbers are required, got {x}")
    return part_type(x) if x.is_complex else x


def _angle(node: Node, x: np.ndarray) -> np.ndarray:
    if np.iscomplexobj(x):
        return np.angle(x)
    return np.where(np.isnan(x), x, np.where(x < 0, np.pi, 0))  # of -0.0 it is 0


def _angle_vjp(b: Builder, node: Node, ct: Value) -> Value:
    """``ct i x / |x|**2``, zero where x is; of real numbers zero, as torch has it."""
    (x,) = node.inputs
    if not x.type.is_complex:
        return zeros_like(b, x)
    size = _squared_size(b, x)
    nonzero = b.emit("ne_scalar", x, value=0)
    share = b.emit("div", ct, b.emit("where_scalar", nonzero, size, value=1.0))
    return where_zero(b, nonzero, make_complex(b, neg(b, mul(b, share, imag(b, x))), mul(b, share, real(b, x))))


def _to_float(op: str) -> Importer:
    def importer(b: Builder, x: Value, **_: Any) -> Value:
        return b.emit(op, x if x.type.differentiable else cast(b, x, "f32"))

    return importer


register(
    OpDef(
        name="abs",
        infer=_infer(_abs_type),
        evaluate=upcast(lambda node, x: np.abs(x)),
        vjp=one_input(_abs_vjp),
        cost=elementwise_cost(1),
        axes=same_axes,
        lower=lambda node, args: f"torch.abs({args[0]})",
        aten={"abs.default": lambda b, x: b.emit("abs", x)},
        samples=(sample((3, 4), domain="nonzero"), sample((), domain="nonzero"), *_COMPLEX),
        complex=AS_IT_IS,
    )
)
register(
    OpDef(
        name="sgn",
        infer=_infer(_same_complex),
        evaluate=_sgn,
        vjp=one_input(_sgn_vjp),
        cost=elementwise_cost(5),
        axes=same_axes,
        lower=lambda node, args: f"torch.sgn({args[0]})",
        aten={"sgn.default": lambda b, x: b.emit("sgn" if x.type.is_complex else "sign", x)},
        samples=_COMPLEX,
        complex=AS_IT_IS,
    )
)
register(
    OpDef(
        name="angle",
        infer=_infer(_angle_type),
        evaluate=upcast(_angle),
        vjp=one_input(_angle_vjp),
        cost=elementwise_cost(10),
        axes=same_axes,
        lower=lambda node, args: f"torch.angle({args[0]})",
        aten={"angle.default": _to_float("angle")},
        samples=(sample((3, 4), domain="nonzero"), *_COMPLEX),
        complex=AS_IT_IS,
    )
)
