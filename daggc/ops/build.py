"""What importers and VJP rules say often: promotion, casts and broadcasts, made explicit as IR."""

from __future__ import annotations

from collections.abc import Sequence

from daggc.errors import TypeRuleError
from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ir.types import DTYPES

Scalar = bool | int | float | complex
Operand = Value | Scalar

_KINDS = "bifc"  # torch's categories, lowest first
_DEFAULTS = {bool: "bool", int: "i64", float: "f32", complex: "c64"}
_WIDER = {  # dtypes of one category whose common type is not simply the larger of them
    frozenset(("f16", "bf16")): "f32",
    frozenset(("i8", "u8")): "i16",
}


def kind(dtype: str) -> str:
    return DTYPES[dtype].kind


def promote_dtypes(first: str, second: str) -> str:
    """torch's promotion of two dtypes of tensors with dimensions."""
    if first == second:
        return first
    if kind(first) != kind(second):
        winner, loser = sorted((first, second), key=lambda dtype: _KINDS.index(kind(dtype)), reverse=True)
        return "c128" if kind(winner) == "c" and loser == "f64" else winner
    wider = _WIDER.get(frozenset((first, second)))
    return wider or max(first, second, key=lambda dtype: DTYPES[dtype].itemsize)


def result_dtype(*operands: Operand) -> str:
    """torch.result_type: tensors with dimensions first, then 0-d tensors, then Python scalars.

    A lower group changes the result only if it is of a higher category (bool < int < float < complex).
    """
    groups: list[list[str]] = [[], [], []]
    for operand in operands:
        if isinstance(operand, Value):
            groups[0 if operand.type.rank else 1].append(operand.type.dtype)
        else:
            groups[2].append(_DEFAULTS[type(operand)])
    result: str | None = None
    for group in groups:
        if not group:
            continue
        dtype = group[0]
        for other in group[1:]:
            dtype = promote_dtypes(dtype, other)
        if result is None or _KINDS.index(kind(dtype)) > _KINDS.index(kind(result)):
            result = dtype if result is None or kind(dtype) != "c" else promote_dtypes(result, dtype)
    if result is None:
        raise TypeRuleError("a dtype was asked of no operands")
    return result


def cast(b: Builder, x: Value, dtype: str) -> Value:
    return x if x.type.dtype == dtype else b.emit("cast", x, dtype=dtype)


def reshape(b: Builder, x: Value, shape: Sequence[int]) -> Value:
    return x if x.type.shape == tuple(shape) else b.emit("reshape", x, shape=tuple(shape))


def broadcast(b: Builder, x: Value, shape: Sequence[int]) -> Value:
    """Expand to ``shape`` by the rules of NumPy: axes align at the right, sizes are equal or 1."""
    return x if x.type.shape == tuple(shape) else b.emit("broadcast", x, shape=tuple(shape))


def permute(b: Builder, x: Value, dims: Sequence[int]) -> Value:
    return x if tuple(dims) == tuple(range(x.type.rank)) else b.emit("permute", x, dims=tuple(dims))


def transpose(b: Builder, x: Value, first: int = -2, second: int = -1) -> Value:
    """Swap two axes."""
    dims = list(range(x.type.rank))
    dims[first], dims[second] = dims[second], dims[first]
    return permute(b, x, dims)


def sum_dims(b: Builder, x: Value, dims: Sequence[int], keepdim: bool = False) -> Value:
    return b.emit("sum", x, dims=tuple(sorted(dims)), keepdim=keepdim) if dims else x


def full(b: Builder, value: Scalar, shape: Sequence[int], dtype: str) -> Value:
    return b.emit("full", value=value, shape=tuple(shape), dtype=dtype)


def zeros_like(b: Builder, x: Value) -> Value:
    return full(b, 0.0 if x.type.differentiable else 0, x.type.shape, x.type.dtype)


def broadcast_shapes(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The common shape of tensors that broadcast. Raises TypeRuleError naming the shapes if there is none."""
    rank = max(map(len, shapes))
    result: list[int] = []
    for sizes in zip(*((1,) * (rank - len(shape)) + tuple(shape) for shape in shapes), strict=True):
        wide = {size for size in sizes if size != 1}
        if len(wide) > 1:
            raise TypeRuleError(f"shapes {', '.join(map(str, shapes))} do not broadcast")
        result.append(wide.pop() if wide else 1)
    return tuple(result)


def broadcast_together(b: Builder, *values: Value) -> tuple[Value, ...]:
    shape = broadcast_shapes(*(value.type.shape for value in values))
    return tuple(broadcast(b, value, shape) for value in values)


def add(b: Builder, x: Value, y: Value) -> Value:
    return b.emit("add", x, y)


def sub(b: Builder, x: Value, y: Value) -> Value:
    return b.emit("sub", x, y)


def mul(b: Builder, x: Value, y: Value) -> Value:
    return b.emit("mul", x, y)


def neg(b: Builder, x: Value) -> Value:
    return b.emit("neg", x)


def conj(b: Builder, x: Value) -> Value:
    """The complex conjugate; of real numbers, the numbers themselves."""
    return b.emit("conj", x) if x.type.is_complex else x


def scale(b: Builder, x: Value, factor: complex) -> Value:
    """``x * factor``; nothing for a factor of 1."""
    return x if factor == 1 else b.emit("mul_scalar", x, value=factor)


def norm_dim(dim: int, rank: int) -> int:
    """A non-negative axis. Raises TypeRuleError if there is no such axis."""
    if not -max(rank, 1) <= dim < max(rank, 1):
        raise TypeRuleError(f"axis {dim} is outside a tensor of rank {rank}")
    return dim % max(rank, 1)


def norm_dims(dims: Sequence[int] | int | None, rank: int) -> tuple[int, ...]:
    """Sorted non-negative axes; all of them for None or an empty list (as torch's reductions have it)."""
    if dims is None or (not isinstance(dims, int) and not dims):
        return tuple(range(rank))
    if isinstance(dims, int):
        dims = (dims,)
    return tuple(sorted({norm_dim(dim, rank) for dim in dims})) if rank else ()
