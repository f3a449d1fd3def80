"""Charts as inline SVG and HTML bars: no JavaScript, no fonts or images from elsewhere.

Line charts are SVG with a fixed view box; their text grows on narrow screens (style.css), so margins leave
room. Bars are HTML, because they shrink to any width without their text shrinking too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from metier.reports.markup import Markup, join, tag

WIDTH, HEIGHT = 520, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 50
_LABEL_HEIGHT = 20
_MAX_POINTS = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of a chart. `kind` "faint" stays in the background, "dashed" is a reference."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str
    kind: str = "plain"


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A point with intervals in both directions and its name beside it."""

    name: str
    x: tuple[float, float, float]
    """(value, low, high)"""
    y: tuple[float, float, float]
    color: str
    is_square: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """A bar from 0 to its value with an interval over it."""

    name: str
    value: float
    low: float
    high: float
    color: str
    text: str


def ticks(low: float, high: float, *, num_wanted: int = 5) -> list[float]:
    """Round numbers from below `low` to above `high`, about `num_wanted` of them."""
    assert math.isfinite(low), "an axis needs finite ends"
    assert math.isfinite(high), "an axis needs finite ends"
    if high <= low:
        padding = abs(low) * 0.1 or 1.0
        low, high = low - padding, high + padding
    raw = (high - low) / num_wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


class _Axes:
    """Maps values to the view box, and draws the frame."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], *, is_tight: bool) -> None:
        """`is_tight` ends the x axis with the data, not at the next round number."""
        self.x_ticks, self.y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
        self.x_ends = self.x_ticks[0], self.x_ticks[-1]
        if is_tight and min(xs) < max(xs):
            self.x_ends = min(xs), max(xs)
            self.x_ticks = [value for value in self.x_ticks if self.x_ends[0] <= value <= self.x_ends[1]]

    def x(self, value: float) -> float:
        first, last = self.x_ends
        return round(_LEFT + (value - first) / (last - first) * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        first, last = self.y_ticks[0], self.y_ticks[-1]
        return round(HEIGHT - _BOTTOM - (value - first) / (last - first) * (HEIGHT - _TOP - _BOTTOM), 1)

    def frame(self, x_title: str, y_title: str) -> Markup:
        """Grid lines, tick labels and titles."""
        bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
        pieces = []
        for value in self.y_ticks:
            y = self.y(value)
            pieces.append(tag("line", x1=_LEFT, x2=right, y1=y, y2=y, class_="grid"))
            pieces.append(tag("text", f"{value:g}", x=_LEFT - 7, y=y + 4, text_anchor="end"))
        for value in self.x_ticks:
            pieces.append(tag("text", f"{value:g}", x=self.x(value), y=bottom + 19, text_anchor="middle"))
        middle = (_LEFT + right) / 2
        turned = f"translate(15 {(_TOP + bottom) / 2}) rotate(-90)"
        pieces += [
            tag("line", x1=_LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"),
            tag("text", x_title, x=middle, y=HEIGHT - 9, text_anchor="middle", class_="title"),
            tag("text", y_title, transform=turned, text_anchor="middle", class_="title"),
        ]
        return join(pieces)


def _svg(label: str, *children: Markup) -> Markup:
    return tag("svg", *children, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, class_="chart")


def line_chart(lines: Sequence[Line], *, x_title: str, y_title: str, label: str) -> Markup:
    """Lines over a common pair of axes, with a legend of those that are neither faint nor without points."""
    drawn = [line for line in lines if line.points]
    assert drawn, "a chart needs points"
    points = [point for line in drawn for point in line.points]
    axes = _Axes([x for x, _ in points], [y for _, y in points], is_tight=True)
    paths = [
        tag(
            "polyline",
            points=" ".join(f"{axes.x(x)},{axes.y(y)}" for x, y in _thinned(line.points)),
            class_=f"line {line.kind}",
            stroke=line.color,
        )
        for line in drawn
    ]
    keys = [legend_key(line.name, line.color, line.kind) for line in drawn if line.kind != "faint"]
    return tag("figure", tag("div", *keys, class_="legend"), _svg(label, axes.frame(x_title, y_title), *paths))


def legend_key(name: str, color: str, kind: str = "") -> Markup:
    """A name beside a stroke of its color."""
    swatch = tag("i", class_=f"swatch {kind}", style=f"color:{color}")
    return tag("span", swatch, name, class_="key")


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Every n-th point and the last, so that many steps do not make a page of many megabytes."""
    step = -(-len(points) // _MAX_POINTS)
    return points if step <= 1 else [*points[:-1:step], points[-1]]


def scatter(points: Sequence[Point], *, x_title: str, y_title: str, label: str) -> Markup:
    """Named points with interval crosses; names that would lie on one another are moved apart."""
    assert points, "a chart needs points"
    axes = _Axes(
        [x for point in points for x in point.x],
        [y for point in points for y in point.y],
        is_tight=False,
    )
    marks = []
    for point in points:
        (x, x_low, x_high), (y, y_low, y_high) = point.x, point.y
        marks += [
            tag("line", x1=axes.x(x_low), x2=axes.x(x_high), y1=axes.y(y), y2=axes.y(y), stroke=point.color),
            tag("line", x1=axes.x(x), x2=axes.x(x), y1=axes.y(y_low), y2=axes.y(y_high), stroke=point.color),
            _dot(point, axes.x(x), axes.y(y)),
        ]
    labels = []
    for point, y in zip(points, _spread([axes.y(point.y[0]) for point in points]), strict=True):
        x = axes.x(point.x[0])
        is_right = x > (WIDTH + _LEFT) / 2
        labels.append(
            tag(
                "text",
                point.name,
                x=x - 11 if is_right else x + 11,
                y=y - 8,
                text_anchor="end" if is_right else "start",
                style=f"fill:{point.color}",
                class_="name",
            )
        )
    return tag("figure", _svg(label, axes.frame(x_title, y_title), *marks, *labels))


def _dot(point: Point, x: float, y: float) -> Markup:
    if point.is_square:
        return tag("rect", x=x - 6, y=y - 6, width=12, height=12, fill=point.color, class_="dot")
    return tag("circle", cx=x, cy=y, r=6, fill=point.color, class_="dot")


def _spread(positions: Sequence[float]) -> list[float]:
    """Move positions apart to at least a label's height, upwards from the lowest, keeping their order."""
    moved = list(positions)
    lowest = float(HEIGHT)
    for index in sorted(range(len(positions)), key=lambda index: -positions[index]):
        moved[index] = min(positions[index], lowest)
        lowest = moved[index] - _LABEL_HEIGHT
    return moved


def bars(items: Sequence[Bar], *, mark: tuple[float, str] | None = None, label: str) -> Markup:
    """One bar a row, on a common scale that holds 0, all intervals and the mark.

    Args:
        items: the bars, from top to bottom.
        mark: a reference value (chance, say) and its name, drawn as a line through all bars.
        label: what a screen reader says of the whole.
    """
    ends = [0.0, *(end for item in items for end in (item.low, item.high, item.value))]
    ends += [mark[0]] if mark is not None else []
    low, high = min(ends), max(ends)
    spread = (high - low) or 1.0

    def at(value: float) -> float:
        return round(100 * (value - low) / spread, 2)

    rows = []
    for item in items:
        left, right = sorted((at(0), at(item.value)))
        track = [
            tag("i", class_="fill", style=f"left:{left}%;width:{right - left:.2f}%;background:{item.color}"),
            tag("i", class_="zero", style=f"left:{at(0)}%"),
            tag("i", class_="whisker", style=f"left:{at(item.low)}%;width:{at(item.high) - at(item.low):.2f}%"),
        ]
        if mark is not None:
            track.append(tag("i", class_="mark", style=f"left:{at(mark[0])}%", title=mark[1]))
        rows.append(
            tag(
                "div",
                tag("span", item.name, class_="bar-name"),
                tag("span", join(track), class_="track"),
                tag("span", item.text, class_="bar-text"),
                class_="bar",
            )
        )
    caption = None if mark is None else tag("figcaption", tag("span", tag("i", class_="mark"), mark[1], class_="key"))
    return tag("figure", tag("div", join(rows), class_="bars", role="group", aria_label=label), caption)
