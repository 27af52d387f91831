"""Derivatives of powers of numbers whose logarithm is infinite or none, as autograd has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import assert_close, to_numpy, to_torch

from daggc.interp import interpret
from daggc.ir.graph import Program
from daggc.ops import REGISTRY
from daggc.ops.opdef import t
from daggc.passes.vjp import vjp

EXPONENTS = np.array([-1.0, -0.5, -0.0, 0.0, 0.5, 2.0])


@pytest.mark.parametrize("base", [0.0, -2.0])
def test_the_gradient_of_an_exponent(base: float):
    b = REGISTRY.builder("forward")
    b.output(b.emit("rpow_scalar", b.input(t(6), "input", "0"), value=base), "output", "0")
    ct = np.linspace(-1.0, 1.0, 6)
    with np.errstate(all="ignore"):
        found = interpret(vjp(Program({"forward": b.build()})), {"input:0": EXPONENTS, "cotangent:output:0": ct})
    x = to_torch(EXPONENTS).requires_grad_()
    (wanted,) = torch.autograd.grad(base**x, x, to_torch(ct))
    assert_close(found["grad:input:0"], to_numpy(wanted))
