"""Promotion as torch has it."""

from __future__ import annotations

import pytest
import torch

from daggc.ir.types import DTYPES
from daggc.ops.build import promote_dtypes

TORCH = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64,
    "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
    "c64": torch.complex64, "c128": torch.complex128,
}  # fmt: skip


@pytest.mark.parametrize("first", DTYPES)
def test_dtypes_promote_as_in_torch(first: str):
    for second in DTYPES:
        assert TORCH[promote_dtypes(first, second)] == torch.promote_types(TORCH[first], TORCH[second]), second
