"""softmax of numbers whose exponentials overflow, or are all zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import assert_close, to_numpy, to_torch

from daggc.interp import interpret_graph
from daggc.ops import REGISTRY
from daggc.ops.opdef import t

ROWS = np.array([[1000.0, 999.0, -1000.0], [-1000.0, -1001.0, -1002.0], [0.0, -2000.0, 2000.0]])


@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_large_numbers_are_shifted_before_their_exponentials(op: str):
    b = REGISTRY.builder("one")
    b.output(b.emit(op, b.input(t(3, 3), "input", "0"), dim=1), "output", "0")
    (got,) = interpret_graph(b.build(), [ROWS])
    assert_close(got, to_numpy(getattr(torch, op)(to_torch(ROWS), 1)))
