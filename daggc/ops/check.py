"""``check``: holds a run to what the capture saw.

A model whose Python decides on numbers of a tensor (``if x.max() > 3``) is captured along the branch that its example
inputs took. ``check`` passes a value on, and fails if the numbers that decided are others now.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from daggc.errors import BranchError, located
from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.opdef import AS_IT_IS, Arg, OpDef, Sample, register, require, t, view_cost, whole


def _infer(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, found = inputs
    require(found.is_integer or found.dtype == "bool", f"integers or bools decide, got {found}")
    require(len(attrs["expected"]) == found.numel, f"expected has {len(attrs['expected'])} numbers for {found}")
    return (x,)


def _evaluate(node: Node, x: np.ndarray, found: np.ndarray) -> np.ndarray:
    got = tuple(int(number) for number in found.reshape(-1))
    if got != node.attrs["expected"]:
        raise BranchError(located(explain(got, node.attrs["expected"]), node.path, node.source))
    return x


def explain(got: Sequence[int], expected: Sequence[int]) -> str:
    return (
        f"the model's Python decides on numbers of a tensor, which were {list(expected)} when it was captured and are "
        f"{list(got)} in this call; it has to be captured again"
    )


def _vjp(b: Builder, node: Node, cts: Sequence[Value | None]) -> Sequence[Value | None]:
    return cts[0], None


def _lower(node: Node, args: Sequence[str]) -> str:
    where = located("", node.path, node.source).strip()
    return f"kernels.check({args[0]}, {args[1]}, {node.attrs['expected']!r}, {where!r})"


register(
    OpDef(
        name="check",
        infer=_infer,
        evaluate=_evaluate,
        vjp=_vjp,
        cost=view_cost,
        axes=whole,  # a part of a batch would decide otherwise
        lower=_lower,
        aten={},
        complex=AS_IT_IS,
        samples=(
            Sample((Arg(t(2, 3)), Arg(t(dtype="i64"), "index:1")), {"expected": (0,)}),
            Sample((Arg(t(2)), Arg(t(3, dtype="i32"), "index:1")), {"expected": (0, 0, 0)}),
        ),
    )
)
