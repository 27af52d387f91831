"""Bessel and Airy functions. torch differentiates ``i0``, ``i0e``, ``i1`` and ``i1e``, and no others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import special

from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ops.build import full, mul, sub
from daggc.ops.elementwise import unary
from daggc.ops.opdef import NOT_DIFFERENTIABLE


def _i0e_rule(b: Builder, node: Node, ct: Value) -> Value:
    (x,) = node.inputs
    return mul(b, ct, sub(b, b.emit("i1e", x), mul(b, b.emit("sign", x), node.output)))


def _first_order_rule(zeroth: str, scaled: bool) -> Callable[[Builder, Node, Value], Value]:
    """``I0(x) - I1(x) / x``, of scaled functions ``I0(x) - I1(x) (sign(x) + 1 / x)``; one half near zero."""

    def rule(b: Builder, node: Node, ct: Value) -> Value:
        (x,) = node.inputs
        eps = float(np.finfo(x.type.numpy_dtype).eps)
        far = b.emit("gt_scalar", b.emit("abs", x), value=eps)
        safe = b.emit("where", far, x, full(b, eps, x.type.shape, x.type.dtype))
        over = b.emit("reciprocal", safe)
        if scaled:
            over = b.emit("add", b.emit("sign", safe), over)
        slope = sub(b, b.emit(zeroth, safe), mul(b, node.output, over))
        return mul(b, ct, b.emit("where", far, slope, full(b, 0.5, x.type.shape, x.type.dtype)))

    return rule


for _name, _function, _rule, _lower, _half, _aten in (
    ("i0", special.i0, lambda b, n, ct: mul(b, ct, b.emit("i1", n.inputs[0])), "torch.i0", False, "i0"),
    ("i0e", special.i0e, _i0e_rule, "torch.special.i0e", False, "special_i0e"),
    ("i1", special.i1, _first_order_rule("i0", scaled=False), "torch.special.i1", False, "special_i1"),
    ("i1e", special.i1e, _first_order_rule("i0e", scaled=True), "torch.special.i1e", False, "special_i1e"),
):
    unary(
        _name,
        _function,
        _rule,
        _lower,
        flops=20,
        kinds="f",
        half=_half,
        aten=(f"{_aten}.default", "special_i0.default") if _name == "i0" else (f"{_aten}.default",),
        shapes=((3, 4),),
    )


for _name, _function in (
    ("bessel_j0", special.j0),
    ("bessel_j1", special.j1),
    ("bessel_y0", special.y0),
    ("bessel_y1", special.y1),
    ("modified_bessel_i0", special.i0),
    ("modified_bessel_i1", special.i1),
    ("modified_bessel_k0", special.k0),
    ("modified_bessel_k1", special.k1),
    ("scaled_modified_bessel_k0", special.k0e),
    ("scaled_modified_bessel_k1", special.k1e),
    ("spherical_bessel_j0", lambda x: special.spherical_jn(0, x)),
    ("airy_ai", lambda x: special.airy(x)[0]),
):
    unary(
        _name,
        _function,
        NOT_DIFFERENTIABLE,
        f"torch.special.{_name}",
        flops=40,
        domain="positive",
        kinds="f",
        half=False,
        aten=(f"special_{_name}.default",),
        shapes=((3, 4),),
    )
