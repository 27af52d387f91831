"""The versioned state of one worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from daggc.errors import RunError
from daggc.runtime import store

REFS = ("param:w", "state:w.exp_avg")


@pytest.fixture
def held() -> Iterator[store.Store]:
    store.put("s", 3, {ref: torch.zeros(2) for ref in REFS})
    yield store.get("s")
    store.drop("s")


def advance(held: store.Store, version: int, value: float) -> None:
    held.update(version, lambda: {"param:w": torch.full((2,), value)})


def test_an_update_makes_the_next_version_and_keeps_the_last(held: store.Store) -> None:
    advance(held, 3, 1.0)
    assert held.version == 4
    assert held.read("param:w", 4).tolist() == [1, 1]
    assert held.read("param:w", 3).tolist() == [0, 0]
    advance(held, 4, 2.0)
    with pytest.raises(RunError, match="version 3, the worker has version 5"):
        held.read("param:w", 3)


def test_an_update_that_runs_twice_changes_nothing(held: store.Store) -> None:
    advance(held, 3, 1.0)
    advance(held, 3, 9.0)
    assert held.version == 4
    assert held.read("param:w", 4).tolist() == [1, 1]


def test_an_update_of_another_version_is_refused(held: store.Store) -> None:
    for version in (1, 5):  # version 2 is what made this one: that update is done
        with pytest.raises(RunError, match=f"an update of version {version} met version 3"):
            advance(held, version, 1.0)


def test_optimizer_state_has_no_older_version(held: store.Store) -> None:
    advance(held, 3, 1.0)
    with pytest.raises(RunError, match="version 3"):
        held.read("state:w.exp_avg", 3)
    assert held.read("state:w.exp_avg", 4).tolist() == [0, 0]


def test_a_failed_update_poisons_until_restored(held: store.Store) -> None:
    def fails() -> dict[str, torch.Tensor]:
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        held.update(3, fails)
    for action in (lambda: held.read("param:w", 3), lambda: advance(held, 3, 1.0)):
        with pytest.raises(RunError, match="failed halfway"):
            action()
    store.put("s", 3, {ref: torch.ones(2) for ref in REFS})
    assert store.get("s").read("param:w", 3).tolist() == [1, 1]


def test_what_is_put_is_copied_and_snapshots_are_of_one_version() -> None:
    given = torch.zeros(2)
    store.put("t", 0, {"param:w": given})
    given.add_(1)
    assert store.snapshot("t", 0, ["param:w"])["param:w"].tolist() == [0, 0]
    with pytest.raises(RunError):
        store.snapshot("t", 7, ["param:w"])
    store.drop("t")
    with pytest.raises(RunError, match="is not on this worker"):
        store.get("t")


def test_a_step_that_runs_twice_gives_what_it_gave_first(held: store.Store) -> None:
    runs: list[int] = []

    def compute(prepared: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        runs.append(1)
        return {"param:w": prepared["x"] + 1}, {"output:0": prepared["x"]}

    given = [held.step(3, lambda _: {"x": torch.full((2,), 4.0)}, compute) for _ in range(2)]
    assert len(runs) == 1
    assert held.version == 4
    assert all(torch.equal(one["output:0"], torch.full((2,), 4.0)) for one in given)


def test_a_step_that_fails_before_it_changes_anything_leaves_the_state_sound(held: store.Store) -> None:
    def fails(_: object) -> dict[str, torch.Tensor]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        held.step(3, fails, lambda prepared: (prepared, {}))
    assert not held.poisoned
    assert held.version == 3


def test_a_store_comes_in_pieces_and_goes_in_pieces() -> None:
    store.put("p", 4, {"param:w": torch.ones(2)})
    store.put("p", 4, {"state:m": torch.zeros(3)}, more=True)
    assert set(store.get("p").refs) == {"param:w", "state:m"}
    assert store.snapshot("p", 4, ["state:m"])["state:m"].tolist() == [0, 0, 0]
    with pytest.raises(RunError, match="version"):
        store.put("p", 5, {"state:v": torch.zeros(3)}, more=True)
    store.put("p", 4, {"param:w": torch.ones(2)})
    assert store.get("p").refs == ("param:w",)
    store.drop("p")
