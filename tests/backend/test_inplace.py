"""Memory that generated code writes to again: the same numbers bit for bit, and nobody can see it."""

from __future__ import annotations

import pytest
import torch
from helpers import to_torch
from hypothesis import given

from daggc.backend import codegen
from daggc.backend.codegen import compile_graph, generate
from daggc.backend.inplace import in_place
from daggc.ir.graph import Graph, Program
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.optim import adamw_update, sgd_update
from daggc.testing import programs, random_inputs

F64 = TensorType("f64", (3, 3))
SCALAR = TensorType("f64", ())
OPS = ("add", "sub", "mul", "relu", "matmul", "linear", "permute", "reshape", "slice", "broadcast", "gelu", "split")


def inputs_of(graph: Graph) -> list[torch.Tensor]:
    return [to_torch(array) for array in random_inputs(graph).values()]


def plain(graph: Graph, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Run code that writes every result into new memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codegen, "in_place", lambda graph, donated: frozenset())
        patch.setattr(codegen, "_CACHE", type(codegen._CACHE)())
        return compile_graph(graph)(inputs)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


@given(programs(ops=OPS, max_ops=16, dtypes=("f64", "f32")))
def test_nobody_can_see_that_memory_is_written_to_again(program: Program):
    graph = program.forward
    inputs = inputs_of(graph)
    before = [tensor.clone() for tensor in inputs]
    wanted = plain(graph, inputs)
    for got, want in zip(compile_graph(graph)(inputs), wanted, strict=True):
        assert same(got, want) and got.stride() == want.stride()
    assert all(same(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))


def built(write) -> Graph:
    b = REGISTRY.builder("f")
    x, y = b.input(F64, "input", "x"), b.input(F64, "input", "y")
    write(b, x, y)
    return b.build()


def test_a_sum_is_written_where_its_first_term_was():
    def write(b, x, y):
        b.output(b.emit("add", b.emit("mul", x, y), y), "output", "0")

    assert ".add_(" in generate(built(write))


def test_what_is_read_again_is_not_written_to():
    def later(b, x, y):
        z = b.emit("mul", x, y)
        b.output(b.emit("mul", b.emit("add", z, y), z), "output", "0")

    def through_a_view(b, x, y):
        z = b.emit("mul", x, y)
        view = b.emit("permute", z, dims=(1, 0))
        b.output(b.emit("add", z, y), "output", "0")
        b.output(view, "output", "1")

    def by_the_op_itself(b, x, y):
        z = b.emit("mul", x, y)
        b.output(b.emit("add", z, b.emit("permute", z, dims=(1, 0))), "output", "0")

    def as_a_result(b, x, y):
        z = b.emit("mul", x, y)
        b.output(b.emit("add", z, y), "output", "0")
        b.output(z, "output", "1")

    def given_to_us(b, x, y):
        b.output(b.emit("add", x, y), "output", "0")

    def a_view_of_what_was_given(b, x, y):
        b.output(b.emit("add", b.emit("permute", x, dims=(1, 0)), y), "output", "0")

    for write in (later, through_a_view, by_the_op_itself, as_a_result, given_to_us, a_view_of_what_was_given):
        assert not {0, 1} & in_place(built(write)), write.__name__


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_parameter_that_is_given_away_is_updated_where_it_is(kind: str):
    b = REGISTRY.builder("f")
    param, grad = b.input(F64, "param", "w"), b.input(F64, "value", "grad")
    states = [b.input(F64, "state", f"s{at}:w") for at in range(1 if kind == "sgd" else 2)]
    lr, step = b.input(SCALAR, "scalar", "lr"), b.input(SCALAR, "scalar", "step")
    options = {"donate": True, "weight_decay": 0.1, **({"momentum": 0.9} if kind == "sgd" else {})}
    update = sgd_update if kind == "sgd" else adamw_update
    for index, value in enumerate(update(b, param, grad, states, lr, step, **options)):
        b.output(value, "output", str(index))
    graph = b.build()
    inputs = [torch.rand(3, 3, dtype=torch.float64) for _ in range(2 + len(states))]
    inputs += [torch.tensor(0.1, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)]
    kept, given_away = [tensor.clone() for tensor in inputs], [tensor.clone() for tensor in inputs]
    wanted = compile_graph(graph)(kept)
    got = compile_graph(graph, [0])(given_away)
    assert torch.equal(kept[0], inputs[0]) and got[0] is given_away[0]
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
