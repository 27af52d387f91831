"""Holding a run to the branch that was captured."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from daggc.errors import BranchError
from daggc.ops.check import explain


def check(x: torch.Tensor, found: torch.Tensor, expected: Sequence[int], where: str) -> torch.Tensor:
    """``x``. Raises BranchError if the numbers found are not the expected ones."""
    got = tuple(int(number) for number in found.reshape(-1).tolist())
    if got != tuple(expected):
        raise BranchError(f"{explain(got, expected)} {where}".strip())
    return x
