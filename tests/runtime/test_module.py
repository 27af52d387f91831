"""The compiled module as a drop-in ``nn.Module``: names, modes, signatures, arguments, results, refusals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import daggc
from daggc.errors import CaptureError, DataDependentError

pytestmark = pytest.mark.timeout(120)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()


class Function(nn.Module):
    """A module that does what a function says, with one parameter."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 4, dtype=torch.float64))
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.weight, *args, **kwargs)


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (3, 4)), dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_is_a_module_with_the_models_own_names_and_tensors() -> None:
    model = small()
    compiled = daggc.compile(model)
    assert isinstance(compiled, nn.Module)
    assert list(compiled.state_dict()) == list(model.state_dict())
    mine, theirs = dict(compiled.named_parameters()), dict(model.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in mine)
    assert [name for name, _ in compiled.named_modules()] == [name for name, _ in model.named_modules()]
    assert all(a is b for a, b in zip(compiled.buffers(), model.buffers(), strict=True))


def test_load_state_dict_and_replaced_parameters_are_seen() -> None:
    model, other = small(), small()
    nn.init.ones_(other[0].weight)
    compiled = daggc.compile(model)
    compiled(x())
    compiled.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled.eval()(x()), other.eval()(x()), rtol=0, atol=1e-12)
    other[0].weight = model[0].weight = nn.Parameter(torch.full((6, 4), 0.3, dtype=torch.float64))
    torch.testing.assert_close(compiled(x()), other(x()), rtol=0, atol=1e-12)


def test_train_and_eval_modes_of_single_modules_count() -> None:
    model = small()
    eager, compiled = copy.deepcopy(model), daggc.compile(model)
    for step in range(4):
        eager.train(step % 2 == 0)
        compiled.train(step % 2 == 0)
        assert compiled.training == model.training == (step % 2 == 0)
        torch.testing.assert_close(compiled(x()), eager(x()), rtol=0, atol=1e-12)
    model.train()
    model[2].eval()  # behind the compiled module's back
    eager.train()
    eager[2].eval()
    torch.testing.assert_close(compiled(x()), eager(x()), rtol=0, atol=1e-12)
    for mine, theirs in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_each_signature_is_captured_once_and_the_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small().eval()
    compiled = daggc.compile(model)
    monkeypatch.setattr("daggc.runtime.module._CACHE_SIZE", 3)  # sixteen, but that takes long
    for size in range(1, 6):
        torch.testing.assert_close(compiled(x(size, 4)), model(x(size, 4)), rtol=0, atol=1e-12)
    assert len(compiled._entries) == 3
    before = set(map(id, compiled._entries.values()))
    compiled(x(4, 4))
    compiled(x(3, 4))
    assert set(map(id, compiled._entries.values())) == before


def test_an_evicted_signature_still_runs_its_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small().eval()
    compiled = daggc.compile(model)
    monkeypatch.setattr("daggc.runtime.module._CACHE_SIZE", 1)
    loss = compiled(x(1, 4)).sum()
    for size in range(2, 4):
        compiled(x(size, 4))
    loss.backward()
    expected = torch.autograd.grad(model(x(1, 4)).sum(), model[0].weight)[0]
    torch.testing.assert_close(model[0].weight.grad, expected, rtol=0, atol=1e-12)


def test_frozen_parameters_get_no_gradient_and_thawing_is_seen() -> None:
    model = small().eval()
    model[0].requires_grad_(False)
    compiled = daggc.compile(model)
    compiled(x()).sum().backward()
    assert model[0].weight.grad is None
    assert model[3].weight.grad is not None
    model[0].requires_grad_(True)
    compiled(x()).sum().backward()
    assert model[0].weight.grad is not None


def test_nothing_trainable_gives_results_without_gradients() -> None:
    compiled = daggc.compile(small().eval().requires_grad_(False))
    assert not compiled(x()).requires_grad
    given = x().requires_grad_()
    compiled(given).sum().backward()
    assert given.grad is not None


def test_no_grad_and_inference() -> None:
    model = small().eval()
    compiled = daggc.compile(model)
    with torch.no_grad():
        assert not compiled(x()).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x()), model(x()), rtol=0, atol=1e-12)
    assert compiled(x()).requires_grad


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None


@dataclass
class Result:
    value: torch.Tensor
    extra: Any
    label: str = "kept"


RESULTS = {
    "tuple": lambda w, a: (a * w, None, (w * 2,)),
    "list": lambda w, a: [a * w, [], 3],
    "dict": lambda w, a: {"out": a * w, "none": None, "nested": {"b": a + w, 3: a}},
    "namedtuple": lambda w, a: Pair(a * w, None),
    "dataclass": lambda w, a: Result(a * w, [a, "text", 1.5]),
    "same tensor twice": lambda w, a: ((y := a * w), y),
    "input returned": lambda w, a: (a, a * w),
    "parameter returned": lambda w, a: (w, a * w),
    "view of input": lambda w, a: (a.view(-1), a * w),
    "integers": lambda w, a: ((a * w).argmax(), a > 0, a * w),
    "constant": lambda w, a: (torch.arange(4), a * w),
    "scalar": lambda w, a: (a * w).sum(),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_results_keep_their_structure(kind: str) -> None:
    model = Function(RESULTS[kind])
    got, wanted = daggc.compile(model)(x()), model(x())
    assert type(got) is type(wanted)
    torch.testing.assert_close(_plain(got), _plain(wanted), rtol=0, atol=1e-12)


def _plain(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.detach()]
    if isinstance(value, Result):
        assert value.label == "kept"
        return _plain([value.value, value.extra])
    if isinstance(value, dict):
        return [item for key in value for item in _plain(value[key])]
    return [item for part in value for item in _plain(part)] if isinstance(value, list | tuple) else []


def test_arguments_of_any_structure_and_numbers_as_constants() -> None:
    def function(w: Any, a: Any, *, scale: int = 1, flag: bool = False, extra: Any = None, mode: str = "sum") -> Any:
        y = a["x"] * w * scale + (extra[0] if extra else 0)
        y = -y if flag else y
        return y.sum() if mode == "sum" else y.mean()

    model = Function(function)
    compiled = daggc.compile(model)
    for kwargs in ({}, {"scale": 3}, {"flag": True, "mode": "mean"}, {"extra": (x(), None)}, {"scale": 1.0}):
        torch.testing.assert_close(compiled({"x": x()}, **kwargs), model({"x": x()}, **kwargs), rtol=0, atol=1e-12)
    assert len(compiled._entries) == 5


class _Mode(Enum):
    FIRST = 1
    SECOND = 2


class _Options:
    def __init__(self, factor: int) -> None:
        self.factor = factor


class _Applied(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, option: Any) -> torch.Tensor:
        return self.function(x, option)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (lambda x, option: x * option, (1, 1.0, 2j, -2j)),
        (lambda x, option: x.to(option), (torch.float32, torch.float64)),
        (lambda x, option: x * option.value, tuple(_Mode)),
        (lambda x, option: x * option.factor, (_Options(1), _Options(2))),
        (lambda x, option: x[option], (slice(0, 1), slice(0, 2))),
        (lambda x, option: x * len(option), (range(2), range(3), np.zeros(4))),
        (lambda x, option: option(x), (torch.sin, torch.cos)),
    ],
    ids=["numbers", "dtypes", "enums", "objects", "slices", "sequences", "functions"],
)
def test_values_of_other_arguments_count(function: Callable[..., torch.Tensor], options: tuple[Any, ...]) -> None:
    model = _Applied(function)
    compiled = daggc.compile(model)
    x = torch.arange(3)
    for option in (*options, *options):
        wanted = model(x, option)
        got = compiled(x, option)
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted)


def test_dataclass_argument() -> None:
    model = Function(lambda w, result: result.value * w + len(result.label))
    given = Result(x(), None)
    torch.testing.assert_close(daggc.compile(model)(given), model(given), rtol=0, atol=1e-12)


def test_input_gradients_and_integer_inputs() -> None:
    model = Function(lambda w, a, index: (a * w)[index])
    mine, theirs = x().requires_grad_(), x().requires_grad_()
    index = torch.tensor([2, 0, 2])
    daggc.compile(model)(mine, index).square().sum().backward()
    model(theirs, index).square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)


def test_one_tensor_given_twice() -> None:
    model = Function(lambda w, a, b: a * w * b)
    mine, theirs = x().requires_grad_(), x().requires_grad_()
    daggc.compile(model)(mine, mine).sum().backward()
    model(theirs, theirs).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)


def test_detach_and_no_grad_regions_are_kept() -> None:
    def function(w: Any, a: Any) -> Any:
        with torch.no_grad():
            scale = (a * w).abs().mean()
        return (a * w).detach() * w + a * scale * w

    model = Function(function)
    compiled = daggc.compile(model)
    (mine,) = torch.autograd.grad(compiled(x()).sum(), model.weight)
    (theirs,) = torch.autograd.grad(model(x()).sum(), model.weight)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_buffers_are_updated_once_a_call_and_shared() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(2))
            self.register_buffer("unsaved", torch.ones(()), persistent=False)

        def forward(self, a: torch.Tensor) -> torch.Tensor:
            self.count += 1
            self.unsaved.mul_(2)
            return a * self.count[0] + self.unsaved

    model = Counting()
    compiled = daggc.compile(model)
    results = [compiled(torch.ones(2)) for _ in range(3)]
    assert model.count.tolist() == [3, 3]
    assert float(model.unsaved) == 8
    assert results[2].tolist() == [11, 11]
    assert list(compiled.state_dict()) == ["count"]


def test_double_and_float_of_the_compiled_module() -> None:
    model = small().eval()
    compiled = daggc.compile(model)
    compiled(x())
    compiled.float()
    assert compiled(x().float()).dtype == torch.float32
    torch.testing.assert_close(compiled(x().float()), model(x().float()))


def test_plain_attributes_of_modules_count() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(0.1)).double()
    compiled = daggc.compile(model)
    compiled(x())
    model[1].negative_slope = 0.5
    torch.testing.assert_close(compiled(x()), model(x()), rtol=0, atol=1e-12)


def test_attributes_of_the_model_are_found() -> None:
    model = small()
    model.config = {"a": 1}
    compiled = daggc.compile(model)
    assert compiled.config is model.config
    with pytest.raises(AttributeError, match="nonsense"):
        _ = compiled.nonsense


def test_copies_and_pickles_do_not_share_or_lose_the_model() -> None:
    compiled = daggc.compile(small().eval())
    expected = compiled(x()).detach()
    twin = copy.deepcopy(compiled)
    with torch.no_grad():
        compiled.get_parameter("0.weight").zero_()
    torch.testing.assert_close(twin(x()), expected, rtol=0, atol=1e-12)
    with pytest.raises(daggc.RunError, match=r"pickle its \.model"):
        pickle.dumps(compiled)


def test_dropout_is_repeatable_by_the_seed_and_right_in_distribution() -> None:
    compiled = daggc.compile(nn.Dropout(0.3))
    ones = torch.ones(200, 500)
    torch.manual_seed(5)
    first, second = compiled(ones), compiled(ones)
    torch.manual_seed(5)
    assert torch.equal(compiled(ones), first)
    assert not torch.equal(first, second)
    assert first.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    kept = float((first > 0).double().mean())
    assert abs(kept - 0.7) < 5 * (0.3 * 0.7 / ones.numel()) ** 0.5


def test_gradient_of_dropout_has_the_same_mask() -> None:
    compiled = daggc.compile(nn.Dropout(0.5))
    given = torch.ones(1000, requires_grad=True)
    result = compiled(given)
    result.sum().backward()
    assert torch.equal(given.grad, result.detach())


# What is refused


def _branches_on_data(w: Any, a: Any) -> Any:
    return a * w * a.sum().item()  # the line the error names


def test_data_dependent_control_flow_names_module_and_line() -> None:
    model = nn.Sequential(nn.Linear(4, 4).double(), Function(_branches_on_data))
    line = _branches_on_data.__code__.co_firstlineno + 1
    with pytest.raises(DataDependentError, match=rf"float out of a tensor.*module '1'.*test_module.py:{line}"):
        daggc.compile(model)(x())


class _Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool1d(2)

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return self.pool(a)


def test_a_submodule_may_be_called_pool() -> None:
    model = _Pooled()
    compiled = daggc.compile(model)
    assert torch.equal(compiled(x()), nn.AvgPool1d(2)(x()))
    assert compiled.pool is model.pool


def test_backward_hooks_are_refused() -> None:
    model = small()
    model[1].register_full_backward_hook(lambda *_: None)
    with pytest.raises(CaptureError, match=r"backward hooks.*'1'"):
        daggc.compile(model)(x())
    model = small()
    model[0].weight.register_hook(lambda g: g)
    with pytest.raises(CaptureError, match=r"'0\.weight' has gradient hooks"):
        daggc.compile(model)(x())


def test_forward_hooks_of_submodules_run() -> None:
    model = small().eval()
    model[0].register_forward_hook(lambda module, args, result: result * 2)
    eager = copy.deepcopy(model)
    torch.testing.assert_close(daggc.compile(model)(x()), eager(x()), rtol=0, atol=1e-12)


def test_forward_hooks_of_the_model_itself_run_once() -> None:
    model = small().eval()
    model.register_forward_hook(lambda module, args, result: result * 2)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    eager = copy.deepcopy(model)
    torch.testing.assert_close(daggc.compile(model)(x()), eager(x()), rtol=0, atol=1e-12)


def test_hooks_added_after_the_first_call_are_seen() -> None:
    model = small().eval()
    compiled = daggc.compile(model)
    compiled(x())
    model[0].register_forward_hook(lambda module, args, result: result * 2)
    torch.testing.assert_close(compiled(x()), model(x()), rtol=0, atol=1e-12)


def test_a_wrong_shape_names_the_line() -> None:
    with pytest.raises(CaptureError, match=r"module '0'"):
        daggc.compile(small())(x(3, 5))


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"sparse_coo tensor.*make it dense"):
        daggc.compile(small())(x().to_sparse())
    compiled = daggc.compile(nn.Sequential(nn.Embedding(5, 3, sparse=True)))
    with pytest.raises(CaptureError, match=r"sparse=True.*module '0'"):
        compiled(torch.tensor([1, 2]))


def test_not_a_module() -> None:
    with pytest.raises(CaptureError, match=r"torch.nn.Module, got a function"):
        daggc.compile(F.relu)  # pyright: ignore[reportArgumentType]


def test_unequal_devices_and_no_client() -> None:
    with pytest.raises(daggc.RunError, match="there is no client"):
        daggc.compile(small(), devices=["cpu:1"])
