"""Attribute values of nodes: plain immutable data with an exact text form.

An attribute is None, a bool, an int, a float, a string, a :class:`Dense` array of numbers, or a tuple of
these. Lists become tuples and NaN becomes the one object ``math.nan`` (so that equality, which compares
identity first inside containers, holds for it).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from daggc.errors import IRError
from daggc.ir.types import TensorType, dtype_of

Attr = Any  # None | bool | int | float | str | Dense | tuple[Attr, ...]; recursive, so checked by freeze()


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


class Attrs(Mapping[str, Attr]):
    """An immutable, hashable mapping of attribute names to frozen values, in sorted order."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Attr] | None = None) -> None:
        frozen = {name: freeze(value) for name, value in sorted(items.items())} if items else {}
        object.__setattr__(self, "_items", frozen)

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
    if value is None or isinstance(value, bool | str | Dense):
        return value
    if isinstance(value, np.integer | int):
        return int(value)
    if isinstance(value, np.floating | float):
        return math.nan if math.isnan(value) else float(value)
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    raise IRError(f"an attribute is plain data (None, bool, int, float, str, Dense, list), got {value!r}")


def format_attr(value: Attr) -> str:
    """The text of an attribute; ``parse_attr`` of the parser reads it back exactly."""
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(map(format_attr, value)) + "]"
    if isinstance(value, Dense):
        return f"dense<{value.type}> {_format_dense(value)}"
    return repr(value)


def _format_dense(value: Dense) -> str:
    """Numbers where a reader profits and they are exact; hexadecimal bytes otherwise."""
    array = value.numpy()
    readable = array.size <= 16 and array.dtype.kind in "iufb" and bool(np.isfinite(array).all())
    if not readable:
        return json.dumps(value.data.hex())
    return "[" + ", ".join(repr(number) for number in array.reshape(-1).tolist()) + "]"
