"""``daggc train``: a loop that can be stopped and gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from daggc.cli import main

SOURCE = """
import torch
from torch import nn

def factory():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 3))
    return model, (torch.zeros(6, 4), torch.zeros(6, dtype=torch.int64))

def batches():
    generator = torch.Generator().manual_seed(1)
    for size in (6, 6, 4):
        yield torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)

def loss(output, target):
    return nn.functional.cross_entropy(output, target)

def nothing():
    return []
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "trained.py"
    path.write_text(SOURCE)
    return str(path)


def train(source: str, *more: object) -> list[str]:
    given = ["train", f"{source}:factory", "--batches", f"{source}:batches", "--loss", f"{source}:loss"]
    result = CliRunner().invoke(main, [*given, *map(str, more)])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_resumed_training_has_the_same_losses(source: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved.safetensors"
    whole = train(source, "--steps", 7)
    assert [line.split()[:2] for line in whole] == [["step", str(number)] for number in range(1, 8)]
    first = train(source, "--steps", 4, "--save", saved, "--every", 2)
    rest = train(source, "--steps", 7, "--resume", saved)
    assert first + rest == whole


@pytest.mark.timeout(120)
def test_on_workers_it_is_the_same(source: str) -> None:
    here = train(source, "--steps", 4, "--microbatches", 2, "--clip", 1.0)
    there = train(source, "--steps", 4, "--microbatches", 2, "--clip", 1.0, "--workers", 2, "--explain")
    assert [float(line.split()[-1]) for line in there[-4:]] == pytest.approx(
        [float(line.split()[-1]) for line in here], rel=1e-5
    )
    assert any("on 2 devices" in line for line in there)


def test_several_batches_are_a_step(source: str, tmp_path: Path) -> None:
    """Resumed in the middle of a pass over the data; batches of other sizes in one step."""
    saved = tmp_path / "saved.safetensors"
    whole = train(source, "--steps", 5, "--accumulate", 2)
    first = train(source, "--steps", 2, "--accumulate", 2, "--save", saved)
    assert first + train(source, "--steps", 5, "--accumulate", 2, "--resume", saved) == whole
    assert whole != train(source, "--steps", 5)


def test_an_example_batch_and_the_models_own_loss() -> None:
    example = Path(__file__).parents[1] / "ir_examples" / "gpt_block" / "model.py"
    result = CliRunner().invoke(main, ["train", f"{example}:factory", "--steps", "3", "--optimizer", "sgd"])
    assert result.exit_code == 0, result.output
    losses = [float(line.split()[-1]) for line in result.stdout.splitlines()]
    assert losses[0] > losses[-1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--loss", "nowhere.py:loss"), "no file nowhere.py"),
        (("--batches", "{source}:nothing", "--loss", "{source}:loss"), "no batches"),
        (("--batches", "{source}:missing"), "no callable 'missing'"),
        (("--accumulate", "0", "--loss", "{source}:loss"), "at least one batch"),
        (("--workers", "1", "--scheduler", "tcp://127.0.0.1:1"), "not both"),
        (("--resume", "nowhere.safetensors", "--loss", "{source}:loss"), "nowhere.safetensors"),
    ],
)
def test_bad_arguments_are_refused(source: str, more: tuple[str, ...], message: str) -> None:
    arguments = [argument.format(source=source) for argument in more]
    result = CliRunner().invoke(main, ["train", f"{source}:factory", *arguments])
    assert result.exit_code == 1
    assert message in result.stderr
