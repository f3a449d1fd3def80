"""The page on routing profiles: complete, well formed, self-contained, and names stay text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from html_page import ALLOWED_TAGS, HOSTILE, Page
from made_profiles import counted_profile as profile
from metier.reports.analysis import render_analysis, write_analysis
from metier.routing.analysis import analyse

LAW = profile([[50, 30, 20, 0], [40, 40, 10, 10]])
CODE = profile([[0, 50, 10, 40], [40, 40, 10, 10]])


def rendered(first: str = "law", second: str = "code") -> str:
    profiles = {first: LAW, second: CODE}
    return render_analysis(analyse(profiles, drifts=[(first, second)]), profiles)


def test_each_study_is_on_the_page() -> None:
    words = Page(rendered()).words
    for title in ("How concentrated", "What tasks share", "Drift: law → code", "Every expert"):
        assert title in words
    assert "2 profiles of 2 MoE layers with 4 experts" in words
    assert "shares of its routed tokens" in words
    assert "Two random sets share 1.0" in words
    # layer 1 moved 0.6, layer 3 nothing; of the top two 1 and 2 stayed
    assert "30% of routing went to other experts" in words
    assert "experts 1.5 stayed" in words
    assert "layer 1, expert 0 50% 0% -50.0" in words.replace("−", "-")


def test_each_profile_has_a_heat_map_of_every_expert() -> None:
    cells = Page(rendered()).of_class("cell")
    assert len(cells) == 2 * 2 * 4
    assert "layer 1, expert 0: 0.5000" in (cells[0]["title"] or "")
    assert "selected" not in Page(rendered()).words.split("Every expert")[1]


def test_one_profile_makes_a_page_without_comparisons() -> None:
    words = Page(render_analysis(analyse({"law": LAW}), {"law": LAW})).words
    assert "What tasks share" not in words
    assert "Drift" not in words


def test_nothing_is_fetched_and_nothing_runs() -> None:
    text = rendered()
    assert "://" not in text
    assert "url(" not in text
    assert "<script" not in text


def test_a_profiles_name_stays_text() -> None:
    page, plain = Page(rendered(HOSTILE, "b")), Page(rendered("harmless", "b"))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert {tag for tag, _ in page.elements} <= ALLOWED_TAGS


@pytest.mark.parametrize("score", ["token", "gate"])
def test_the_page_and_its_json_are_written_side_by_side(tmp_path: Path, score: str) -> None:
    profiles = {"law": LAW}
    analysis = analyse(profiles, score=score)  # type: ignore[arg-type]
    path = write_analysis(tmp_path / "new" / "folder", analysis, profiles)
    assert path.read_text(encoding="utf-8") == render_analysis(analysis, profiles)
    values = json.loads((path.parent / "analysis.json").read_text())
    assert values["score"] == score
    assert values["metier_version"]
    assert values["profiles"]["law"]["top_share"]["1"] == pytest.approx([0.5, 0.4])
