"""The HTML timeline: its numbers, its structure, and that it needs nothing from outside."""

from __future__ import annotations

import itertools
from html.parser import HTMLParser

import pytest

from daggc.report.timeline import PHASES, Span, busy_share, makespan, seconds_text, timeline_html

PREDICTED = [
    Span("stage0.forward", "cpu:0", 0.0, 1.0, "forward", 0),
    Span("stage0.forward", "cpu:0", 1.0, 2.0, "forward", 1),
    Span("send", "cpu:0", 1.0, 1.1, "transfer", 0),
    Span("stage1.forward", "cpu:1", 1.1, 2.0, "forward", 0),
    Span("stage1.backward", "cpu:1", 2.0, 4.0, "backward", 0),
]
MEASURED = [
    Span('<script>alert("x")</script>', "cpu:0", 100.0, 101.5, "forward", 0),
    Span("stage1.forward", "cpu:10", 101.5, 103.0, "no such phase"),
    Span("stage1.forward", "cpu:9", 103.0, 105.0, "update", 7),
]
VOID = {"meta", "line", "rect", "br"}


class Page(HTMLParser):
    """Checks that tags close in order; keeps what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if attrs.get("class") == name]


@pytest.fixture(scope="module")
def html() -> str:
    return timeline_html(PREDICTED, MEASURED, "a <title> & more")


def test_page_is_well_formed_and_self_contained(html: str) -> None:
    page = Page(html)
    assert not page.open
    assert not [attrs for _, attrs in page.tags if attrs.keys() & {"src", "href", "srcset"}]
    assert "http" not in html
    assert "@import" not in html
    assert "<!--" not in html
    assert next(data for tag, data in page.texts if tag == "title") == "a <title> & more"
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 1  # a task's name is not one


def test_predicted_stands_above_measured(html: str) -> None:
    assert [data for tag, data in Page(html).texts if tag == "h2"] == ["predicted", "measured"]


def test_every_task_is_drawn_at_its_time(html: str) -> None:
    tasks = Page(html).of_class("task")
    assert len(tasks) == len(PREDICTED) + len(MEASURED)
    assert [float(str(task["data-start"])) for task in tasks[-3:]] == [0.0, 3.0, 1.5]  # devices by number: 0, 9, 10
    assert {task["data-phase"] for task in tasks} == {"forward", "backward", "transfer", "update", "other"}


def test_axis_is_shared(html: str) -> None:
    horizons = {attrs["data-horizon"] for tag, attrs in Page(html).tags if tag == "svg"}
    assert horizons == {"5.0"}


def test_bars_of_one_row_do_not_overlap(html: str) -> None:
    rects = [attrs for tag, attrs in Page(html).tags if tag == "rect" and "fill" in attrs]
    rows: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for index, rect in enumerate(rects):
        x, width = float(str(rect["x"])), float(str(rect["width"]))
        rows.setdefault((str(rect["y"]), index < len(PREDICTED)), []).append((x, x + width))
    for spans in rows.values():
        spans.sort()
        assert all(end <= start + 0.05 for (_, end), (start, _) in itertools.pairwise(spans))
    assert {rect["fill"] for rect in rects} <= set(PHASES.values())


def test_microbatch_numbers_and_legend(html: str) -> None:
    page = Page(html)
    assert ("text", "7") in page.texts
    assert [attrs["data-phase"] for tag, attrs in page.tags if tag == "button" and "data-phase" in attrs] == [
        phase for phase in PHASES if phase in {"forward", "backward", "transfer", "update", "other"}
    ]


def test_cards_say_makespan_and_error(html: str) -> None:
    bold = [data for tag, data in Page(html).texts if tag == "b"]
    assert bold[:3] == ["4 s", "5 s", "-20%"]


def test_one_part_or_none() -> None:
    assert [data for tag, data in Page(timeline_html(PREDICTED)).texts if tag == "h2"] == ["predicted"]
    assert "No task was recorded." in timeline_html()


def test_instant_tasks_do_no_harm() -> None:
    assert Page(timeline_html([Span("a", "cpu:0", 3.0, 3.0)])).of_class("task")


def test_shares_and_times() -> None:
    assert makespan(PREDICTED) == 4.0
    assert busy_share(PREDICTED, "cpu:0") == 0.5  # the transfer runs beside a task
    assert [seconds_text(t) for t in (0, 2.5e-8, 3e-5, 0.0125, 12)] == ["0", "25 ns", "30 µs", "12.5 ms", "12 s"]


def test_phase_is_read_from_a_tasks_name() -> None:
    names = ("stage3.weight_grad", "send", "odd")
    assert [Span.of_task(name, "cpu:0", 0, 1).phase for name in names] == ["weight_grad", "transfer", "odd"]
