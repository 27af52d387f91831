"""Schedules against published bubble rates and memory, and against their closed forms."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daggc.plan.schedule import BACKWARD, FORWARD, SPLIT_BACKWARD, WEIGHT_GRAD, interleaved, schedule_named, zb_2p
from daggc.plan.simulate import simulate_schedule

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools" / "planning"))

from schedule_table import COLUMNS, PUBLISHED, Row, least_rate, main, outcome, published_peak


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row.model}-{row.stages}-{row.microbatches}")
def test_published_bubble_rates_and_memory(row):
    rates = dict(zip(COLUMNS, row.rates, strict=True))
    for name, published in rates.items():
        result = outcome(row, name)
        if name == "zb-2p":
            assert round(result.rate, 4) <= published
            assert result.rate >= least_rate(row) - 1e-9
        else:
            assert round(result.rate, 4) == published
        for rank, peak in enumerate(result.schedule.peak_activations()):
            assert peak <= published_peak(name, row, rank) + 1e-9


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v"])
def test_peak_activations_are_the_published_ones(name):
    row = Row("", 6, 24, 1, 1, 1, 0)
    result = outcome(row, name)
    peaks = result.schedule.peak_activations()
    formula = [published_peak(name, row, rank) for rank in range(row.stages)]
    if name in SPLIT_BACKWARD:  # unfinished W hold M_W, less than the M_B that the formula counts
        assert max(peaks) == pytest.approx(max(formula)) and all(a <= b for a, b in zip(peaks, formula, strict=True))
    else:
        assert list(peaks) == pytest.approx(formula)


times = st.integers(1, 6).map(lambda quarters: quarters / 4)


@given(st.integers(1, 5), st.integers(0, 6), times, times, times)
def test_closed_forms_of_whole_backwards(stages, more, forward, backward, weight):
    row = Row("", stages, stages + more, forward, backward, weight, 0.0)
    for name in ("gpipe", "1f1b"):
        makespan = row.work / (1 - outcome(row, name).rate)
        assert makespan - row.work == pytest.approx((stages - 1) * (forward + backward + weight))


@given(st.integers(1, 4), st.integers(2, 3), st.integers(1, 3), times, times)
def test_closed_form_of_interleaved(devices, chunks, groups, forward, backward):
    """The bubble is 1F1B's over the chunks: of whole stages of chunks (F + B), (p - 1) (F + B)."""
    microbatches = devices * groups
    schedule = interleaved(devices * chunks, microbatches, chunks=chunks)
    makespan = simulate_schedule(schedule, {FORWARD: forward, BACKWARD: backward}).makespan
    assert makespan == pytest.approx((microbatches * chunks + devices - 1) * (forward + backward))


@given(st.integers(1, 5), st.integers(0, 4), times, times, times)
def test_closed_forms_of_zero_bubble(stages, more, forward, backward, weight):
    """(p-1)(F+B-W) and (p-1)(F+B-2W), where W is no longer than the forward whose place it takes."""
    weight = min(forward, weight)
    row = Row("", stages, 2 * stages + more, forward, backward, weight, 0.0)
    for name, count in (("zb-h1", 1), ("zb-1p", 1), ("zb-h2", 2)):
        span = row.work / (1 - outcome(row, name).rate)
        bubble = (stages - 1) * (forward + backward - count * weight)
        if bubble >= 0 and (name != "zb-h2" or weight <= backward):
            assert span - row.work == pytest.approx(bubble)


@given(st.integers(1, 6), st.integers(1, 12), times, times, times, st.floats(0, 0.2))
def test_zb_2p_is_no_worse_than_what_has_less_memory(stages, microbatches, forward, backward, weight, transfer):
    row = Row("", stages, microbatches, forward, backward, weight, transfer)
    best = outcome(row, "zb-2p")
    assert least_rate(row) - 1e-9 <= best.rate
    for name in ("zb-h1", "zb-h2"):
        assert best.rate <= outcome(row, name).rate + 1e-9
    assert max(best.schedule.peak_activations()) <= 2 * stages + 1e-9


def test_the_whole_may_be_kept_short_rather_than_spans():
    seconds = {FORWARD: 18.5, BACKWARD: 18.1, WEIGHT_GRAD: 9.3}
    spans, whole = (zb_2p(8, 24, seconds=seconds, transfer=0.6, objective=what) for what in ("span", "makespan"))
    assert simulate_schedule(whole, seconds, 0.6).makespan <= simulate_schedule(spans, seconds, 0.6).makespan


def test_memory_buys_time():
    seconds = {FORWARD: 1.0, BACKWARD: 1.0, WEIGHT_GRAD: 0.7}

    def span(memory: float) -> float:
        schedule = schedule_named("zb-2p")(6, 24, split_backward=True, seconds=seconds, transfer=0.02, memory=memory)
        assert max(schedule.peak_activations()) <= memory
        result = simulate_schedule(schedule, seconds, 0.02)
        return max(result.on(place)[-1].end - result.on(place)[0].start for place in result.devices)

    spans = [span(memory) for memory in (2, 4, 8, 12)]
    assert spans == sorted(spans, reverse=True) and spans[0] > 1.5 * spans[-1]


def test_nine_thousand_tasks_are_ordered_in_seconds():
    begin = time.process_time()
    schedule_named("zb-1p")(32, 96, split_backward=True)
    assert time.process_time() - begin < 5


def test_the_tool_prints_rows_of_ones_own(capsys):
    assert main(["--row", "4", "8", "1.0", "1.0", "0.5", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "zb-2p peak" in printed and "rank 3" in printed and "zb-v" in printed
