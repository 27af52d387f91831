"""tools/bench in small: ways in processes of their own compute the same training, fail loudly and leave nothing."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

from benchmarks.contenders import Command, Contender, WayError, in_turn
from benchmarks.local import Row
from benchmarks.report import PAGE, WORKERS, put_in_page, read_json, targets_table, ways_table, write_json
from benchmarks.results import Results
from benchmarks.two_workers import LossError, check_losses, groups, search
from benchmarks.ways import WAYS, Way

EAGER = Command("eager")
LOSSES = (4.565771, 3.741868)  # of the small GPT, eager


def running(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_ratios_are_of_rounds_that_have_both() -> None:
    results = Results(rounds=[{"a": 2.0, "b": 1.0}, {"a": 9.0}, {"a": 3.0, "b": 1.0}, {"a": 5.0, "b": 2.0}])
    assert results.ratio("a", "b") == 2.5
    assert results.count("a", "b") == 3
    assert results.seconds("a") == 4.0
    assert results.ratio("a", "c") is None
    results.forget(["b"])
    assert results.seconds("b") is None


def test_ways_that_are_compared_are_in_one_group_with_the_reference() -> None:
    parts = groups(list(WAYS["gpt"]))
    assert all(part[0] == "eager-2" and len(part) <= 6 for part in parts)
    assert {"pipelining", "dask", "dask-tuned", "daggc-pipeline", "daggc-any"} <= set(parts[0])
    assert groups(["eager-2"]) == [["eager-2"]]


def test_the_reference_and_ways_that_a_way_is_like_exist() -> None:
    for ways in WAYS.values():
        assert "eager-2" in ways
        assert {way.like for way in ways.values()} <= ways.keys()


def test_other_losses_are_refused() -> None:
    results = Results(losses={"eager-2": [9.0, 8.0], "ddp": [9.0, 8.5]})
    with pytest.raises(LossError, match=r"ddp: the loss of step 1 is 8\.5"):
        check_losses("gpt", "ddp", results)
    results.losses["ddp"] = [9.0001, 8.001]
    check_losses("gpt", "ddp", results)


def test_pieces_add_up_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    assert read_json(file) == ([], {})
    results = Results(
        rounds=[{"eager-2": 2.0, "daggc-any": 2.1}],
        losses={"eager-2": [9.0], "daggc-any": [9.0]},
        notes={"compile-2": "not run: there is no g++"},
    )
    row = Row("gpt", 1, 20.0, 21.0, 1.05, 1.03, 100, 101, True)
    write_json([row], {"gpt": results}, file)
    local, found = read_json(file)
    assert local == [row]
    assert found == {"gpt": results}
    text = ways_table("gpt", found["gpt"])
    assert "| daggc, any plan | 2.100 | 1.050 | 9.00000 | replicas 2" in text
    assert "not run: there is no g++" in text
    assert "| 1.050 | 1.08 | 1 |" in targets_table(found)


def test_the_page_has_a_place_for_each_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    put_in_page("one", page=page)
    put_in_page("two", WORKERS, page)
    assert "begin -->\none\n<!--" in page.read_text()
    assert "begin -->\ntwo\n<!--" in page.read_text()
    with pytest.raises(ValueError, match="no line"):
        put_in_page("three", " other", page)


def test_a_way_trains_rests_and_goes_on() -> None:
    with Contender("one", EAGER, "small-gpt") as one, Contender("two", EAGER, "small-gpt") as two:
        for own in (one, two):
            assert own.make({"threads": 1}).losses == pytest.approx(LOSSES, rel=1e-5)
            own.rest()
        seconds = [in_turn([one, two], 2, at) for at in range(2)]
        assert all(set(own) == {"one", "two"} for own in seconds)
        pids = [process.popen.pid for own in (one, two) for process in own._processes]
        two.rest()
    assert not any(running(pid) for pid in pids)


def test_a_way_that_fails_tells_why() -> None:
    with Contender("wrong", EAGER, "tiny") as wrong, pytest.raises(WayError, match=r"(?s)wrong has ended.*surprise"):
        wrong.make({"threads": 1, "surprise": 1})


def test_a_way_that_hangs_is_not_waited_for() -> None:
    with Contender("hung", EAGER, "tiny") as hung:
        for process in hung._processes:
            process.said = b""
        with pytest.raises(WayError, match="hung did not answer in time"):
            hung.make({"threads": 1}, timeout=0.01)
        hung.signal(signal.SIGKILL)


def test_a_search_keeps_the_best_and_goes_past_what_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    way = Way("eager", EAGER, {"threads": 1}, ([{"threads": "many"}], [{"compiled": False}]))
    monkeypatch.setitem(WAYS, "tiny", {"own": way})  # pyright: ignore[reportArgumentType]
    results = Results()
    search("tiny", "own", results, lambda text: None)
    assert results.chosen["own"]["threads"] == 1
    assert [bool(one["why"]) for one in results.tried["own"]] == [False, True, False]
    said: list[str] = []
    search("tiny", "own", results, said.append)
    assert said == []  # all was known


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ddp", [{}]),
        (
            "pipelining",
            [
                {"schedule": "1F1B", "cuts": [2], "microbatches": 4},
                {"schedule": "ZBVZeroBubble", "cuts": [1, 2, 3], "microbatches": 4},
            ],
        ),
        ("dask", [{"cut": 2, "microbatches": 4}, {"cut": 3, "microbatches": 2, "ahead": 1}]),
        ("daggc-pipeline", [{"replicas": 1, "schedule": "zb-h1", "microbatches": 2}]),
    ],
)
def test_each_way_is_the_same_training(name: str, settings: list[dict[str, object]]) -> None:
    with Contender(name, WAYS["gpt"][name].command, "small-gpt") as own:
        for one in settings:
            assert own.make(one).losses == pytest.approx(LOSSES, rel=1e-4)
            assert len(own.run(3).losses) == 3
