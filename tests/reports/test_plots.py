"""Charts put values where they belong."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.reports import plots
from metier.reports.plots import Bar, Line, Point, bars, line_chart, scatter, ticks

finite = st.floats(-1e6, 1e6, allow_nan=False, allow_infinity=False).map(lambda value: round(value, 6))


@given(finite, finite)
def test_ticks_enclose_their_range_in_even_steps(one: float, other: float) -> None:
    low, high = sorted((one, other))
    values = ticks(low, high)
    span = values[-1] - values[0]
    assert values[0] <= low + 1e-6 * span
    assert high <= values[-1] + 1e-6 * span
    assert 2 <= len(values) <= 8
    steps = [second - first for first, second in pairwise(values)]
    assert min(steps) == pytest.approx(max(steps), rel=1e-3)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (1, 9, [0, 2, 4, 6, 8, 10]), (0.31, 0.34, [0.31, 0.32, 0.33, 0.34])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_a_line_runs_from_corner_to_corner() -> None:
    line = Line(name="a", points=[(0, 0), (5, 50), (10, 100)], color="#000")
    chart = line_chart([line], x_title="x", y_title="y", label="l")
    [points] = re.findall(r'points="([^"]*)"', chart)
    corners = [tuple(map(float, point.split(","))) for point in points.split()]
    left, right = plots._LEFT, plots.WIDTH - plots._RIGHT
    bottom, top = plots.HEIGHT - plots._BOTTOM, plots._TOP
    assert corners == [(left, bottom), ((left + right) / 2, (bottom + top) / 2), (right, top)]


def test_lines_share_their_axes_and_faint_ones_have_no_key() -> None:
    lines = [
        Line(name="short", points=[(0, 0), (1, 1)], color="#000"),
        Line(name="long", points=[(0, 0), (10, 10)], color="#111", kind="dashed"),
        Line(name="back", points=[(0, 0), (10, 5)], color="#222", kind="faint"),
        Line(name="absent", points=[], color="#333"),
    ]
    chart = line_chart(lines, x_title="x", y_title="y", label="l")
    ends = [float(points.split()[-1].split(",")[0]) for points in re.findall(r'points="([^"]*)"', chart)]
    assert len(ends) == 3
    assert ends[0] < ends[1] == ends[2]
    legend = chart.split("<svg")[0]
    assert "short" in legend
    assert "long" in legend
    assert "back" not in legend
    assert "absent" not in chart


def test_a_single_point_can_be_drawn() -> None:
    chart = line_chart([Line(name="a", points=[(3, 4)], color="#000")], x_title="x", y_title="y", label="l")
    assert "nan" not in chart


def test_long_lines_are_thinned_and_keep_their_ends() -> None:
    points = [(float(step), float(step % 7)) for step in range(100_000)]
    thinned = plots._thinned(points)
    assert 300 <= len(thinned) <= plots._MAX_POINTS + 1
    assert (thinned[0], thinned[-1]) == (points[0], points[-1])
    assert plots._thinned(points[:600]) == points[:600]


def test_names_of_points_do_not_lie_on_one_another() -> None:
    points = [Point(name=f"p{i}", x=(i / 50, 0, 1), y=(50 + i / 9, 0, 100), color="#000") for i in range(5)]
    chart = scatter(points, x_title="x", y_title="y", label="l")
    heights = sorted(float(y) for y in re.findall(r'<text x="[^"]*" y="([^"]*)"[^>]*class="name"', chart))
    assert len(heights) == 5
    assert min(second - first for first, second in pairwise(heights)) >= 19.9


def test_points_lie_at_their_values_with_their_intervals() -> None:
    point = Point(name="p", x=(5, 0, 10), y=(40, 0, 100), color="#000")
    chart = scatter([point], x_title="x", y_title="y", label="l")
    width = plots.WIDTH - plots._LEFT - plots._RIGHT
    height = plots.HEIGHT - plots._TOP - plots._BOTTOM
    assert f'cx="{plots._LEFT + width / 2}" cy="{plots.HEIGHT - plots._BOTTOM - 0.4 * height:.1f}"' in chart
    assert f'x1="{float(plots._LEFT)}" x2="{float(plots.WIDTH - plots._RIGHT)}"' in chart


def bar(value: float, low: float, high: float) -> Bar:
    return Bar(name="n", value=value, low=low, high=high, color="#123456", text="t")


def styles(text: str, name: str) -> list[str]:
    return re.findall(rf'class="{name}" style="([^"]*)"', text)


def test_bars_share_a_scale_that_holds_every_interval() -> None:
    text = bars([bar(50, 40, 60), bar(25, 0, 100)], label="l")
    assert styles(text, "fill") == [
        "left:0.0%;width:50.00%;background:#123456",
        "left:0.0%;width:25.00%;background:#123456",
    ]
    assert styles(text, "whisker") == ["left:40.0%;width:20.00%", "left:0.0%;width:100.00%"]


def test_bars_of_both_signs_start_at_zero() -> None:
    text = bars([bar(-1, -1, -1), bar(3, 3, 3)], label="l")
    assert styles(text, "fill") == [
        "left:0.0%;width:25.00%;background:#123456",
        "left:25.0%;width:75.00%;background:#123456",
    ]
    assert styles(text, "zero") == ["left:25.0%"] * 2


def test_a_mark_is_drawn_through_each_bar_and_named() -> None:
    text = bars([bar(50, 50, 50), bar(10, 10, 10)], mark=(25, "chance"), label="l")
    assert styles(text, "mark") == ["left:50.0%"] * 2
    assert "chance</span></figcaption>" in text


def test_bars_of_nothing_are_drawn() -> None:
    assert "left:0.0%;width:0.00%" in bars([bar(0, 0, 0)], label="l")
