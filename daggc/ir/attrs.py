"""Attribute values of nodes: plain immutable data with an exact text form.

An attribute is None, a bool, an int, a float, a complex number, a string, a :class:`Dense` array of numbers, or a
tuple of these; or, of an op that decides at run time what it runs, a whole graph (:class:`Nested`). Lists become
tuples and NaN becomes the one object ``math.nan`` (so that equality, which compares identity first inside
containers, holds for it).
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

import numpy as np

from daggc.errors import IRError
from daggc.ir.types import TensorType, dtype_of

Attr = Any  # None | bool | int | float | complex | str | Dense | tuple[Attr, ...]; recursive, so checked by freeze()


@dataclass(frozen=True, slots=True)
class Dense:
    """A constant array, held as bytes in C order so that it compares and hashes exactly."""

    type: TensorType
    data: bytes

    @staticmethod
    def of(array: np.ndarray) -> Dense:
        return Dense(TensorType(dtype_of(array), tuple(array.shape)), np.ascontiguousarray(array).tobytes())

    @staticmethod
    def from_bytes(type_: TensorType, data: bytes) -> Dense:
        """Raises IRError if the bytes do not fill the type."""
        if type_.device is not None or len(data) != type_.nbytes:
            raise IRError(f"a dense {type_} is on no device and has {type_.nbytes} bytes, got {len(data)}")
        if type_.dtype == "bool" and data.strip(b"\0\1"):
            raise IRError("the bytes of a dense bool are 0 and 1")
        return Dense(type_, data)

    def numpy(self) -> np.ndarray:
        return np.frombuffer(self.data, self.type.numpy_dtype).reshape(self.type.shape)


class Nested(ABC):
    """An attribute that is a graph; where attributes are compared as text, its structure stands for it."""

    @abstractmethod
    def structure(self) -> str:
        """A hash of what it computes."""


class Attrs(Mapping[str, Attr]):
    """An immutable, hashable mapping of attribute names to frozen values, in sorted order.

    Attributes:
        graphs: those of the values that are graphs, in order.
    """

    __slots__ = ("_items", "graphs")

    graphs: tuple[Any, ...]

    def __init__(self, items: Mapping[str, Attr] | None = None) -> None:
        frozen = {name: freeze(value) for name, value in sorted(items.items())} if items else {}
        object.__setattr__(self, "_items", frozen)
        object.__setattr__(self, "graphs", tuple(value for value in frozen.values() if isinstance(value, Nested)))

    def __getitem__(self, name: str) -> Attr:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("attributes of a node are immutable")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Attrs) and self._items == other._items

    def __hash__(self) -> int:
        return hash(str(self))

    def __reduce__(self) -> tuple[type[Attrs], tuple[dict[str, Attr]]]:
        return Attrs, (dict(self._items),)

    def __str__(self) -> str:
        return ", ".join(f"{name}={format_attr(value)}" for name, value in self._items.items())

    __repr__ = __str__


NO_ATTRS = Attrs()


def freeze(value: Attr) -> Attr:
    """Make an attribute immutable. Raises IRError if it is not plain data."""
    if value is None or isinstance(value, bool | str | Dense | Nested):
        return value
    if isinstance(value, np.integer | int):
        return int(value)
    if isinstance(value, np.floating | float):
        return math.nan if math.isnan(value) else float(value)
    if isinstance(value, np.complexfloating | complex):
        number = complex(value)
        return _nan_complex(repr(number.real), repr(number.imag)) if number != number else number
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    raise IRError(f"an attribute is plain data (None, bool, int, float, complex, str, Dense, list), got {value!r}")


@cache
def _nan_complex(real: str, imag: str) -> complex:
    return complex(float(real), float(imag))


def format_attr(value: Attr) -> str:
    """The text of an attribute; the parser reads it back exactly, but for a graph, which the printer writes out."""
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(map(format_attr, value)) + "]"
    if isinstance(value, complex):
        return f"complex<{value.real!r}, {value.imag!r}>"
    if isinstance(value, Dense):
        return f"dense<{value.type}> {_format_dense(value)}"
    if isinstance(value, Nested):
        return f"graph<{value.structure()}>"
    return repr(value)


def _format_dense(value: Dense) -> str:
    """Numbers where a reader profits and they are exact; hexadecimal bytes otherwise."""
    array = value.numpy()
    readable = array.size <= 16 and array.dtype.kind in "iufb" and bool(np.isfinite(array).all())
    if not readable:
        return json.dumps(value.data.hex())
    return "[" + ", ".join(repr(number) for number in array.reshape(-1).tolist()) + "]"
