"""Measured times of an op as a function of its size.

A curve holds rows ``(FLOPs, bytes, seconds)`` of nodes that were measured. Between and beyond them it follows the
roofline that bounds them from below,

    bound = max(shortest time, FLOPs / best FLOP/s, bytes / best bytes/s)

times a correction: the rows' own ``seconds / bound``, averaged in the plane of log FLOPs and log bytes with weights
that fall with the fourth power of the distance (Shepard's interpolation). At a row it gives the row's time; far from
all rows it scales as the roofline does. Arithmetic intensity is a direction in that plane, so that thin and thick
matrix products, or 1x1 and 3x3 convolutions, have rates of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from daggc.errors import PlanError

Row = tuple[float, float, float]  # FLOPs, bytes, seconds

_NEAR = 0.1  # octaves within which two nodes are of one size
_POWER = 4


@dataclass(frozen=True)
class Curve:
    """Seconds of an op against its FLOPs and bytes.

    Attributes:
        rows: ``(FLOPs, bytes, seconds)``, at least one; FLOPs and bytes may be 0, seconds are positive.
    """

    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        rows = tuple((float(flops), float(nbytes), float(seconds)) for flops, nbytes, seconds in self.rows)
        if not rows or not all(np.isfinite(row).all() and min(row) >= 0 < row[2] for row in rows):
            raise PlanError("a curve has rows of FLOPs, bytes and seconds, none negative, seconds positive")
        object.__setattr__(self, "rows", rows)

    @cached_property
    def _fit(self) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
        """Rows' places in the plane, logarithms of their corrections, and the roofline."""
        flops, nbytes, seconds = np.array(self.rows).T
        roof = (float(seconds.min()), float((flops / seconds).max()), float((nbytes / seconds).max()))
        return _places(flops, nbytes), np.log(seconds / _bound(flops, nbytes, roof)), roof

    def seconds(self, flops: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
        """Time of each of n nodes, from their FLOPs (n) and bytes (n)."""
        places, corrections, roof = self._fit
        asked = _places(flops, nbytes)
        squares = ((asked[:, None, :] - places[None, :, :]) ** 2).sum(-1) + _NEAR**2
        weights = squares ** (-_POWER / 2)
        return _bound(flops, nbytes, roof) * np.exp(weights @ corrections / weights.sum(1))


def _places(flops: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
    return np.log2(np.maximum(np.stack([flops, nbytes], -1), 1.0))


def _bound(flops: np.ndarray, nbytes: np.ndarray, roof: tuple[float, float, float]) -> np.ndarray:
    shortest, rate, bandwidth = roof
    compute = flops / rate if rate else 0.0
    memory = nbytes / bandwidth if bandwidth else 0.0
    return np.maximum(shortest, np.maximum(compute, memory))


def curve_of(rows: Iterable[Row]) -> Curve:
    """A curve of rows of which several may be of one size: their geometric mean stands for them."""
    cells: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        place = np.log2(np.maximum(row[:2], 1.0)) / _NEAR
        cells.setdefault((round(place[0]), round(place[1])), []).append(row)
    return Curve(tuple(_mean(cells[cell]) for cell in sorted(cells)))


def _mean(rows: Sequence[Row]) -> Row:
    flops, nbytes, seconds = np.array(rows).T
    return float(flops.mean()), float(nbytes.mean()), float(np.exp(np.log(seconds).mean()))
