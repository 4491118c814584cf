"""Line charts as inline SVG: no script, colours from the page's style, values under the pointer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import NamedTuple

from dressage.monitor.metrics import Metric
from dressage.monitor.page import Html

WIDTH, HEIGHT = 420, 224
_TOP, _BOTTOM, _SIDE, _EDGE = 22, 24, 46, 14
_MOST_POINTS = 150
"""Longer curves are drawn as means of neighbouring steps: more points than this nobody can tell apart."""
_DOTS_UP_TO = 40
"""Longer curves are lines without dots."""


class Point(NamedTuple):
    """A value of a step; None where the number was not finite."""

    step: float
    value: float | None


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    metric: Metric
    points: Sequence[Point]
    colour: int
    """0 to 3: which of the page's curve colours."""
    right: bool = False
    """Measured on an axis of its own, on the right."""


@dataclass(frozen=True)
class Mark:
    """A dashed level to compare with."""

    value: float
    label: str


class Flag(NamedTuple):
    """A step at which something happened."""

    step: float
    label: str


class _Axis(NamedTuple):
    low: float
    high: float
    step: float
    """Between ticks."""

    @property
    def ticks(self) -> list[float]:
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        return [self.step * k for k in range(first, last + 1)]

    def part(self, value: float) -> float:
        """0 at the low end, 1 at the high."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class _Frame:
    """Where steps and values lie on the picture."""

    across: _Axis
    left: _Axis
    right: _Axis | None

    @property
    def end(self) -> float:
        return WIDTH - (_SIDE if self.right else _EDGE)

    def x(self, step: float) -> float:
        return _SIDE + self.across.part(step) * (self.end - _SIDE)

    def y(self, value: float, right: bool = False) -> float:
        axis = self.right if right and self.right else self.left
        return HEIGHT - _BOTTOM - axis.part(value) * (HEIGHT - _TOP - _BOTTOM)


def line_chart(
    lines: Sequence[Line], *, title: str, step_word: str, marks: Sequence[Mark] = (), flags: Sequence[Flag] = ()
) -> Html:
    """The curves over the steps, at least one value on the left; each side's axis has the unit of its first line."""
    lines = [_thinned(line) for line in lines]
    left, right = [line for line in lines if not line.right], [line for line in lines if line.right]
    steps = sorted({point.step for line in lines for point in line.points})
    frame = _Frame(
        _step_axis(steps[0], steps[-1]),
        _value_axis(_values(left) + [mark.value for mark in marks], left[0].metric),
        _value_axis(_values(right), right[0].metric) if right else None,
    )
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_left_axis(frame, left[0].metric),
        *(_right_axis(frame, right[0]) if right else ()),
        *_bottom_axis(frame, step_word),
        *(_mark(frame, mark) for mark in marks),
        *(_upright(frame, flag) for flag in flags),
        *(_curve(frame, line) for line in lines),
        *(_flag(frame, flag, row) for row, flag in enumerate(flags)),
    ]
    x = [frame.x(step) for step in steps]
    edges = [x[0] - 6, *((a + b) / 2 for a, b in pairwise(x)), x[-1] + 6]
    for step, (begin, end) in zip(steps, pairwise(edges), strict=True):
        parts.append(_column(frame, step, begin, end, lines, step_word))
    return Html("".join([*parts, "</svg>"]))


def _left_axis(frame: _Frame, metric: Metric) -> list[str]:
    parts = [_text(0, 10, "", _unit(metric))]
    for tick in frame.left.ticks:
        y = frame.y(tick)
        parts.append(_level("grid", frame, y))
        parts.append(_text(_SIDE - 6, y + 4, "end", _tick(tick, frame.left.step, metric)))
    return parts


def _right_axis(frame: _Frame, line: Line) -> list[str]:
    parts = [_text(WIDTH, 10, f"end c{line.colour}", _unit(line.metric))]
    for tick in frame.right.ticks if frame.right else ():
        label = _tick(tick, frame.right.step, line.metric) if frame.right else ""
        parts.append(_text(frame.end + 6, frame.y(tick, True) + 4, f"c{line.colour}", label))
    return parts


def _bottom_axis(frame: _Frame, step_word: str) -> list[str]:
    below = HEIGHT - _BOTTOM + 18
    ticks = [_text(frame.x(tick), below, "middle", f"{tick:,.0f}") for tick in frame.across.ticks]
    return [_text(_SIDE - 12, below, "end", step_word), *ticks]


def _mark(frame: _Frame, mark: Mark) -> str:
    y = frame.y(mark.value)
    return _level("mark", frame, y) + _text(frame.end - 2, y - 4, "end", mark.label)


def _upright(frame: _Frame, flag: Flag) -> str:
    x = frame.x(flag.step)
    return f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'


def _flag(frame: _Frame, flag: Flag, row: int) -> str:
    """Labels stand one above the other from the bottom, before the curves, on the side where there is room."""
    x, late = frame.x(flag.step), frame.across.part(flag.step) > 0.6
    return _text(x - 4 if late else x + 4, HEIGHT - _BOTTOM - 6 - 13 * row, "flag end" if late else "flag", flag.label)


def _curve(frame: _Frame, line: Line) -> str:
    """With a gap where a value is missing."""
    path, dots, pen_down = "", "", False
    for step, value in line.points:
        if value is not None:
            x, y = frame.x(step), frame.y(value, line.right)
            path += f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}"
            dots += f'<circle class="dot c{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>'
        pen_down = value is not None
    return f'<path class="line c{line.colour}" d="{path}"/>{dots if len(line.points) <= _DOTS_UP_TO else ""}'


def _column(frame: _Frame, step: float, begin: float, end: float, lines: Sequence[Line], step_word: str) -> str:
    """What the pointer meets around a step: a guide, a ring on each curve, and the values in words."""
    met = [(line, point.value) for line in lines for point in line.points if point.step == step]
    said = "\n".join([f"{step_word} {step:g}", *(f"{line.label}: {line.metric.show(value)}" for line, value in met)])
    x, bottom = frame.x(step), HEIGHT - _BOTTOM
    rings = "".join(
        f'<circle class="ring c{line.colour}" cx="{x:.1f}" cy="{frame.y(value, line.right):.1f}" r="4"/>'
        for line, value in met
        if value is not None
    )
    return (
        f'<g class="at"><title>{escape(said)}</title>'
        f'<rect x="{begin:.1f}" y="{_TOP}" width="{end - begin:.1f}" height="{bottom - _TOP}"/>'
        f'<g class="met"><line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>{rings}</g></g>'
    )


def _text(x: float, y: float, style: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="tick {style}">{escape(text)}</text>' if text else ""


def _level(style: str, frame: _Frame, y: float) -> str:
    return f'<line class="{style}" x1="{_SIDE}" x2="{frame.end}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _thinned(line: Line) -> Line:
    size = math.ceil(len(line.points) / _MOST_POINTS)
    if size <= 1:
        return line
    points = []
    for begin in range(0, len(line.points), size):
        run = line.points[begin : begin + size]
        finite = [point.value for point in run if point.value is not None]
        points.append(Point(run[-1].step, sum(finite) / len(finite) if finite else None))
    return Line(line.label, line.metric, points, line.colour, line.right)


def _values(lines: Sequence[Line]) -> list[float]:
    return [point.value for line in lines for point in line.points if point.value is not None]


def _value_axis(values: Sequence[float], metric: Metric) -> _Axis:
    """A range around the values, never so narrow that noise looks like news; with zero in it if it is near."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    share, nothing_below_zero = metric.unit == "share", low >= 0
    narrowest = 0.2 if share else max(0.05 * max(abs(low), abs(high)), 1e-12)
    middle, reach = (low + high) / 2, 0.56 * max(high - low, narrowest)
    low, high = middle - reach, middle + reach
    if share:
        low, high = max(0.0, min(low, 1 - narrowest)), min(1.0, max(high, narrowest))
    elif nothing_below_zero and low < 0.25 * high:
        low = 0.0
    return _Axis(low, high, _round_step((high - low) / 4))


def _step_axis(first: float, last: float) -> _Axis:
    last = last if last > first else first + 1
    return _Axis(first, last, max(1.0, _round_step((last - first) / 5)))


def _round_step(rough: float) -> float:
    """The nearest of 1, 2, 5, 10 times a power of ten, by ratio."""
    power = 10.0 ** math.floor(math.log10(rough))
    return power * min((1, 2, 5, 10), key=lambda k: abs(math.log(k * power / rough)))


def _tick(value: float, step: float, metric: Metric) -> str:
    """Just as many digits as the ticks need to differ."""
    if metric.unit == "share":
        return f"{100 * value:.{_digits(100 * step)}f} %"
    if abs(value) >= 10_000 and step >= 100:
        return f"{value / 1000:g}k"
    if step < 1e-4:
        return f"{value:.0e}" if abs(value) >= step / 2 else "0"
    return f"{value if abs(value) >= step / 2 else 0:.{_digits(step)}f}".replace("-", "\u2212")


def _digits(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9))


def _unit(metric: Metric) -> str:
    return "" if metric.unit == "share" else metric.unit
