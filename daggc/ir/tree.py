"""The pytree of a model's arguments or result, as data.

A tree is a leaf (one tensor), a constant (a number, a string, None: captured as it was), or a container. An
``object`` is a container that torch knows how to rebuild (a dataclass, a transformers ``ModelOutput``);
without torch it comes back as a dict of its fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from daggc.errors import IRError

CONTAINERS = ("tuple", "list", "dict", "object")


@dataclass(frozen=True, slots=True)
class Tree:
    """``kind``: leaf, const, tuple, list, dict or object; ``value``: a constant, or an object's type name."""

    kind: str
    children: tuple[Tree, ...] = ()
    keys: tuple[str, ...] = ()
    value: Any = None

    @property
    def leaves(self) -> int:
        return 1 if self.kind == "leaf" else sum(child.leaves for child in self.children)

    def leaf_paths(self, prefix: str = "") -> Iterator[str]:
        """The path of each leaf, keys and positions joined by dots: ``0``, ``labels``, ``1.0.key``."""
        if self.kind == "leaf":
            yield prefix or "0"
        names = self.keys or tuple(map(str, range(len(self.children))))
        for name, child in zip(names, self.children, strict=True):
            yield from child.leaf_paths(f"{prefix}.{name}" if prefix else name)

    def unflatten(self, leaves: Iterator[Any]) -> Any:
        """Rebuild the structure around the leaves; objects become dicts."""
        if self.kind == "leaf":
            return next(leaves)
        if self.kind == "const":
            return self.value
        parts = [child.unflatten(leaves) for child in self.children]
        if self.kind == "tuple":
            return tuple(parts)
        return parts if self.kind == "list" else dict(zip(self.keys, parts, strict=True))

    def to_json(self) -> Any:
        if self.kind == "leaf":
            return "*"
        if self.kind == "const":
            return {"const": self.value}
        children = [child.to_json() for child in self.children]
        if self.kind in ("tuple", "list"):
            return {self.kind: children}
        fields = {self.kind: [list(pair) for pair in zip(self.keys, children, strict=True)]}
        return fields if self.value is None else {**fields, "type": self.value}

    def __str__(self) -> str:
        return json.dumps(self.to_json())


LEAF = Tree("leaf")


def tree_from_json(data: Any) -> Tree:
    """Read what ``Tree.to_json`` wrote. Raises IRError for anything else."""
    if data == "*":
        return LEAF
    if isinstance(data, dict):
        if set(data) == {"const"} and isinstance(data["const"], bool | int | float | str | None):
            return Tree("const", value=data["const"])
        for kind in CONTAINERS:
            if isinstance(data.get(kind), list):
                return _container(kind, data[kind], data.get("type"))
    raise IRError(f"not a pytree: {json.dumps(data)[:80]}")


def _container(kind: str, items: list[Any], type_name: str | None) -> Tree:
    if kind in ("tuple", "list"):
        return Tree(kind, tuple(tree_from_json(item) for item in items))
    if type_name is not None and not isinstance(type_name, str):
        raise IRError(f"not a pytree: the type of a {kind} is a string, got {type_name!r}")
    if not all(isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) for item in items):
        raise IRError(f"not a pytree: a {kind} is a list of [key, tree] pairs")
    return Tree(kind, tuple(tree_from_json(item) for _, item in items), tuple(key for key, _ in items), type_name)
