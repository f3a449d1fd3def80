"""Colours of the heat map: monotonous, clipped, and grey where there is no score."""

from __future__ import annotations

import dataclasses

import pytest

from metier.reports.data import ReportData
from metier.reports.heatmap import heat_map, shade


def lightness(color: str) -> int:
    return sum(int(color[i : i + 2], 16) for i in (1, 3, 5))


def test_a_higher_score_is_darker() -> None:
    shades = [lightness(shade(step / 50)) for step in range(51)]
    assert shades == sorted(shades, reverse=True)
    assert len(set(shades)) > 45
    assert (shade(0.0), shade(1.0)) == ("#f7fbff", "#08306b")


@pytest.mark.parametrize(("value", "same_as"), [(-1.0, 0.0), (7.0, 1.0), (float("inf"), 1.0)])
def test_values_outside_are_clipped(value: float, same_as: float) -> None:
    assert shade(value) == shade(same_as)


def test_no_score_is_grey() -> None:
    assert shade(float("nan")) == "#d0d0d0"


def test_the_highest_score_of_all_layers_is_darkest(run: ReportData) -> None:
    text = heat_map(run)
    assert text.count(f"background:{shade(1.0)}") == 1
    assert f'background:{shade(1.0)}" title="layer 3, expert 4: 0.7000, selected"' in text
    assert "0.70" in text


def test_a_profile_without_any_score_is_still_drawn(run: ReportData) -> None:
    empty = dataclasses.replace(run, scores_LE=[[0.0] * 5, [float("nan")] * 5])
    assert heat_map(empty).count("cell") == heat_map(run).count("cell")


def test_the_label_says_what_the_picture_shows(run: ReportData) -> None:
    assert 'aria-label="Heat map of 2 layers by 5 experts. 3 experts are selected;' in heat_map(run)
