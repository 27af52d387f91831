"""Checkpoints: whole or not at all, of the right model, and training goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
import torch.nn.functional as F
from cluster import processes
from safetensors.torch import save_file
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
    stepwise,
    words,
    words_loss,
)

import daggc
from daggc.errors import RunError
from daggc.runtime import checkpoint
from daggc.runtime.checkpoint import Checkpoint, read_checkpoint, write_checkpoint


def classify(model, x, y):
    return F.cross_entropy(model(x), y)


def trained(path, batches, model=None, client=None, **options):
    """Train on some batches and save; the step is given too."""
    model = mlp() if model is None else model
    step = daggc.compile(model, client=client).train_step(F.cross_entropy, adamw(model), microbatches=2, **options)
    for batch in batches:
        step(*batch)
    step.save(path)
    return step


def resumed(path, batches, model=None, client=None, make=adamw, loss_fn=F.cross_entropy, **options):
    """A new model, which has other weights, from a checkpoint; trained on."""
    model = mlp() if model is None else model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    run = eagerly(model, classify, make, [])
    step = daggc.compile(run.model, client=client).train_step(loss_fn, run.optimizer, microbatches=2, **options)
    step.load(path)
    run.losses = [float(step(*batch)) for batch in batches]
    step.sync()
    return run, step


def test_a_resumed_training_has_the_bits_of_one_that_was_not_interrupted(tmp_path):
    batches = points([5, 5, 3, 5])
    wanted, _ = stepwise(mlp(), F.cross_entropy, adamw, batches, microbatches=2)
    trained(tmp_path / "deep" / "c.safetensors", batches[:2])
    got, step = resumed(tmp_path / "deep" / "c.safetensors", batches[2:])
    assert_same_bits(got.model, wanted.model)
    assert got.losses == wanted.losses[2:] and step.steps == 4
    got.losses = wanted.losses
    assert_equal_numbers(got, wanted, tolerance=0)


def test_another_number_of_workers_goes_on_with_equal_numbers(two_workers, tmp_path):
    """GPT-2 with dropout: masks do not depend on where it runs."""
    model, batches = Words(gpt2(dropout=0.1)), words([4, 4, 4, 4])
    path = tmp_path / "c.safetensors"
    options = {"microbatches": 2, "seed": 3}
    wanted, step = stepwise(model, words_loss, adamw, batches, client=two_workers, **options)
    step.close()
    _, step = stepwise(model, words_loss, adamw, batches[:2], client=two_workers, **options)
    step.save(path)
    step.close()
    with processes(1) as client:
        got, _ = resumed(path, batches[2:], Words(gpt2(dropout=0.1)), client, loss_fn=words_loss)
    local, _ = resumed(path, batches[2:], Words(gpt2(dropout=0.1)), loss_fn=words_loss)
    same, step = resumed(path, batches[2:], Words(gpt2(dropout=0.1)), two_workers, loss_fn=words_loss)
    step.close()
    assert_same_bits(same.model, wanted.model)
    for run in (got, local):
        run.losses = wanted.losses[:2] + run.losses
        assert_equal_numbers(run, wanted)


def test_what_is_not_used_is_saved_too(tmp_path):
    """Parameters without a gradient, unused buffers; before the first step, and after a step in another mode."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.idle = mlp(), nn.Linear(2, 2, dtype=torch.float64)
            self.register_buffer("note", torch.arange(3))
            self.norm = nn.BatchNorm1d(8, dtype=torch.float64)

        def forward(self, x):
            return self.net(self.norm(x))

    batches = points([4] * 3)
    wanted, _ = stepwise(Part(), F.cross_entropy, adamw, batches)
    path = tmp_path / "c.safetensors"
    model = Part()
    idle = model.idle.weight.detach().clone()
    wanted.model.idle.load_state_dict(model.idle.state_dict())
    step = daggc.compile(model).train_step(F.cross_entropy, adamw(model))
    step.save(path)
    step.load(path)
    step(*batches[0])
    step.save(path)
    got, _ = resumed(path, batches[1:], Part())
    assert torch.equal(got.model.idle.weight, idle)
    assert_same_bits(got.model, wanted.model)
    assert not any(ref.startswith("constant:") for ref in read_checkpoint(path).tensors)


def test_loading_goes_back(tmp_path):
    batches = points([5] * 4)
    step = trained(path := tmp_path / "c.safetensors", batches[:1])
    first = [float(step(*batch)) for batch in batches[1:]]
    step.load(path)
    assert step.steps == 1
    assert [float(step(*batch)) for batch in batches[1:]] == first


def test_learning_rates_are_those_of_the_checkpoint(tmp_path):
    model, (batch,) = mlp(), points([4])
    optimizer = adamw(model)
    step = daggc.compile(model).train_step(F.cross_entropy, optimizer)
    optimizer.param_groups[1]["lr"] = 0.25
    step(*batch)
    step.save(tmp_path / "c")
    got, _ = resumed(tmp_path / "c", [])
    assert [group["lr"] for group in got.optimizer.param_groups] == [3e-3, 0.25]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("model", "make", "message"),
    [
        (lambda: nn.Sequential(*mlp()[:3]), adamw, "'param:4.bias' is in it alone"),
        (lambda: nn.Sequential(*mlp(), nn.Linear(4, 4, dtype=torch.float64)), adamw, "'param:7.bias' is not in it"),
        (lambda: mlp(torch.float32), adamw, r"'param:0.bias' is float64\[16\] there, float32\[16\] here"),
        (lambda: mlp(), sgd, "'state:exp_avg:0.bias' is in it alone"),
        (lambda: mlp(), lambda m: torch.optim.AdamW(m.parameters()), "it has 2 parameter groups, not 1"),
        (lambda: mlp(), lambda m: torch.optim.Adam(m.parameters(), amsgrad=True), "max_exp_avg_sq:0.bias' is not in"),
    ],
)
def test_checkpoints_of_another_model_or_optimizer_are_refused(tmp_path, model, make, message):
    trained(path := tmp_path / "c.safetensors", [])
    model = model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = daggc.compile(model).train_step(F.cross_entropy, make(model))
    with pytest.raises(RunError, match=f"another model or optimizer: .*{message}"):
        step.load(path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    trained(path := tmp_path / "c.safetensors", points([4]))
    whole = path.read_bytes()
    files = {"missing": None, "empty": b"", "text": b"hello there, this is text", "garbage": os.urandom(500)}
    files |= {f"cut at {size}": whole[:size] for size in (4, 100, len(whole) // 2, len(whole) - 1)}
    model = mlp()
    step = daggc.compile(model).train_step(F.cross_entropy, adamw(model))
    for name, content in files.items():
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(RunError, match=re.escape(str(file))):
            step.load(file)
    foreign = {"none": None, "version": {"daggc.checkpoint": "99", "meta": "{}"}, "no meta": {"daggc.checkpoint": "1"}}
    for wrong in ("{", "[]", "{}", json.dumps({"steps": "1", "seed": 1, "learning_rates": [], "updates": {}})):
        foreign[wrong] = {"daggc.checkpoint": "1", "meta": wrong}
    for metadata in foreign.values():
        save_file({"param:0.weight": torch.zeros(2)}, tmp_path / "foreign", metadata)
        with pytest.raises(RunError, match="foreign"):
            step.load(tmp_path / "foreign")
    with pytest.raises(RunError, match="cannot read"):
        step.load(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c"
    write_checkpoint(path, Checkpoint({"a": torch.ones(2)}, META))

    def half(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(OSError, match="full"):
        write_checkpoint(path, Checkpoint({"a": torch.zeros(2)}, META))
    assert torch.equal(read_checkpoint(path).tensors["a"], torch.ones(2))
    assert os.listdir(tmp_path) == ["c"]


META = {"steps": 1, "seed": 2, "learning_rates": [0.1], "updates": {}}


def test_tensors_of_any_kind_are_kept(tmp_path):
    shared = torch.arange(12.0)
    tensors = {
        "param:a": shared[:6].reshape(2, 3).t(),
        "param:b": shared[3:],
        "param:c": torch.ones(3, dtype=torch.bfloat16),
        "buffer:d": torch.tensor(7),
        "buffer:e": torch.zeros(0, 3),
        "param:f": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    write_checkpoint(tmp_path / "c", Checkpoint(tensors, META))
    found = read_checkpoint(tmp_path / "c")
    assert found.meta == META and set(found.tensors) == set(tensors)
    for ref, tensor in tensors.items():
        assert torch.equal(found.tensors[ref], tensor) and found.tensors[ref].dtype == tensor.dtype
