"""Where the state of a training is: buffers on workers, and what is lost when it is dropped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from training import adamw, assert_equal_numbers, eagerly, mlp, points, stepwise

import daggc
from daggc.errors import RunError


@pytest.mark.parametrize("execution", ["graph", "lanes"])
def test_buffers_made_of_parameters_alone_are_those_of_the_last_step(two_workers, execution: str) -> None:
    """No call reads them as they were: spectral norm's vectors are of the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(spectral_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 4)).double()
    batches = points([8, 8, 6])
    options = {"client": two_workers, "stages": 2, "microbatches": 2, "execution": execution}
    got, step = stepwise(model, F.cross_entropy, adamw, batches, **options)
    assert len(step.step_program.sizes) == 2
    assert_equal_numbers(got, eagerly(model, lambda m, x, y: F.cross_entropy(m(x), y), adamw, batches))
    step.close()


def test_steps_that_close_dropped_are_not_passed_over(two_workers, tmp_path: Path) -> None:
    model, (batch, *_) = mlp(), points([6])
    step = daggc.compile(model, client=two_workers).train_step(F.cross_entropy, adamw(model))
    first = float(step(*batch))
    step.save(tmp_path / "one.safetensors")
    float(step(*batch))
    step.close()
    for use in (lambda: step.save(tmp_path / "two.safetensors"), lambda: step(*batch), step.sync):
        with pytest.raises(RunError, match="2 steps since the last sync"):
            use()
    assert not (tmp_path / "two.safetensors").exists()
    step.load_from_model()
    assert float(step(*batch)) == first
    step.load(tmp_path / "one.safetensors")
    assert step.steps == 1
    float(step(*batch))
    step.sync()
    step.close()
    step.save(tmp_path / "two.safetensors")


def test_options_that_change_at_every_step_are_warned_of() -> None:
    model, (batch, *_) = mlp(), points([4])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = daggc.compile(model).train_step(F.cross_entropy, optimizer)
    for momentum in (0.9, 0.8, 0.7):
        optimizer.param_groups[0]["momentum"] = momentum
        step(*batch)
    optimizer.param_groups[0]["momentum"] = 0.6
    with pytest.warns(UserWarning, match="cycle_momentum=False"):
        step(*batch)
