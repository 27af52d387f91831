"""The window functions of torch that are ATen ops: hann, hamming, blackman, bartlett, kaiser.

``torch.signal.windows`` is Python over simpler ops and needs nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ops.build import add, full, mul, neg, scale
from daggc.ops.iota import iota
from daggc.ops.opdef import Importer, require
from daggc.ops.slicing import slice_dim


def _plus(b: Builder, x: Value, value: float) -> Value:
    return b.emit("add_scalar", x, value=value)


def _hamming(alpha: float, beta: float) -> Callable[..., Value]:
    def window(b: Builder, index: Value, size: int, alpha: float = alpha, beta: float = beta) -> Value:
        wave = b.emit("cos", scale(b, index, 2 * math.pi / (size - 1)))
        return _plus(b, scale(b, wave, -beta), alpha)

    return window


def _blackman(b: Builder, index: Value, size: int) -> Value:
    angle = scale(b, index, math.pi / (size - 1))
    slow = scale(b, b.emit("cos", scale(b, angle, 2.0)), -0.5)
    return _plus(b, add(b, scale(b, b.emit("cos", scale(b, angle, 4.0)), 0.08), slow), 0.42)


def _bartlett(b: Builder, index: Value, size: int) -> Value:
    rising = scale(b, index, 2.0 / (size - 1))
    falling = _plus(b, neg(b, rising), 2.0)
    early = b.emit("lt_scalar", index, value=float((size - 1) // 2 + 1))
    return b.emit("where", early, rising, falling)


def _kaiser(b: Builder, index: Value, size: int, beta: float = 12.0) -> Value:
    place = _plus(b, scale(b, index, 2.0 / (size - 1)), -1.0)
    arch = b.emit("sqrt", _plus(b, neg(b, mul(b, place, place)), 1.0))
    top = b.emit("i0", full(b, beta, index.type.shape, index.type.dtype))
    return b.emit("div", b.emit("i0", scale(b, arch, beta)), top)


def _importer(window: Callable[..., Value], has_periodic: bool) -> Importer:
    """A periodic window is one of a point more, without its last."""

    def importer(b: Builder, size: int, *options: Any, dtype: str | None = None, **_: Any) -> Value:
        require(size >= 0, f"a window has no fewer than 0 points, got {size}")
        periodic, parameters = (options[0], options[1:]) if has_periodic else (True, ())
        dtype = dtype or "f32"
        if size <= 1:
            return full(b, 1.0, (size,), dtype)
        whole = size + 1 if periodic else size
        result = window(b, iota(b, whole, dtype), whole, *parameters)
        return slice_dim(b, result, 0, 0, size)

    return importer


WINDOW_IMPORTERS: dict[str, Importer] = {}
for _name, _window in (
    ("hann", _hamming(0.5, 0.5)),
    ("hamming", _hamming(0.54, 0.46)),
    ("blackman", _blackman),
    ("bartlett", _bartlett),
):
    WINDOW_IMPORTERS[f"{_name}_window.default"] = _importer(_window, has_periodic=False)
    WINDOW_IMPORTERS[f"{_name}_window.periodic"] = _importer(_window, has_periodic=True)
WINDOW_IMPORTERS["kaiser_window.default"] = _importer(_kaiser, has_periodic=False)
for _suffix in ("periodic", "beta"):
    WINDOW_IMPORTERS[f"kaiser_window.{_suffix}"] = _importer(_kaiser, has_periodic=True)
for _suffix in ("periodic_alpha", "periodic_alpha_beta"):
    WINDOW_IMPORTERS[f"hamming_window.{_suffix}"] = _importer(_hamming(0.54, 0.46), has_periodic=True)
