"""Gradients accumulated over several batches are those of eager's ``(loss / n).backward()`` for each."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from precision import (
    GPT,
    assert_equal_training,
    convolutions,
    eager_groups,
    images,
    next_word,
    sentences,
    sgd,
    step_groups,
)
from torch import nn
from training import (
    Words,
    adamw,
    assert_equal_numbers,
    assert_same_bits,
    eagerly,
    gpt2,
    mlp,
    points,
    words,
    words_loss,
)

import daggc
from daggc.errors import PlanError, RunError
from daggc.plan.bodies import Group
from daggc.plan.device import cluster_of, cpu_device
from daggc.runtime.batch import call_with_loss, read_batch
from daggc.runtime.resident import WorkerHome
from daggc.runtime.step_program import Options, StepBuilder


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)


WHERE = {
    "here": {},
    "pipeline": {"microbatches": 3},
    "replicas": {"microbatches": 2, "replicas": 2},
    "one worker": {"stages": 1},
    "recomputing": {"microbatches": 2, "remat": "full"},
    "zero bubble": {"schedule": "zb-h1"},
    "graph of tasks": {"execution": "graph"},
}


@pytest.mark.parametrize("where", WHERE)
def test_unequal_batches_with_ignored_targets_clipping_and_rates(two_workers, where):
    """Each batch counts alike, whatever its size and however many of its targets are ignored."""
    model, batches = Words(gpt2()), words([7, 4, 7, 4, 5, 7])
    groups = [batches[:2], batches[2:4], batches[4:]]
    options = {"clip": 1.0, "scheduler": cosine}
    wanted = eager_groups(model, words_loss, adamw, groups, **options)
    client = None if where == "here" else two_workers
    got, step = step_groups(model, words_loss, adamw, groups, client=client, **options, **WHERE[where])
    assert_equal_training(got, wanted, tolerance=1e-9)
    assert step.steps == 3
    step.close()


def test_batches_of_several_lengths_are_one_step(two_workers):
    model = Words(gpt2())
    groups = [[*words([4], 8), *words([5], 6)] for _ in range(2)]
    got, step = step_groups(model, words_loss, adamw, groups, client=two_workers, microbatches=2)
    assert_equal_training(got, eager_groups(model, words_loss, adamw, groups), tolerance=1e-9)
    step.close()


def test_dicts_and_batches_of_a_single_sample():
    model = gpt2()
    batches = [({"input_ids": ids, "labels": ids},) for ids, _ in words([3, 1, 2, 1])]
    groups = [batches[:2], batches[2:]]
    wanted = eager_groups(model, None, adamw, groups)
    for microbatches in (1, 2):
        got, _ = step_groups(model, None, adamw, groups, microbatches=microbatches)
        assert_equal_training(got, wanted, tolerance=1e-6)
    run = eagerly(model, words_loss, adamw, [])
    step = daggc.compile(run.model).train_step(None, run.optimizer)
    for group in groups:
        step.accumulate(batch for (batch,) in group)  # a lone dict, not in a tuple; any iterable
    run.losses = wanted.losses
    assert_equal_numbers(run, wanted, tolerance=1e-6)


def test_steps_of_one_batch_and_of_several_leave_the_state_where_it_is(two_workers, monkeypatch):
    loads = []
    load = WorkerHome.load
    monkeypatch.setattr(WorkerHome, "load", lambda *args: (loads.append(1), load(*args)))
    model, batches = mlp(), points([6] * 7)
    groups = [batches[:3], batches[3:4], batches[4:6], batches[6:]]
    got, step = step_groups(model, F.cross_entropy, adamw, groups, client=two_workers, microbatches=2)
    assert_equal_training(got, eager_groups(model, F.cross_entropy, adamw, groups), tolerance=1e-9)
    assert len(loads) == 1
    step.close()


def test_a_resumed_training_has_the_same_bits(tmp_path):
    """Dropout too: each microbatch of each step has a key of its own."""
    model, batches = Words(gpt2(dropout=0.1)), words([4, 3] * 4)
    groups = [batches[index : index + 2] for index in range(0, 8, 2)]
    options = {"microbatches": 2, "seed": 3}
    wanted, _ = step_groups(model, words_loss, adamw, groups, **options)
    first, step = step_groups(model, words_loss, adamw, groups[:2], **options)
    step.save(tmp_path / "c.safetensors")
    run = eagerly(model, words_loss, adamw, [])
    step = daggc.compile(run.model).train_step(words_loss, run.optimizer, **options)
    step.load(tmp_path / "c.safetensors")
    rest = [float(step.accumulate(group)) for group in groups[2:]]
    assert first.losses + rest == wanted.losses
    assert_same_bits(run.model, wanted.model)


def test_replicas_take_whole_batches_in_turn_where_these_cannot_be_cut(two_workers):
    """Batch norm: each replica has the statistics of its own batches, as in DDP; the first one's are kept."""
    model, batches = convolutions().double(), [(x.double(), y) for x, y in images([6] * 4)]
    groups = [batches[:2], batches[2:]]
    wanted = eager_groups(model, F.cross_entropy, sgd, groups)
    got, step = step_groups(model, F.cross_entropy, sgd, groups, client=two_workers, replicas=2)
    first = copy.deepcopy(model)  # sees the first batch of each step, with the weights before it
    for index, group in enumerate(groups):
        before = eager_groups(model, F.cross_entropy, sgd, groups[:index]).model
        for parameter, its in zip(first.parameters(), before.parameters(), strict=True):
            parameter.data.copy_(its)
        first(group[0][0])
    for name, parameter in wanted.model.named_parameters():
        torch.testing.assert_close(got.model.get_parameter(name), parameter, rtol=1e-9, atol=1e-12)
    for name, buffer in first.named_buffers():
        torch.testing.assert_close(got.model.get_buffer(name), buffer, rtol=1e-9, atol=1e-12)
    step.close()


def test_activations_take_the_memory_of_one_batch():
    model = GPT()
    batch = read_batch(sentences([64])[0], {})
    builder = StepBuilder(model, call_with_loss(next_word), cluster_of([cpu_device(0)]), Options(2))
    groups = [Group("0", tuple(name for name, _ in model.named_parameters()), "adamw", {})]
    two, eight = (builder.build([batch] * count, groups, False).predicted.peaks["cpu:0"] for count in (2, 8))
    assert two <= eight < 1.1 * two


class Lengths(nn.Module):
    """Has a constant of its own for each length."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 4)
        self.scales = {n: torch.linspace(1, n, 32) for n in (5, 8)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner((x[..., None] * self.scales[x.shape[1]]).mean((1, 2))[:, None])


def test_what_cannot_be_one_step_is_refused():
    model, batches = mlp(), points([4, 4])
    step = daggc.compile(model).train_step(F.cross_entropy, sgd(model))
    with pytest.raises(RunError, match="no batches to accumulate"):
        step.accumulate([])
    with pytest.raises(RunError, match="the same structure"):
        step.accumulate([batches[0], ({"x": batches[1][0]},)])
    assert step.steps == 0
    lengths, (x, y) = Lengths(), points([4], torch.float32)[0]
    step = daggc.compile(lengths).train_step(F.cross_entropy, sgd(lengths))
    step.accumulate([(x, y), (x + 1, y)])
    with pytest.raises(PlanError, match="accumulate batches of one shape only"):
        step.accumulate([(x, y), (x[:, :5], y)])
    assert step.steps == 1
