"""What batches and losses may look like."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import adamw, assert_equal_numbers, eagerly, mlp, points, stepwise

import daggc
from daggc.errors import CaptureError, DaggcError, RunError
from daggc.runtime.batch import read_batch


class Named(nn.Module):
    """Takes keywords, gives a dict."""

    def __init__(self, loss: bool = False) -> None:
        super().__init__()
        self.net = mlp()
        self.loss = loss

    def forward(self, x: torch.Tensor, y: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        out = self.net(x) * scale
        return {"out": out, **({"loss": F.cross_entropy(out, y)} if self.loss else {})}


def dicts(sizes: list[int]) -> list[tuple[dict[str, object]]]:
    return [({"x": x, "y": y, "scale": 0.5},) for x, y in points(sizes)]


def test_a_dict_and_the_models_own_loss():
    batches = dicts([5, 5, 3])
    got, step = stepwise(Named(loss=True), None, adamw, batches, microbatches=2)
    assert_equal_numbers(got, eagerly(Named(loss=True), lambda m, batch: m(**batch)["loss"], adamw, batches))
    assert step.step_program.sizes == (2, 1)


def test_a_dict_and_a_loss_function():
    batches = dicts([5, 5])

    def loss_fn(result, batch):
        return F.cross_entropy(result["out"], batch["y"])

    got, _ = stepwise(Named(), loss_fn, adamw, batches, microbatches=2)
    assert_equal_numbers(got, eagerly(Named(), lambda m, batch: loss_fn(m(**batch), batch), adamw, batches))


def test_a_loss_that_is_a_module_with_weights_and_ignores():
    batches = [(x, torch.where(y == 3, -100, y)) for x, y in points([7, 7])]
    loss = nn.CrossEntropyLoss(torch.tensor([0.1, 1.0, 2.0, 0.5], dtype=torch.float64), label_smoothing=0.1)
    got, step = stepwise(mlp(), loss, adamw, batches, microbatches=3)
    assert_equal_numbers(got, eagerly(mlp(), lambda m, x, y: loss(m(x), y), adamw, batches))
    assert len(step.step_program.sizes) == 3


def test_sums_and_losses_divided_by_the_batch_size():
    def loss(out, y):
        return F.cross_entropy(out, y, reduction="sum") / y.shape[0] + 0.1 * out.square().mean()

    batches = points([7, 5])
    got, step = stepwise(mlp(), loss, adamw, batches, microbatches=3)
    assert_equal_numbers(got, eagerly(mlp(), lambda m, x, y: loss(m(x), y), adamw, batches))
    assert len(step.step_program.sizes) == 3


class Returns(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = mlp(), how

    def forward(self, x: torch.Tensor, y: torch.Tensor):
        loss = F.cross_entropy(self.net(x), y)
        return {"alone": loss, "tuple": (loss, x), "dict": {"loss": loss, "x": x}}[self.how]


@pytest.mark.parametrize("how", ["alone", "tuple", "dict"])
def test_models_that_give_their_loss(how):
    (batch,) = points([4])
    step = daggc.compile(model := Returns(how)).train_step(None, adamw(model))
    expected = F.cross_entropy(model.net(batch[0]), batch[1]).item()  # the step changes the model
    assert float(step(*batch)) == pytest.approx(expected, abs=1e-9)


def test_an_argument_shared_by_all_samples():
    """A tensor whose axis 0 is not the batch goes to every microbatch."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x, shift, flag=True):
            return self.net(x + shift) if flag else self.net(x)

    shift = torch.randn(8, dtype=torch.float64)
    batches = [(x, shift, y) for x, y in points([5, 5])]
    got, step = stepwise(Shifted(), F.cross_entropy, adamw, batches, microbatches=2)
    assert_equal_numbers(got, eagerly(Shifted(), lambda m, x, s, y: F.cross_entropy(m(x, s), y), adamw, batches))
    assert step.step_program.sizes == (3, 2)


def test_batches_of_another_kind_are_captured_again():
    model = mlp(torch.float32)
    step = daggc.compile(model).train_step(lambda out, y: F.mse_loss(out, y.to(out.dtype)), adamw(model))
    x, y = torch.randn(4, 8), torch.randn(4, 4)
    losses = [float(step(x, target)) for target in (y, y.double(), y.half())]
    assert losses[0] > losses[1] > losses[2]
    losses = [float(step(x.reshape(2, 2, 8), y.reshape(2, 2, 4))), float(step(x, y))]
    assert losses[0] > losses[1] and step.steps == 5


@pytest.mark.parametrize(
    ("loss_fn", "batch", "error", "message"),
    [
        (lambda out, y: out.sum(1), points([4])[0], CaptureError, r"one floating-point number, got .*shape \(4,\)"),
        (lambda out, y: out.argmax(), points([4])[0], CaptureError, "one floating-point number"),
        (lambda out, y: {"loss": out.sum()}, points([4])[0], CaptureError, "got dict"),
        (None, points([4])[0][:1], CaptureError, r"one floating-point number.*\(4, 4\); give loss_fn="),
        (F.cross_entropy, points([4])[0][:1], CaptureError, "inputs and the target"),
        (F.cross_entropy, (1.0, 2), RunError, "at least one tensor with a batch axis"),
        (F.cross_entropy, (torch.tensor(1.0), torch.tensor(2)), RunError, "at least one tensor with a batch axis"),
        (F.cross_entropy, points([0])[0], RunError, "without samples"),
        (lambda out, y: out.sum() * out.sum().item(), points([4])[0], CaptureError, "float out of a tensor"),
        (
            lambda out, y: out.detach().sum(),
            points([4])[0],
            DaggcError,
            "depends on no parameter that requires a gradient",
        ),
    ],
)
def test_batches_and_losses_that_are_refused(loss_fn, batch, error, message):
    model = mlp()
    step = daggc.compile(model).train_step(loss_fn, adamw(model))
    with pytest.raises(error, match=message):
        step(*batch)
    assert step.steps == 0


def test_parts_of_a_batch():
    x, y = torch.arange(10.0).reshape(5, 2), torch.arange(5)
    batch = read_batch((x, torch.tensor(3.0)), {"y": y, "k": 2})
    assert (batch.size, batch.batched, batch.names) == (5, (True, False, True), ("0", "1", "y"))
    first, scalar, labels = batch.part(1, 2)
    assert torch.equal(first, x[1:3]) and float(scalar) == 3.0 and torch.equal(labels, y[1:3])
    assert first.untyped_storage().nbytes() == 16, "only the part's own memory is sent"


def first_five(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(out[:5], y[:5])


def by_size(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(out, y) * (2.0 if len(out) > 4 else 1.0)


def last_chunk(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(out.split(4)[-1], y.split(4)[-1])


def first_numbers(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return out.reshape(-1)[:16].square().mean()


def of_pairs(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (out[::2] - out[1::2]).square().mean()


@pytest.mark.parametrize("microbatches", [2, 4])
@pytest.mark.parametrize("loss", [first_five, by_size, last_chunk, first_numbers, of_pairs])
def test_a_loss_that_sees_the_size_of_its_batch_sees_that_of_the_whole(loss, microbatches: int):
    """Of a part, slices would end elsewhere, and Python decide otherwise."""
    batches = points([8, 8, 12])
    got, _ = stepwise(mlp(), loss, adamw, batches, microbatches=microbatches)
    assert_equal_numbers(got, eagerly(mlp(), lambda m, x, y: loss(m(x), y), adamw, batches))


def test_a_model_that_sees_the_size_of_its_batch_sees_that_of_the_whole():
    class Seeing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.net(x)
            return out * 2 if len(out) > 4 else out

    batches = points([8, 9])
    got, step = stepwise(Seeing(), F.cross_entropy, adamw, batches, microbatches=4)
    assert_equal_numbers(got, eagerly(Seeing(), lambda m, x, y: F.cross_entropy(m(x), y), adamw, batches))
    assert len(step.step_program.sizes) == 4
