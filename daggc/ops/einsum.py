"""``torch.einsum`` by permute, reshape and matmul: operands are contracted from left to right.

For each pair of operands, an index is one of four kinds: *batch* (in both, needed later), *inner* (in both,
summed), *left* or *right* (in one of them). With the axes of each kind merged, the pair is one batched
product of matrices ``(batch, left, inner) @ (batch, inner, right)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from daggc.errors import TypeRuleError
from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ops.build import broadcast_together, cast, mul, permute, promote_dtypes, reshape, sum_dims
from daggc.ops.slicing import diagonal


@dataclass(frozen=True)
class _Term:
    """An operand and the index of each of its axes."""

    value: Value
    indices: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.indices, self.value.type.shape, strict=True))


def import_einsum(b: Builder, equation: str, tensors: Sequence[Value], **_: Any) -> Value:
    """Raises TypeRuleError if the equation is malformed or sizes of one index differ."""
    terms, output = _parse(equation, [x.type.rank for x in tensors])
    dtype = tensors[0].type.dtype
    for x in tensors[1:]:
        dtype = promote_dtypes(dtype, x.type.dtype)
    operands = [_distinct(b, _Term(cast(b, x, dtype), term)) for x, term in zip(tensors, terms, strict=True)]
    sizes = _sizes(equation, operands)
    operands = [_drop_broadcast(b, operand, sizes) for operand in operands]
    result = operands[0]
    for position, operand in enumerate(operands[1:], start=1):
        later = {index for rest in operands[position + 1 :] for index in rest.indices} | set(output)
        result = _contract(b, _sum_out(b, result, {*later, *operand.indices}), operand, later)
    result = _sum_out(b, result, set(output))
    return permute(b, result.value, [result.indices.index(index) for index in output])


def _parse(equation: str, ranks: Sequence[int]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """The indices of operands and of the result; those of an ellipsis are numbers, from the right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise TypeRuleError(f"einsum {equation!r} has {len(terms)} operands, {len(ranks)} were given")
    widths = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    for term, width, rank in zip(terms, widths, ranks, strict=True):
        if width < 0 or (width and "..." not in term) or not _letters(term):
            raise TypeRuleError(f"einsum {equation!r}: {term!r} does not name the {rank} axes of its operand")
    widest = max(widths)
    parsed = [_indices(term, width) for term, width in zip(terms, widths, strict=True)]
    if arrow:
        output = _indices(right, widest if "..." in right else 0)
    else:
        named = left.replace(",", "").replace("...", "")
        output = (*map(str, reversed(range(widest))), *sorted(index for index in set(named) if named.count(index) == 1))
    known = {index for term in parsed for index in term}
    if len(set(output)) != len(output) or not set(output) <= known:
        raise TypeRuleError(f"einsum {equation!r}: indices of the result must be distinct ones of the operands")
    return parsed, output


def _letters(term: str) -> bool:
    named = term.replace("...", "", 1)
    return not named or (named.isascii() and named.isalpha())


def _indices(term: str, width: int) -> tuple[str, ...]:
    before, dots, after = term.partition("...")
    return (*before, *(map(str, reversed(range(width))) if dots else ()), *after)


def _distinct(b: Builder, term: _Term) -> _Term:
    """The diagonal where an operand has an index twice."""
    for index in dict.fromkeys(term.indices):
        while term.indices.count(index) > 1:
            first = term.indices.index(index)
            second = term.indices.index(index, first + 1)
            shape = term.value.type.shape
            if shape[first] != shape[second]:
                raise TypeRuleError(f"einsum: index {index!r} has sizes {shape[first]} and {shape[second]}")
            others = tuple(name for axis, name in enumerate(term.indices) if axis not in (first, second))
            term = _Term(diagonal(b, term.value, 0, first, second), (*others, index))
    return term


def _sizes(equation: str, operands: Iterable[_Term]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for operand in operands:
        for index, size in operand.sizes.items():
            known = sizes.setdefault(index, size)
            if known != size and 1 not in (known, size):
                raise TypeRuleError(f"einsum {equation!r}: index {index!r} has sizes {known} and {size}")
            sizes[index] = size if known == 1 else known
    return sizes


def _drop_broadcast(b: Builder, term: _Term, sizes: Mapping[str, int]) -> _Term:
    """An axis of size 1 that meets a larger one is the same for all of it: it can be left out."""
    kept = tuple(index for index, size in term.sizes.items() if size == sizes[index])
    return _Term(reshape(b, term.value, [sizes[index] for index in kept]), kept)


def _sum_out(b: Builder, term: _Term, needed: set[str]) -> _Term:
    dims = [axis for axis, index in enumerate(term.indices) if index not in needed]
    return _Term(sum_dims(b, term.value, dims), tuple(index for index in term.indices if index in needed))


def _contract(b: Builder, x: _Term, y: _Term, later: set[str]) -> _Term:
    """One product of two operands; ``later``: the indices that are still needed."""
    y = _sum_out(b, y, {*later, *x.indices})
    sizes = x.sizes | y.sizes
    batch = [index for index in x.indices if index in y.indices and index in later]
    inner = [index for index in x.indices if index in y.indices and index not in later]
    left = [index for index in x.indices if index not in y.indices]
    right = [index for index in y.indices if index not in x.indices]
    result = (*batch, *left, *right)
    if not inner:
        columns = [_aligned(b, term, result) for term in (x, y)]
        return _Term(mul(b, *broadcast_together(b, *columns)), result)
    b_, l_, i_, r_ = (math.prod(sizes[index] for index in group) for group in (batch, left, inner, right))
    lead = (b_,) if batch else ()
    first = reshape(b, _order(b, x, (*batch, *left, *inner)), (*lead, l_, i_))
    second = reshape(b, _order(b, y, (*batch, *inner, *right)), (*lead, i_, r_))
    product = b.emit("matmul", first, second)
    return _Term(reshape(b, product, [sizes[index] for index in result]), result)


def _order(b: Builder, term: _Term, indices: Sequence[str]) -> Value:
    return permute(b, term.value, [term.indices.index(index) for index in indices])


def _aligned(b: Builder, term: _Term, indices: Sequence[str]) -> Value:
    """The operand with its axes in order, and axes of size 1 for the indices it does not have."""
    own = [index for index in indices if index in term.indices]
    sizes = term.sizes
    return reshape(b, _order(b, term, own), [sizes.get(index, 1) for index in indices])
