"""dtypes and tensor types: what a value of the IR is, without what it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from daggc.errors import IRError


@dataclass(frozen=True, slots=True)
class DTypeInfo:
    """Facts about a dtype. ``kind``: ``f`` float, ``i`` integer, ``b`` bool, ``c`` complex."""

    name: str
    itemsize: int
    kind: str
    numpy: np.dtype


DTYPES: dict[str, DTypeInfo] = {
    info.name: info
    for info in (
        DTypeInfo("f64", 8, "f", np.dtype(np.float64)),
        DTypeInfo("f32", 4, "f", np.dtype(np.float32)),
        DTypeInfo("f16", 2, "f", np.dtype(np.float16)),
        DTypeInfo("bf16", 2, "f", np.dtype(ml_dtypes.bfloat16)),
        DTypeInfo("i64", 8, "i", np.dtype(np.int64)),
        DTypeInfo("i32", 4, "i", np.dtype(np.int32)),
        DTypeInfo("i16", 2, "i", np.dtype(np.int16)),
        DTypeInfo("i8", 1, "i", np.dtype(np.int8)),
        DTypeInfo("u8", 1, "i", np.dtype(np.uint8)),
        DTypeInfo("bool", 1, "b", np.dtype(np.bool_)),
        DTypeInfo("c64", 8, "c", np.dtype(np.complex64)),
        DTypeInfo("c128", 16, "c", np.dtype(np.complex128)),
    )
}

_BY_NUMPY = {info.numpy: info.name for info in DTYPES.values()}


def dtype_of(array: np.ndarray | np.generic) -> str:
    """The IR dtype of a NumPy array. Raises IRError for a dtype the IR does not have."""
    try:
        return _BY_NUMPY[array.dtype]
    except KeyError:
        raise IRError(f"NumPy dtype {array.dtype} is not one of the IR's: {', '.join(DTYPES)}") from None


@dataclass(frozen=True, slots=True)
class TensorType:
    """dtype, static shape, and, in a placed graph, the device that holds the value.

    Printed ``f32[8,128]`` or ``f32[8,128]@cpu:0``; a scalar is ``f32[]``.
    """

    dtype: str
    shape: tuple[int, ...]
    device: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise IRError(f"dtype {self.dtype!r} is not one of the IR's: {', '.join(DTYPES)}")
        if any(type(size) is not int or size < 0 for size in self.shape):
            raise IRError(f"a shape is made of non-negative ints, got {self.shape!r}")

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize

    @property
    def numpy_dtype(self) -> np.dtype:
        return DTYPES[self.dtype].numpy

    @property
    def is_float(self) -> bool:
        return DTYPES[self.dtype].kind == "f"

    @property
    def is_complex(self) -> bool:
        return DTYPES[self.dtype].kind == "c"

    @property
    def is_integer(self) -> bool:
        """Integers only; bool is not one."""
        return DTYPES[self.dtype].kind == "i"

    @property
    def differentiable(self) -> bool:
        """Whether values of this type can have a cotangent: floats and complex numbers."""
        return self.is_float or self.is_complex

    def with_(self, **changes: object) -> TensorType:
        """A copy with ``dtype``, ``shape`` or ``device`` replaced."""
        return replace(self, **changes)  # pyright: ignore[reportArgumentType]  # fields checked by replace

    def __str__(self) -> str:
        shape = ",".join(map(str, self.shape))
        place = f"@{self.device}" if self.device else ""
        return f"{self.dtype}[{shape}]{place}"
