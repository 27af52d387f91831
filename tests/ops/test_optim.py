"""Updates against torch.optim, in NumPy and in generated code."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import to_numpy, to_torch

from daggc.backend.codegen import compile_graph
from daggc.errors import TypeRuleError
from daggc.interp import interpret_graph
from daggc.ir.graph import Graph
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.ops.optim import SCALAR, adamw_states, adamw_update, clip_coefficient, sgd_states, sgd_update

SHAPE = (5, 3)
SGD = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "nesterov": True},
]
ADAM = [
    dict(zip(("decoupled", "amsgrad", "maximize", "weight_decay"), flags, strict=True))
    for flags in itertools.product((True, False), (True, False), (True, False), (0.0, 0.1))
]


def update_graph(kind: str, options: dict, dtype: str = "f64", donate: bool = False) -> Graph:
    b = REGISTRY.builder("update")
    type_ = TensorType(dtype, SHAPE)
    names = sgd_states(options.get("momentum", 0.0)) if kind == "sgd" else adamw_states(options["amsgrad"])
    param, grad = b.input(type_, "param", "w"), b.input(type_, "input", "grad")
    states = [b.input(type_, "state", name) for name in names]
    lr, step = b.input(SCALAR, "scalar", "lr"), b.input(SCALAR, "scalar", "step")
    update = sgd_update if kind == "sgd" else adamw_update
    for value in update(b, param, grad, states, lr, step, donate=donate, **options):
        b.output(value, "output", value.name)
    return b.build()


def torch_steps(kind: str, options: dict, param: np.ndarray, grads, rates, dtype=torch.float64):
    weight = torch.nn.Parameter(torch.from_numpy(param.copy()).to(dtype))
    names = dict(options)
    if kind == "sgd":
        optimizer = torch.optim.SGD([weight], lr=1.0, foreach=False, **names)
    else:
        cls = torch.optim.AdamW if names.pop("decoupled") else torch.optim.Adam
        optimizer = cls([weight], lr=1.0, betas=(0.9, 0.999), foreach=False, **names)
    for grad, rate in zip(grads, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.from_numpy(grad.copy()).to(dtype)
        optimizer.step()
    state = optimizer.state[weight]
    keys = sgd_states(options.get("momentum", 0.0)) if kind == "sgd" else adamw_states(options["amsgrad"])
    return [to_numpy(weight), *(to_numpy(state[key]) for key in keys)]


def our_steps(run, graph: Graph, param: np.ndarray, grads, rates):
    values = [param, *(np.zeros_like(param) for port in graph.inputs_of("state"))]
    for index, (grad, rate) in enumerate(zip(grads, rates, strict=True)):
        arrays = [values[0], grad.astype(param.dtype), *values[1:], np.asarray(rate), np.asarray(index + 1.0)]
        values = run(graph, arrays)
    return values


def run_compiled(graph: Graph, arrays):
    return [to_numpy(x) for x in compile_graph(graph)([to_torch(a) for a in arrays])]


CASES = [("sgd", options) for options in SGD] + [("adam", options) for options in ADAM]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
@pytest.mark.parametrize("run", [interpret_graph, run_compiled])
def test_five_steps_equal_torch(kind, options, run):
    rng = np.random.default_rng(0)
    param, grads = rng.normal(size=SHAPE), rng.normal(size=(5, *SHAPE))
    rates = (0.1, 0.05, 0.2, 0.1, 0.01)
    wanted = torch_steps(kind, options, param, grads, rates)
    got = our_steps(run, update_graph(kind, options), param, grads, rates)
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("kind", "options"), [CASES[3], CASES[5]], ids=str)
def test_low_precision(kind, options, dtype):
    graph = update_graph(kind, options, dtype)
    rng = np.random.default_rng(1)
    arrays = [np.abs(rng.normal(size=SHAPE)).astype(p.value.type.numpy_dtype) for p in graph.inputs[:-2]]
    arrays += [np.asarray(0.1), np.asarray(2.0)]
    for got, wanted in zip(run_compiled(graph, arrays), interpret_graph(graph, arrays), strict=True):
        assert got.dtype == wanted.dtype
        tolerance = 1e-5 if dtype == "f32" else 2e-2
        np.testing.assert_allclose(got.astype(np.float64), wanted.astype(np.float64), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("kind", "options"), [CASES[3], CASES[5]], ids=str)
@pytest.mark.parametrize("dtype", ["f64", "bf16"])
def test_donated_state_is_reused_and_parameters_never_written(kind, options, dtype):
    for donate in (False, True):
        graph = update_graph(kind, options, dtype, donate)
        tensors = [to_torch(np.ones(p.value.type.shape, p.value.type.numpy_dtype)) for p in graph.inputs]
        before = [tensor.clone() for tensor in tensors]
        results = compile_graph(graph)(tensors)
        assert torch.equal(tensors[0], before[0]) and torch.equal(tensors[1], before[1])
        states = len(graph.inputs_of("state"))
        for result, given, old in zip(results[1:], tensors[2 : 2 + states], before[2:], strict=False):
            assert (result.data_ptr() == given.data_ptr()) == donate
            assert donate or torch.equal(given, old)


def clip_graph(count: int) -> Graph:
    b = REGISTRY.builder("clip")
    grads = [b.input(TensorType("f64", SHAPE), "input", str(index)) for index in range(count)]
    norms = [b.emit("squared_norm", grad) for grad in grads]
    for value in clip_coefficient(b, norms, b.input(SCALAR, "scalar", "max_norm")):
        b.output(value, "output", value.name)
    return b.build()


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
@pytest.mark.parametrize("run", [interpret_graph, run_compiled])
def test_clipping_by_the_global_norm(max_norm, run):
    rng = np.random.default_rng(2)
    arrays = list(rng.normal(size=(3, *SHAPE)))
    weights = [torch.nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64)) for _ in arrays]
    for weight, array in zip(weights, arrays, strict=True):
        weight.grad = torch.from_numpy(array.copy())
    total = torch.nn.utils.clip_grad_norm_(weights, max_norm)
    coefficient, norm = run(clip_graph(3), [*arrays, np.asarray(max_norm)])
    np.testing.assert_allclose(norm, total.item(), rtol=1e-14)
    for weight, array in zip(weights, arrays, strict=True):
        np.testing.assert_allclose(array * coefficient, to_numpy(weight.grad), rtol=1e-12)


def test_wrong_inputs_are_type_errors():
    b = REGISTRY.builder("update")
    param = b.input(TensorType("f32", SHAPE), "param", "w")
    scalar = b.input(SCALAR, "scalar", "lr")
    with pytest.raises(TypeRuleError, match="exp_avg"):
        adamw_update(b, param, param, [], scalar, scalar)
    with pytest.raises(TypeRuleError, match="one type"):
        sgd_update(b, param, b.input(TensorType("f64", SHAPE), "input", "g"), [], scalar, scalar)
    with pytest.raises(TypeRuleError, match="f64"):
        sgd_update(b, param, param, [], b.input(TensorType("f32", ()), "scalar", "r"), scalar)
