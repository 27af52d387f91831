"""Structures taken apart and put together again."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from daggc.errors import CaptureError
from daggc.frontend.pytree import flatten, input_names
from daggc.ir.tree import tree_from_json


@dataclass
class Data:
    x: Any
    note: str = ""


Named = namedtuple("Named", "a b")


def one(value: float = 1.0) -> torch.Tensor:
    return torch.full((2,), value)


def cache() -> DynamicCache:
    made = DynamicCache()
    made.update(torch.ones(1, 1, 2, 3), torch.zeros(1, 1, 2, 3), 0)
    return made


STRUCTURES = {
    "tensor": one(),
    "nothing": None,
    "nested": [(one(), [one(2)]), {"a": {"b": one(3), 4: one(4)}}, 5, "six", True, 1.5],
    "empty": [(), {}, []],
    "dataclass": Data(one(), "kept"),
    "named tuple": Named(one(), None),
    "ordered dict": OrderedDict(b=one(), a=one(2)),
    "model output": BaseModelOutput(last_hidden_state=one(), hidden_states=(one(2), one(3))),
    "cache": {"past": cache()},
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_round_trip_with_new_tensors(name: str) -> None:
    value = STRUCTURES[name]
    leaves, spec = flatten(value)
    assert spec.tree.leaves == len(leaves) == len(list(spec.tree.leaf_paths()))
    assert tree_from_json(spec.tree.to_json()) == spec.tree
    rebuilt = spec.rebuild(iter([leaf + 1 for leaf in leaves]))
    assert type(rebuilt) is type(value)
    again, same = flatten(rebuilt)
    assert str(same.tree) == str(spec.tree)
    assert all(torch.equal(mine, theirs + 1) for mine, theirs in zip(again, leaves, strict=True))


def test_rebuilding_leaves_the_original_alone() -> None:
    original = cache()
    leaves, spec = flatten(original)
    rebuilt = spec.rebuild(iter([leaf * 0 - 7 for leaf in leaves]))
    assert rebuilt is not original
    assert float(original.layers[0].keys.sum()) == 6
    assert float(rebuilt.layers[0].keys.sum()) == -42


def test_names_of_arguments() -> None:
    _, spec = flatten(((one(), [one()]), {"labels": one(), "past": {"k": one()}}))
    assert input_names(spec.tree) == ["0", "1.0", "labels", "past.k"]


def test_keys_that_are_not_strings() -> None:
    leaves, spec = flatten({(1, 2): one(), 3: None})
    assert spec.rebuild(iter(leaves)) == {(1, 2): leaves[0], 3: None}


def test_what_cannot_be_taken_apart() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(CaptureError, match="contains itself"):
        flatten(loop)
    with pytest.raises(CaptureError, match="keys of a dict"):
        flatten({1: one(), "1": one()})
