"""Second names of ATen ops, ``multiply`` for ``mul`` say: they import as the first ones do."""

from __future__ import annotations

from daggc.ops import activation, arithmetic, compare, exponentials, piecewise, reduce, softmax, trigonometry, unary
from daggc.ops.opdef import REGISTRY

_ALIASES = {
    "absolute": "abs",
    "arccos": "acos",
    "arccosh": "acosh",
    "arcsin": "asin",
    "arcsinh": "asinh",
    "arctan": "atan",
    "arctan2": "atan2",
    "arctanh": "atanh",
    "clip": "clamp",
    "divide": "div",
    "fix": "trunc",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "special_erf": "erf",
    "special_exp2": "exp2",
    "special_expit": "sigmoid",
    "special_expm1": "expm1",
    "special_log1p": "log1p",
    "special_logsumexp": "logsumexp",
    "special_round": "round",
    "special_sinc": "sinc",
    "subtract": "sub",
    "true_divide": "div",
}
_FAMILIES = (activation, arithmetic, compare, exponentials, piecewise, reduce, softmax, trigonometry, unary)


def _register() -> None:
    assert _FAMILIES, "importing them has registered what has second names"
    for overload, importer in list(REGISTRY.importers.items()):
        name, _, form = overload.partition(".")
        for alias in (alias for alias, first in _ALIASES.items() if first == name):
            REGISTRY.importers.setdefault(f"{alias}.{form}", importer)


_register()
