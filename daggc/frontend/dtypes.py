"""torch dtypes and the IR's."""

from __future__ import annotations

import torch

from daggc.errors import CaptureError
from daggc.ir.types import TensorType

TO_TORCH: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
    "c64": torch.complex64,
    "c128": torch.complex128,
}
FROM_TORCH = {dtype: name for name, dtype in TO_TORCH.items()}


def ir_dtype(dtype: torch.dtype) -> str:
    """The IR's name of a torch dtype. Raises CaptureError for one that the IR does not have."""
    try:
        return FROM_TORCH[dtype]
    except KeyError:
        raise CaptureError(f"dtype {dtype} is not one of the IR's: {', '.join(TO_TORCH)}") from None


def ir_type(tensor: torch.Tensor) -> TensorType:
    """The IR type of a tensor (fake tensors too), without a device. Raises CaptureError if the IR cannot hold it."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else tensor.layout
        raise CaptureError(f"a {kind} tensor of shape {list(tensor.shape)}: daggc holds dense tensors; make it dense")
    return TensorType(ir_dtype(tensor.dtype), tuple(int(size) for size in tensor.shape))
