"""Training steps give the weights of eager steps on the whole batch."""

from __future__ import annotations

import copy
import random
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import (
    Trained,
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
from daggc.errors import PlanError, RunError
from daggc.runtime import worker
from daggc.runtime.resident import WorkerHome


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)


def classify(model, x, y):
    return F.cross_entropy(model(x), y)


def words_of(model, ids, targets):
    return words_loss(model(ids), targets)


# --- on workers ---------------------------------------------------------------------------------------


def hurry_slowly(longest: float = 0.03) -> None:
    """Tasks take random times from now on; runs on a worker."""
    plain = worker._run

    def slow(*args):
        time.sleep(random.random() * longest)
        return plain(*args)

    worker._run = slow
    slow.plain = plain  # pyright: ignore


def hurry_again() -> None:
    worker._run = worker._run.plain  # pyright: ignore


def test_ten_adamw_steps_of_gpt2_on_two_workers(two_workers):
    """Microbatches that do not divide the batch, an uneven last batch, ignored targets, groups, rates, clipping."""
    model = Words(gpt2())
    batches = words([7] * 9 + [4])
    wanted = eagerly(model, words_of, adamw, batches, clip=1.0, scheduler=cosine)
    options = {"microbatches": 3, "max_grad_norm": 1.0, "scheduler": cosine, "client": two_workers}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a scheduler would warn of a missing optimizer.step()
        got, step = stepwise(model, words_loss, adamw, batches, **options)
    assert_equal_numbers(got, wanted)
    assert step.step_program.sizes == (2, 1, 1)
    shares = step.plan.shares()
    assert len(shares) == 2 and min(shares.values()) >= 0.25
    step.close()
    two_workers.run(hurry_slowly)
    try:
        again, step = stepwise(model, words_loss, adamw, batches, **options)
    finally:
        two_workers.run(hurry_again)
    assert_same_bits(again.model, got.model)
    assert again.losses == got.losses and again.norms == got.norms
    step.close()


@pytest.mark.parametrize("options", [{"schedule": "gpipe"}, {"split_backward": True}, {"stages": 3}], ids=str)
def test_orders_of_tasks_on_workers(two_workers, options):
    model, batches = mlp(), points([7, 7, 5])
    got, step = stepwise(model, F.cross_entropy, adamw, batches, client=two_workers, microbatches=3, **options)
    assert_equal_numbers(got, eagerly(model, classify, adamw, batches))
    assert step.plan is not None and len(step.plan.stages) == options.get("stages", 2)
    step.close()


def test_replicas_of_gpt2_take_turns_and_share_the_updates(two_workers):
    model = Words(gpt2())
    batches = words([7] * 4 + [4])
    wanted = eagerly(model, words_of, adamw, batches, clip=1.0)
    options = {"microbatches": 4, "replicas": 2, "max_grad_norm": 1.0, "client": two_workers}
    got, step = stepwise(model, words_loss, adamw, batches, **options)
    assert_equal_numbers(got, wanted)
    again, other = stepwise(model, words_loss, adamw, batches, **options)
    assert_same_bits(again.model, got.model)
    homes = {home for _, home, _ in step.step_program.layout}
    assert homes == {"cpu:0", "cpu:1"}
    step.close(), other.close()


def test_replicas_need_devices(two_workers):
    with pytest.raises(PlanError, match="3 replicas need as many devices"):
        stepwise(mlp(), F.cross_entropy, adamw, points([6]), client=two_workers, replicas=3)


def test_float32_is_close_to_eager(two_workers):
    model, batches = mlp(torch.float32), points([7, 7, 5], torch.float32)
    got, step = stepwise(model, F.cross_entropy, adamw, batches, client=two_workers, microbatches=3)
    assert_equal_numbers(got, eagerly(model, classify, adamw, batches), tolerance=2e-5)
    step.close()


def test_steps_are_lazy_and_take_their_values_when_submitted(two_workers):
    """At most two steps are ahead; batches and learning rates may change right after the call."""
    model = mlp()
    batches = points([6] * 5)
    wanted = eagerly(model, classify, sgd, batches, scheduler=halving)
    run = Trained(copy.deepcopy(model), None)
    run.optimizer = sgd(run.model)
    step = daggc.compile(run.model, client=two_workers).train_step(F.cross_entropy, run.optimizer, microbatches=2)
    run.losses.append(float(step(*batches[0])))  # captured
    x, y = (torch.empty_like(leaf) for leaf in batches[0])
    run.optimizer.param_groups[0]["lr"] /= 2
    two_workers.run(hurry_slowly, 0.2)
    try:
        losses, seconds = [], []
        for batch in batches[1:]:
            x.copy_(batch[0]), y.copy_(batch[1])
            start = time.monotonic()
            losses.append(step(x, y))
            seconds.append(time.monotonic() - start)
            run.optimizer.param_groups[0]["lr"] /= 2
            x.fill_(float("nan")), y.fill_(-100)
    finally:
        two_workers.run(hurry_again)
    assert max(seconds[:2]) < 0.5 * min(seconds[2:])
    run.losses += [float(loss) for loss in losses]
    step.sync()
    assert_equal_numbers(run, wanted)
    step.close()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


# --- in this process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[6, 6], [7, 3], [4, 1, 2], [1]], ids=str)
def test_batches_of_several_sizes(sizes):
    model, batches = mlp(), points(sizes * 2)
    got, step = stepwise(model, F.cross_entropy, adamw, batches, microbatches=3)
    assert_equal_numbers(got, eagerly(model, classify, adamw, batches))
    assert step.steps == len(batches)


def test_batches_of_several_lengths_leave_the_state_where_it_is(two_workers, monkeypatch):
    model = Words(gpt2())
    batches = [batch for pair in zip(words([4, 4], 8), words([5, 4], 6), strict=True) for batch in pair]
    loads = []
    load = WorkerHome.load
    monkeypatch.setattr(WorkerHome, "load", lambda *args: (loads.append(1), load(*args)))
    got, step = stepwise(model, words_loss, adamw, batches, client=two_workers, microbatches=2)
    assert_equal_numbers(got, eagerly(model, words_of, adamw, batches))
    assert len(loads) == 1
    step.close()


def test_tied_weights_and_the_models_own_loss():
    model = gpt2()
    batches = [({"input_ids": ids, "labels": ids},) for ids, _ in words([5, 3, 5])]
    got, _ = stepwise(model, None, adamw, batches, microbatches=2)
    assert_equal_numbers(got, eagerly(model, lambda m, batch: m(**batch).loss, adamw, batches))
    assert got.model.lm_head.weight is got.model.transformer.wte.weight


def test_t5_with_its_own_loss():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        num_layers=1, d_model=16, num_heads=2, d_kv=8, d_ff=32, vocab_size=64, dropout_rate=0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).double()
    batches = [({"input_ids": ids, "labels": targets.abs()},) for ids, targets in words([3, 3])]
    got, _ = stepwise(model, None, adamw, batches, microbatches=2)
    assert_equal_numbers(got, eagerly(model, lambda m, batch: m(**batch).loss, adamw, batches), tolerance=1e-6)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.conv(x[:, None]))).flatten(1))


def normed():
    torch.manual_seed(0)
    return Normed().double()


def test_batch_norm_is_not_cut(two_workers):
    batches = points([6, 6, 5])
    got, step = stepwise(normed(), F.cross_entropy, adamw, batches, client=two_workers, microbatches=3)
    assert_equal_numbers(got, eagerly(normed(), classify, adamw, batches))
    assert int(got.model.norm.num_batches_tracked) == 3
    assert step.step_program.sizes == (5,)
    assert "batch_norm" in step.explain() and "norm" in step.explain()
    step.close()


def test_batch_norm_cut_by_force_normalises_each_part():
    """As eager does when it accumulates gradients over the parts."""
    batches = points([6, 4])
    got, step = stepwise(normed(), F.cross_entropy, adamw, batches, microbatches=2, force_microbatches=True)
    assert step.step_program.sizes == (2, 2)

    def accumulated(model, x, y):
        halves = list(zip(x.chunk(2), y.chunk(2), strict=True))
        return sum(F.cross_entropy(model(a), b) / 2 for a, b in halves)

    assert_equal_numbers(got, eagerly(normed(), accumulated, adamw, batches))


def test_train_and_eval_between_steps():
    """In eval mode batch norm lets the batch be cut, and its statistics stay."""
    model, batches = normed(), points([6] * 6)
    eager, mine = Trained(model, None), Trained(copy.deepcopy(model), None)
    eager.optimizer, mine.optimizer = adamw(eager.model), adamw(mine.model)
    step = daggc.compile(mine.model).train_step(F.cross_entropy, mine.optimizer, microbatches=2)
    for index, (x, y) in enumerate(batches):
        for run in (eager, mine):
            run.model.train(index % 3 != 1)
        eager.optimizer.zero_grad()
        loss = classify(eager.model, x, y)
        loss.backward()
        eager.optimizer.step()
        eager.losses.append(loss.item())
        mine.losses.append(float(step(x, y)))
        assert len(step.step_program.sizes) == (2 if index % 3 == 1 else 1)
    step.sync()
    assert_equal_numbers(mine, eager)


class Halves(nn.Module):
    """Uses one half in training, both in eval; one parameter is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.extra = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("note", torch.arange(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.body(x))
        return self.head(x if self.training else torch.tanh(self.extra(x)))


def plain_sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize("make", [plain_sgd, adamw])
def test_parameters_without_a_gradient_are_left_alone(make):
    """No weight decay, no state, no count, as in torch; frozen ones too."""
    torch.manual_seed(0)
    model, batches = Halves().double(), points([5, 5, 5])
    model.body.bias.requires_grad_(False)
    got, _ = stepwise(model, F.cross_entropy, make, batches, microbatches=2)
    assert_equal_numbers(got, eagerly(model, classify, make, batches))


def test_parameters_that_rest_for_some_steps_keep_what_they_learned():
    torch.manual_seed(0)
    model, batches = Halves().double(), points([4] * 6)
    eager, mine = Trained(model, None), Trained(copy.deepcopy(model), None)
    eager.optimizer, mine.optimizer = plain_sgd(eager.model), plain_sgd(mine.model)
    step = daggc.compile(mine.model).train_step(F.cross_entropy, mine.optimizer)
    for index, (x, y) in enumerate(batches):
        for run in (eager, mine):
            run.model.train(index % 2 == 1)
            run.model.body.weight.requires_grad_(index != 3)
        eager.optimizer.zero_grad()
        classify(eager.model, x, y).backward()
        eager.optimizer.step()
        step(x, y)
    step.sync()
    assert_equal_numbers(mine, eager)


def test_a_parameter_that_joins_later_is_refused_where_its_count_matters():
    model, (x, y) = mlp(), points([4])[0]
    model[0].weight.requires_grad_(False)
    step = daggc.compile(model).train_step(F.cross_entropy, adamw(model))
    step(x, y)
    model[0].weight.requires_grad_(True)
    with pytest.raises(RunError, match=r"'0\.weight' was updated 0 times, '2\.weight' 1 times"):
        step(x, y)
    model[0].weight.requires_grad_(False)
    step(x, y)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 64)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(torch.ones_like(self.body(x))) + 0 * self.body(x)


def dropped(seed: int, sizes: list[int], weights: torch.Tensor) -> list[float]:
    """Sums of the weights that dropout leaves, in steps of two microbatches; ``weights`` are those of 6 samples."""
    model = Dropped().double()
    step = daggc.compile(model).train_step(
        lambda out, weight: (out * weight).sum(),
        torch.optim.SGD(model.parameters(), lr=0.0),
        microbatches=2,
        seed=seed,
    )
    x = torch.ones(6, 8, dtype=torch.float64)
    return [float(step(x[:n], weights[:n])) for n in sizes]


def test_dropout_is_repeatable_by_seed_and_differs_between_steps_and_microbatches():
    weights = torch.rand(6, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    first = dropped(5, [6, 6, 3, 6], weights)  # a batch of 3 has other microbatches
    assert dropped(5, [6, 6, 3, 6], weights) == first and dropped(6, [6, 6, 3, 6], weights) != first
    assert len(set(first)) == 4
    zeros, part = torch.zeros(3, 64, dtype=torch.float64), weights[:3]
    halves = [dropped(5, [6], torch.cat(pair))[0] for pair in ((part, zeros), (zeros, part))]
    assert halves[0] != halves[1]


def test_dropout_in_gpt2_is_repeatable_on_workers(two_workers):
    model, batches = Words(gpt2(dropout=0.1)), words([4, 4])
    runs = [stepwise(model, words_loss, adamw, batches, client=two_workers, microbatches=2, seed=7) for _ in "ab"]
    local, _ = stepwise(model, words_loss, adamw, batches, microbatches=2, seed=7)
    assert_same_bits(runs[0][0].model, runs[1][0].model)
    assert_equal_numbers(runs[0][0], local)
    plain, _ = stepwise(model.eval(), words_loss, adamw, batches, microbatches=2, seed=7)
    assert plain.losses != local.losses
    for _, step in runs:
        step.close()


class Cube(torch.autograd.Function):
    """A cube whose gradient is not its derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, *cotangents):
        return cotangents[0] * ctx.saved_tensors[0]


@daggc.opaque
def curious(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.sin(x @ weight)


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(curious(Cube.apply(self.first(x)), self.weight))


def test_opaque_functions_and_custom_gradients(two_workers):
    torch.manual_seed(0)
    model, batches = Strange().double(), points([6, 6])
    got, step = stepwise(model, F.cross_entropy, adamw, batches, client=two_workers, microbatches=2)
    assert_equal_numbers(got, eagerly(model, classify, adamw, batches))
    step.close()


@pytest.mark.parametrize("steps", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_many_steps_leave_little_behind(two_workers, steps):
    """Dask remembers what a task depended on for as long as it lives: the chain of steps is cut now and then."""
    model, batches = mlp(), points([4] * steps)
    run = Trained(copy.deepcopy(model), None)
    run.optimizer = adamw(run.model)
    step = daggc.compile(run.model, client=two_workers).train_step(F.cross_entropy, run.optimizer, microbatches=2)
    tasks, futures, results = [], [], []
    for index, batch in enumerate(batches):
        run.losses.append(step(*batch))
        if index % 10 == 9:
            tasks.append(two_workers.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))
            futures.append(len(two_workers.futures))
            results.append(sum(two_workers.run(lambda dask_worker: len(dask_worker.data)).values()))
    step.sync()
    run.losses = [float(loss) for loss in run.losses]
    assert_equal_numbers(run, eagerly(model, classify, adamw, batches))
    assert max(tasks) < 20 * 40 and max(tasks[3:]) <= 1.5 * max(tasks[:3])
    assert max(futures) < 40 and max(results) < 150, (futures, results)
    step.close()


class Scaled(nn.Module):
    """Holds a tensor that is neither parameter nor buffer, and is another one for each length of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 4)
        self.scales = {n: torch.linspace(1, n, 32, dtype=torch.float64) for n in (5, 8)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net((x[..., None] * self.scales[x.shape[1]]).mean((1, 2))[:, None])


@pytest.mark.parametrize("client", [None, "two_workers"])
def test_constants_are_those_of_the_batch_at_hand(client, request):
    client = request.getfixturevalue(client) if client else None
    torch.manual_seed(0)
    model = Scaled().double()
    batches = [(x[:, :length], y) for (x, y), length in zip(points([2, 2, 2, 3]), (8, 5, 8, 5), strict=True)]
    got, step = stepwise(model, F.cross_entropy, adamw, batches, client=client, microbatches=2)
    assert_equal_numbers(got, eagerly(model, classify, adamw, batches))
    assert step.step_program.constants and step.step_program.sizes == (2, 1)
    step.close()
