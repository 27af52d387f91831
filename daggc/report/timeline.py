"""A picture of tasks on devices over time, the prediction above the measurement, as one HTML file.

The file needs no network: an SVG that stands as it is without scripts, and a script of its own that adds
hover details, zoom and a switch for each phase. Both parts share one time axis, so that they compare at sight.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

from daggc.report.text import plural

_WIDTH = 1120.0  # of the axis, px
_LEFT = 96.0  # device names
_RIGHT = 72.0  # share of the time that a device is busy
_BAR = 22.0
_GAP = 4.0
_TICKS = 10
_NUMBER = 10.0  # the width of a bar that has room for its microbatch's number; also in timeline.html

PHASES = {
    "forward": "#4c7ee0",
    "backward": "#d9624f",
    "forward_backward": "#a3568f",
    "weight_grad": "#e0a03b",
    "update": "#4fa66a",
    "transfer": "#8d7bc9",
    "other": "#8893a5",
}
"""Colour by phase; a phase that is not here is drawn as ``other``."""


@dataclass(frozen=True, slots=True)
class Span:
    """One task: seconds from any common origin; ``microbatch`` is -1 where there is none."""

    name: str
    device: str
    start: float
    end: float
    phase: str = "other"
    microbatch: int = -1

    @staticmethod
    def of_task(name: str, device: str, start: float, end: float, microbatch: int = -1) -> Span:
        """A span whose phase is in the task's name: ``stage0.forward``, ``send``."""
        last = name.rpartition(".")[2]
        return Span(name, device, start, end, "transfer" if last in ("send", "pick") else last, microbatch)


def timeline_html(predicted: Iterable[Span] = (), measured: Iterable[Span] = (), title: str = "daggc timeline") -> str:
    """The HTML page. Each list starts at its own zero; either may be empty."""
    parts = [(name, _from_zero(spans)) for name, spans in (("predicted", predicted), ("measured", measured))]
    parts = [(name, spans) for name, spans in parts if spans]
    horizon = max((span.end for _, spans in parts for span in spans), default=0.0) or 1.0
    used = {_phase(span) for _, spans in parts for span in spans}
    legend = "".join(
        f'<button class="phase" data-phase="{phase}" style="--fill:{colour}">{phase.replace("_", " ")}</button>'
        for phase, colour in PHASES.items()
        if phase in used
    )
    sections = "".join(_section(name, spans, horizon) for name, spans in parts) or "<p>No task was recorded.</p>"
    template = resources.files("daggc.report").joinpath("timeline.html").read_text()
    fields = {"title": html.escape(title), "facts": _facts(parts), "legend": legend, "sections": sections}
    for field, text in fields.items():
        template = template.replace(f"<!--{field}-->", text)
    return template


def makespan(spans: Sequence[Span]) -> float:
    """Seconds from the first start to the last end."""
    return max(span.end for span in spans) - min(span.start for span in spans) if spans else 0.0


def busy_share(spans: Sequence[Span], device: str) -> float:
    """The share of the makespan in which a device runs at least one task."""
    total = makespan(spans)
    intervals = sorted((span.start, span.end) for span in spans if span.device == device)
    busy, reached = 0.0, -math.inf
    for start, end in intervals:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / total if total else 0.0


def seconds_text(seconds: float) -> str:
    """``12.5 ms``; the unit fits the size."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns" if seconds else "0"


def _from_zero(spans: Iterable[Span]) -> list[Span]:
    ordered = sorted(spans, key=lambda span: (span.start, span.end, span.device, span.name))
    zero = ordered[0].start if ordered else 0.0
    return [
        Span(span.name, span.device, span.start - zero, span.end - zero, span.phase, span.microbatch)
        for span in ordered
    ]


def _phase(span: Span) -> str:
    return span.phase if span.phase in PHASES else "other"


def _facts(parts: Sequence[tuple[str, Sequence[Span]]]) -> str:
    """Cards: the makespan of each part, how far they differ, how much the devices idle."""
    cards = [(f"{name} makespan", seconds_text(makespan(spans)), plural(len(spans), "task")) for name, spans in parts]
    if len(parts) == 2:
        guess, truth = makespan(parts[0][1]), makespan(parts[1][1])
        if truth:
            cards.append(("prediction error", f"{(guess - truth) / truth:+.0%}", "of the measured makespan"))
    for name, spans in parts:
        devices = _devices(spans)
        idle = 1 - sum(busy_share(spans, device) for device in devices) / len(devices)
        cards.append((f"{name} idle", f"{idle:.0%}", f"over {plural(len(devices), 'device')}"))
    return "".join(
        f'<div class="card"><span>{html.escape(what)}</span><b>{html.escape(value)}</b><i>{html.escape(note)}</i></div>'
        for what, value, note in cards
    )


def _devices(spans: Sequence[Span]) -> list[str]:
    return sorted({span.device for span in spans}, key=lambda name: [_number(part) for part in name.split(":")])


def _number(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdigit() else (-1, part)


def _lanes(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans of one device in as few rows as keep them from overlapping."""
    lanes: list[list[Span]] = []
    for span in spans:
        lane = next((lane for lane in lanes if lane[-1].end <= span.start + 1e-12), None)
        if lane is None:
            lanes.append([span])
        else:
            lane.append(span)
    return lanes


def _section(name: str, spans: Sequence[Span], horizon: float) -> str:
    """One part of the page: a row for each device, an axis below."""
    rows: list[str] = []
    bars: list[str] = []
    ticks: list[str] = []
    y = 8.0
    for device in _devices(spans):
        own = [span for span in spans if span.device == device]
        lanes = _lanes([span for span in own if span.phase != "transfer"])
        lanes += _lanes([span for span in own if span.phase == "transfer"])  # they run beside the tasks
        height = len(lanes) * (_BAR + _GAP) + _GAP
        rows.append(f'<rect class="row" x="{_LEFT:g}" y="{y:g}" width="{_WIDTH:g}" height="{height:g}"/>')
        middle = y + height / 2 + 4
        rows.append(f'<text class="device" x="{_LEFT - 10:g}" y="{middle:g}">{html.escape(device)}</text>')
        share = busy_share(spans, device)
        rows.append(f'<text class="share" x="{_LEFT + _WIDTH + 8:g}" y="{middle:g}">{share:.0%} busy</text>')
        for index, lane in enumerate(lanes):
            bars += [_bar(span, y + _GAP + index * (_BAR + _GAP), horizon) for span in lane]
        y += height + 6
    step = _tick(horizon)
    for index in range(int(horizon / step + 1e-9) + 1):
        x = _LEFT + index * step / horizon * _WIDTH
        ticks.append(
            f'<g class="tick" data-start="{index * step!r}"><line x1="{x:.2f}" x2="{x:.2f}" y1="4" y2="{y:g}"/>'
            f'<text x="{x:.2f}" y="{y + 14:g}">{seconds_text(index * step)}</text></g>'
        )
    drawn = "".join([*rows, *ticks, *bars])
    size = f'width="{_LEFT + _WIDTH + _RIGHT:g}" height="{y + 22:g}"'
    data = f'data-horizon="{horizon!r}" data-left="{_LEFT:g}" data-width="{_WIDTH:g}"'
    title = html.escape(name)
    svg = f'<svg role="img" aria-label="{title} tasks by device" {size} {data}>{drawn}</svg>'
    return f'<section><h2>{title}</h2><div class="scroll">{svg}</div></section>'


def _bar(span: Span, y: float, horizon: float) -> str:
    x = _LEFT + span.start / horizon * _WIDTH
    width = max((span.end - span.start) / horizon * _WIDTH, 0.6)
    microbatch = f"microbatch {span.microbatch}, " if span.microbatch >= 0 else ""
    details = (
        f"{span.name}\n{_phase(span).replace('_', ' ')}, {microbatch}{span.device}\n"
        f"{seconds_text(span.start)} + {seconds_text(span.end - span.start)}"
    )
    hidden = "" if width >= _NUMBER else ' display="none"'
    number = str(span.microbatch) if span.microbatch >= 0 else ""
    return (
        f'<g class="task" data-phase="{_phase(span)}" data-start="{span.start!r}" data-end="{span.end!r}">'
        f"<title>{html.escape(details)}</title>"
        f'<rect x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{_BAR:g}" rx="2.5" '
        f'fill="{PHASES[_phase(span)]}"/>'
        f'<text x="{x + width / 2:.2f}" y="{y + _BAR / 2 + 4:g}"{hidden}>{number}</text></g>'
    )


def _tick(horizon: float) -> float:
    """A round step that gives about ten ticks: 1, 2 or 5 times a power of ten."""
    rough = horizon / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step for factor in (1, 2, 5, 10) if (step := factor * power) >= rough * 0.999)
