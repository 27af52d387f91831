"""Code through torch.compile: the numbers of generated code to rounding; what cannot be compiled runs as it is."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import daggc
from daggc.backend import inductor
from daggc.backend.codegen import compile_graph
from daggc.errors import RunError
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY

F32 = TensorType("f32", (4, 8))


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    monkeypatch.setattr(inductor, "_told", set())


def graph_of(write):
    b = REGISTRY.builder("f")
    b.output(write(b, b.input(F32, "input", "x")), "output", "0")
    return b.build()


def smooth(b, x):
    return b.emit("mul", b.emit("exp", b.emit("tanh", x)), x)


def test_the_choice_is_part_of_what_is_compiled():
    graph = graph_of(smooth)
    plain, own = compile_graph(graph), compile_graph(graph, (), "inductor")
    assert own is compile_graph(graph, (), "inductor") is not plain
    assert own.source == plain.source


def test_another_name_is_refused():
    with pytest.raises(RunError, match="codegen is 'torch' or 'inductor', got 'jit'"):
        daggc.compile(nn.Linear(2, 2), codegen="jit")


def test_without_a_compiler_the_code_runs_as_it_is(monkeypatch):
    def no_compiler(function, **_):
        def fail(*_):
            raise RuntimeError("no C++ compiler found\nmore of it")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    graph, x = graph_of(lambda b, x: b.emit("sin", smooth(b, x))), torch.rand(4, 8)
    own = compile_graph(graph, (), "inductor")
    with pytest.warns(RuntimeWarning, match="@f: RuntimeError: no C\\+\\+ compiler found; it runs as generated code"):
        (result,) = own([x])
    assert torch.equal(result, compile_graph(graph)([x])[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own([x])


def test_what_is_wrong_with_the_inputs_is_not_the_compilers_fault(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    b = REGISTRY.builder("f")
    x, y = b.input(F32, "input", "x"), b.input(F32, "input", "y")
    b.output(b.emit("mul", b.emit("exp", x), y), "output", "0")
    own, ones = compile_graph(b.build(), (), "inductor"), torch.ones(4, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RunError, match="in generated code, line"):
            own([ones, torch.ones(3)])
        assert torch.equal(own([ones, ones])[0], ones.exp())


@daggc.opaque(out=lambda x: torch.empty_like(x))
def secret(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return secret(self.fc(x))


def test_python_functions_are_not_looked_into():
    model, x = Opaque(), torch.rand(4, 8)
    with pytest.warns(RuntimeWarning, match="calls a Python function of yours"):
        result = daggc.compile(model, codegen="inductor")(x)
    assert torch.equal(result, model(x))


class Dropping(nn.Module):
    """Norms, attention's softmax, random numbers: what is drawn is the same, compiled or not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.grow, self.shrink = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shrink(F.dropout(F.gelu(self.grow(self.norm(x))), 0.5, self.training))


def losses(codegen, client=None, **options):
    model = Dropping()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = daggc.compile(model, client=client, codegen=codegen).train_step(
        F.cross_entropy, optimizer, seed=3, **options
    )
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(6, 8, generator=generator), torch.randint(4, (6,), generator=generator)) for _ in range(3)]
    found = [float(step(*batch)) for batch in batches]
    step.close()
    return found


@pytest.mark.slow
def test_training_has_the_numbers_of_eager_to_rounding():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        compiled = losses("inductor")
    assert compiled == pytest.approx(losses("torch"), rel=1e-4)
    assert compiled == losses("inductor")


@pytest.mark.slow
def test_workers_compile_too(two_workers):
    assert losses("inductor", two_workers, microbatches=2) == pytest.approx(
        losses("torch", two_workers, microbatches=2), rel=1e-4
    )
    assert all(two_workers.run(compiled_here).values())


def compiled_here():
    """Whether this process runs compiled code, and has fallen back nowhere."""
    from daggc.backend.codegen import _CACHE
    from daggc.backend.inductor import _Inductor

    found = [own.function for own in _CACHE.values() if isinstance(own.function, _Inductor)]
    return bool(found) and all(function._compiled is not None for function in found)


@pytest.mark.slow
def test_inference_and_gradients():
    model, x = Dropping().eval(), torch.randn(6, 8)
    other = copy.deepcopy(model)
    own = daggc.compile(other, codegen="inductor")
    torch.testing.assert_close(own(x), model(x))
    own(x).square().sum().backward()
    model(x).square().sum().backward()
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
