"""Arguments and results of a model, taken apart into tensors and put together again.

Unlike ``torch.utils._pytree`` this needs no registration: dataclasses, named tuples, transformers'
``ModelOutput`` and any object that holds tensors in its attributes (a key-value cache) are containers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch

from daggc.errors import CaptureError, DataDependentError
from daggc.ir.tree import LEAF, Tree

Rebuild = Callable[[Iterator[Any]], Any]


@dataclass(frozen=True)
class Spec:
    """A structure without its tensors: ``tree`` as data, ``rebuild(leaves)`` as Python objects.

    Attributes:
        fixed: what tells constants apart that the tree knows only by the name of their type (dtypes, functions).
    """

    tree: Tree
    rebuild: Rebuild
    fixed: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal to itself only, and kept alive, so that no other object is taken for it."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


# Constants whose text says all of them.
_PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format, complex, bytes, slice, range, Enum, np.generic)


def _telling(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    return (type(value), repr(value)) if isinstance(value, _PLAIN) else _Same(value)


def flatten(value: Any) -> tuple[list[torch.Tensor], Spec]:
    """The tensors of a structure, in order, and the rest of it. Raises CaptureError for a cyclic structure."""
    leaves: list[torch.Tensor] = []
    fixed: list[Any] = []
    spec = _flatten(value, leaves, fixed, ())
    return leaves, Spec(spec.tree, spec.rebuild, tuple(fixed))


def _flatten(value: Any, leaves: list[torch.Tensor], fixed: list[Any], above: tuple[int, ...]) -> Spec:
    if isinstance(value, torch.Tensor):
        leaves.append(value)
        return Spec(LEAF, next)
    if value is None or isinstance(value, bool | int | float | str):
        return Spec(Tree("const", value=value), lambda _: value)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        raise DataDependentError("the model returns a number taken from a tensor's data (item()); return the tensor")
    if id(value) in above:
        raise CaptureError(f"an argument or result contains itself: a {type(value).__name__} inside itself")
    above = (*above, id(value))
    if isinstance(value, list | tuple):
        return _flatten_sequence(value, leaves, fixed, above)
    if isinstance(value, Mapping):
        return _flatten_mapping(value, leaves, fixed, above)
    return _flatten_object(value, leaves, fixed, above)


def _flatten_sequence(value: Any, leaves: list[torch.Tensor], fixed: list[Any], above: tuple[int, ...]) -> Spec:
    parts = [_flatten(item, leaves, fixed, above) for item in value]
    children = tuple(part.tree for part in parts)
    kind = type(value)
    if hasattr(value, "_fields"):  # a named tuple
        tree = Tree("object", children, tuple(value._fields), f"{kind.__module__}:{kind.__qualname__}")
        return Spec(tree, lambda tensors: kind(*(part.rebuild(tensors) for part in parts)))
    if kind.__module__ == "torch.return_types":
        names = tuple(f"{index}" for index in range(len(parts)))
        tree = Tree("object", children, names, f"{kind.__module__}:{kind.__qualname__}")
        return Spec(tree, lambda tensors: kind(part.rebuild(tensors) for part in parts))
    if isinstance(value, torch.Size):
        return Spec(Tree("tuple", children), lambda tensors: torch.Size(part.rebuild(tensors) for part in parts))
    container = list if isinstance(value, list) else tuple
    return Spec(Tree(container.__name__, children), lambda tensors: container(p.rebuild(tensors) for p in parts))


def _flatten_mapping(value: Any, leaves: list[torch.Tensor], fixed: list[Any], above: tuple[int, ...]) -> Spec:
    if len({str(key) for key in value}) != len(value):
        raise CaptureError(f"keys of a dict in arguments or results differ as text, got {list(value)[:5]}")
    fixed += [key for key in value if not isinstance(key, str)]
    parts = {key: _flatten(item, leaves, fixed, above) for key, item in value.items()}
    children = tuple(part.tree for part in parts.values())
    keys = tuple(map(str, parts))
    kind = type(value)
    if kind is dict:
        tree = Tree("dict", children, keys)
    else:  # OrderedDict, BatchEncoding, ModelOutput: rebuilt from keywords or from a dict
        tree = Tree("object", children, keys, f"{kind.__module__}:{kind.__qualname__}")
    by_keyword = hasattr(kind, "__dataclass_fields__")

    def rebuild(tensors: Iterator[Any]) -> Any:
        items = {key: part.rebuild(tensors) for key, part in parts.items()}
        return kind(**items) if by_keyword else kind(items)

    return Spec(tree, rebuild)


def _flatten_object(value: Any, leaves: list[torch.Tensor], fixed: list[Any], above: tuple[int, ...]) -> Spec:
    """An object whose attributes hold tensors is a container; any other is a constant."""
    kind = type(value)
    name = f"{kind.__module__}:{kind.__qualname__}"
    constant = Spec(Tree("const", value=name), lambda _: value)
    plain = isinstance(value, _PLAIN) or not hasattr(value, "__dict__")
    if plain or isinstance(value, torch.nn.Module | type) or callable(value):
        fixed.append(_telling(value))
        return constant
    before = len(leaves)
    parts = {key: _flatten(item, leaves, fixed, above) for key, item in vars(value).items()}
    if len(leaves) == before:
        fixed.append((name, tuple((key, str(part.tree)) for key, part in parts.items())))
        return constant

    def rebuild(tensors: Iterator[Any]) -> Any:
        made = copy.copy(value)
        for key, part in parts.items():
            object.__setattr__(made, key, part.rebuild(tensors))
        return made

    return Spec(Tree("object", tuple(part.tree for part in parts.values()), tuple(parts), name), rebuild)


def input_names(tree: Tree) -> list[str]:
    """Names of the leaves of ``(args, kwargs)``: ``0`` for the first argument, ``labels`` for a keyword."""
    return [path.partition(".")[2] for path in tree.leaf_paths()]
