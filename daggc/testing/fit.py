"""Samples made to fit a value that is there, so that ops join as they do in models: without a reshape between them.

A sample's sizes are renamed: ``linear`` of ``[2,3,4]`` and ``[5,4]`` read by a value of ``[4,6,8]`` becomes that of
``[4,6,8]`` and ``[5,8]``. Views and reductions, whose attributes depend on the shape, have templates of their own.
Whether the result is well typed, the op's type rule says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attr, Attrs
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.opdef import Arg, Sample
from daggc.testing.choices import Choices, pick
from daggc.testing.samples import OpSample

MOST = 256  # elements of a value that a sample is fitted to, and of what comes of it


def fitted(choices: Choices, sample: OpSample, at: int, type_: TensorType) -> OpSample | None:
    """The sample with a value of this type for argument ``at``; None if that is not well typed, or large."""
    own = sample.sample.inputs[at].type
    if type_.dtype != own.dtype or type_.device is not None:
        return None
    if type_.shape == own.shape:
        return sample
    if type_.numel > MOST or type_.numel == 0:
        return None
    template = _TEMPLATES.get(sample.op.name)
    if template is not None:
        attrs = template(choices, type_)
        made = None if attrs is None else Sample((Arg(type_),), {**sample.sample.attrs, **attrs})
    else:
        made = _renamed(sample.sample, at, type_.shape)
    if made is None:
        return None
    try:
        outputs = REGISTRY.infer(sample.op.name, [arg.type for arg in made.inputs], Attrs(made.attrs))
    except TypeRuleError:
        return None
    if max((value.numel for value in (*outputs, *(arg.type for arg in made.inputs))), default=0) > 4 * MOST:
        return None
    return replace(sample, sample=made)


def _renamed(sample: Sample, at: int, shape: tuple[int, ...]) -> Sample | None:
    """The sample with the sizes of argument ``at`` replaced everywhere; None if that is ambiguous."""
    own = sample.inputs[at].type.shape
    alike = all(arg.type.shape == own for arg in sample.inputs)
    names = dict(zip(own, shape, strict=True)) if len(own) == len(shape) else {}
    if alike:
        if len(own) != len(shape) and any(arg.domain.startswith("index:") for arg in sample.inputs):
            return None
    elif len(own) != len(shape) or any(names[old] != new for old, new in zip(own, shape, strict=True)):
        return None  # one size would get two names

    def rename(other: tuple[int, ...]) -> tuple[int, ...]:
        return shape if other == own else tuple(names.get(size, size) for size in other)

    def domain(known: str) -> str:
        size = int(known.removeprefix("index:")) if known.startswith("index:") else 0
        return f"index:{names.get(size, size)}" if size else known

    attrs: dict[str, Attr] = {
        name: rename(value) if "shape" in name and _is_sizes(value) else value for name, value in sample.attrs.items()
    }
    inputs = tuple(Arg(arg.type.with_(shape=rename(arg.type.shape)), domain(arg.domain)) for arg in sample.inputs)
    return Sample(inputs, attrs)


def _is_sizes(value: Attr) -> bool:
    return isinstance(value, tuple) and all(type(item) is int for item in value)


Template = Callable[[Choices, TensorType], dict[str, Attr] | None]


def _reshape(choices: Choices, type_: TensorType) -> dict[str, Attr]:
    """Two neighbouring axes merged, or one split in two, or an axis of size 1 added."""
    shape = type_.shape
    forms = [(*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :]) for i in range(len(shape) - 1)]
    for i, size in enumerate(shape):
        factors = [n for n in range(2, math.isqrt(size) + 1) if size % n == 0]
        if factors and len(shape) < 5:
            n = pick(choices, factors)
            forms += [(*shape[:i], n, size // n, *shape[i + 1 :]), (*shape[:i], size // n, n, *shape[i + 1 :])]
    if len(shape) < 5:
        forms += [(*shape, 1), (1, *shape)]
    return {"shape": pick(choices, forms)}


def _permute(choices: Choices, type_: TensorType) -> dict[str, Attr]:
    rest = list(range(type_.rank))
    return {"dims": tuple(rest.pop(choices.below(len(rest))) for _ in range(type_.rank))}


def _broadcast(choices: Choices, type_: TensorType) -> dict[str, Attr]:
    """Axes of size 1 grow, or a leading axis is added."""
    grown = tuple(2 + choices.below(3) if size == 1 else size for size in type_.shape)
    if grown != type_.shape and choices.below(3):
        return {"shape": grown}
    return {"shape": (2 + choices.below(2), *type_.shape)}


def _some_dims(choices: Choices, type_: TensorType) -> dict[str, Attr] | None:
    if not type_.rank:
        return None
    last = type_.rank - 1
    several = tuple(axis for axis in range(type_.rank) if choices.below(2))
    return {"dims": several if several and choices.below(2) else (last,), "keepdim": bool(choices.below(2))}


def _slice(choices: Choices, type_: TensorType) -> dict[str, Attr] | None:
    if not type_.rank:
        return None
    dim = choices.below(type_.rank)
    size = type_.shape[dim]
    start = choices.below(size)
    return {"dim": dim, "start": start, "end": start + 1 + choices.below(size - start), "step": 1 + choices.below(2)}


def _split(choices: Choices, type_: TensorType) -> dict[str, Attr] | None:
    dims = [dim for dim, size in enumerate(type_.shape) if size > 1]
    if not dims:
        return None
    dim = pick(choices, dims)
    first = 1 + choices.below(type_.shape[dim] - 1)
    return {"dim": dim, "sizes": (first, type_.shape[dim] - first)}


_TEMPLATES: dict[str, Template] = {
    "reshape": _reshape,
    "permute": _permute,
    "broadcast": _broadcast,
    "sum": _some_dims,
    "mean": _some_dims,
    "slice": _slice,
    "split": _split,
}
