"""Comparisons and logic, element by element."""

from __future__ import annotations

import numpy as np

from daggc.ops.elementwise import (
    binary,
)
from daggc.ops.opdef import (
    NOT_DIFFERENTIABLE,
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
