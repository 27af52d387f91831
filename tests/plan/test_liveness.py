"""Bytes alive while a body runs."""

from __future__ import annotations

from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.build import reshape
from daggc.plan.liveness import peak_bytes

MATRIX = TensorType("f32", (100, 100))
SIZE = MATRIX.nbytes


def test_values_are_freed_after_their_last_use():
    b = REGISTRY.builder("body")
    x = b.input(MATRIX, "input", "0")
    for _ in range(5):
        x = b.emit("tanh", x)
    b.output(x, "output", "0")
    assert peak_bytes(b.build()) == 2 * SIZE


def test_outputs_stay_and_inputs_do_not_count():
    b = REGISTRY.builder("body")
    x = b.input(MATRIX, "input", "0")
    for index in range(3):
        x = b.emit("tanh", x)
        b.output(x, "output", str(index))
    assert peak_bytes(b.build()) == 3 * SIZE


def test_views_share_memory_until_a_copy_is_needed():
    b = REGISTRY.builder("body")
    x = b.emit("tanh", b.input(MATRIX, "input", "0"))
    view = reshape(b, x, (10_000,))
    b.output(b.emit("sin", view), "output", "0")
    assert peak_bytes(b.build()) == 2 * SIZE
    b = REGISTRY.builder("body")
    x = b.emit("tanh", b.input(MATRIX, "input", "0"))
    copied = reshape(b, b.emit("permute", x, dims=(1, 0)), (10_000,))
    b.output(x, "output", "0")
    b.output(b.emit("sin", copied), "output", "1")
    assert peak_bytes(b.build()) == 3 * SIZE


def test_a_body_that_makes_nothing_needs_nothing():
    b = REGISTRY.builder("body")
    b.output(reshape(b, b.input(MATRIX, "input", "0"), (10_000,)), "output", "0")
    assert peak_bytes(b.build()) == 0
