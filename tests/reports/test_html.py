"""The page is well formed, complete, self-contained, and shows data as text whatever it holds."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from html_page import ALLOWED_TAGS, HOSTILE, Page
from metier.evaluation.result import SampleReply
from metier.reports.data import ReportData
from metier.reports.html import render, write_report


def everywhere(run: ReportData, text: str) -> ReportData:
    """The run with `text` in every place that data can put a string."""

    def replaced(evaluation: Any) -> Any:
        sample = SampleReply(prompt=text, reference=text, reply=text + "!", origin=text)
        score = dataclasses.replace(evaluation.score, metric=text)
        return dataclasses.replace(
            evaluation,
            split=text,
            samples=(sample,),
            metrics={text: score},
            domains={text: next(iter(evaluation.domains.values()))},
            settings={text: text},
        )

    evaluations = {name: replaced(one) for name, one in run.evaluations.items()}
    names = {"esft": text + "1", "full": text + "2", "base": "base"}
    return dataclasses.replace(
        run,
        title=text,
        model=text,
        task=text,
        task_description=text,
        score_name=text,
        command=text,
        config={text: text},
        versions={text: text, "metier": text},
        metrics={names[name]: rows for name, rows in run.metrics.items()},
        evaluations={names[name]: one for name, one in evaluations.items()},
        rows=[dataclasses.replace(row, name=names[row.name], score=evaluations[row.name].score) for row in run.rows],
    )


def test_the_heat_map_has_a_cell_for_each_expert_of_each_layer(run: ReportData) -> None:
    cells = Page(render(run)).of_class("cell")
    assert len(cells) == 2 * 5
    titles = [cell["title"] for cell in cells]
    assert titles[0] == "layer 1, expert 0: 0.5000, selected"
    assert titles[6] == "layer 3, expert 1: 0.0500"


def test_the_marked_cells_are_the_selection(run: ReportData) -> None:
    marked = [cell for cell in Page(render(run)).of_class("on") if "cell" in (cell["class"] or "")]
    found = [re.findall(r"\d+", title)[:2] for title in (cell["title"] or "" for cell in marked)]
    assert found == [["1", "0"], ["1", "3"], ["3", "4"]]
    assert all((cell["title"] or "").endswith("selected") for cell in marked)


def test_the_page_says_what_each_layer_covers(run: ReportData) -> None:
    words = Page(render(run)).words
    assert "2 · 70%" in words  # experts 0 and 3 of layer 1: 0.5 + 0.2
    assert "1 · 70%" in words
    assert "The 3 of 10 selected experts by layer" in words
    assert "1 2 0, 3 3 1 4" in words


def test_figures_of_the_run_are_on_the_page(run: ReportData) -> None:
    words = Page(render(run)).words
    esft, full = run.rows[1], run.rows[2]
    assert esft.score is not None
    assert esft.gain_share is not None
    for expected in (
        "trained 2.5% of the model’s parameters",
        f"{esft.score.value:.1f}",
        f"{100 * esft.gain_share:.0f}%",
        "changed the loss on general text by +0.075 bits per byte (full fine-tuning: +0.300)",
        "500.0 KB",
        "250.0 K",
        "10.0 M",
        "30.0 s",
        "1.0 GB",
        "chance, 25",
        "top 2 of 5",
        "Jaccard overlap of 0.95",
        "4,096 tokens",
        "until they cover 60%",
        "metier demo greek",
        "revision not set",
        "float32",
        "test.jsonl:2",
        "(empty reply)",
        "Replies that were cut at the length limit: Base model 1, ESFT 1, Full fine-tuning 1.",
    ):
        assert expected in words, expected
    assert full.forgetting is not None
    assert words.count("+0.300") >= 3


def test_nothing_is_fetched_and_nothing_runs(run: ReportData) -> None:
    text = render(run)
    page = Page(text)
    assert "://" not in text
    assert "@import" not in text
    assert "url(" not in text
    names = {name for _, attributes in page.elements for name in attributes}
    assert not names & {"src", "href", "srcset", "action", "data", "xlink:href"}
    assert not [name for name in names if name.startswith("on")]
    assert "script" not in {tag for tag, _ in page.elements}
    policy = [attributes for _, attributes in page.elements if "http-equiv" in attributes]
    assert policy == [
        {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"}
    ]


def test_hostile_text_stays_text_wherever_it_comes_from(run: ReportData) -> None:
    text = render(everywhere(run, HOSTILE))
    page = Page(text)
    plain = Page(render(everywhere(run, "harmless")))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert [sorted(attributes) for _, attributes in page.elements] == [
        sorted(attributes) for _, attributes in plain.elements
    ]
    assert {tag for tag, _ in page.elements} <= ALLOWED_TAGS
    assert "<script" not in text
    assert "<img" not in text
    assert "\x00" not in text
    shown = "".join(page.text)
    assert shown.count("<script>alert('x')</script>") == "".join(plain.text).count("harmless")
    assert shown.count("<script>") > 20


def test_each_missing_part_is_a_sentence() -> None:
    page = Page(render(ReportData(title="Nothing")))
    for sentence in (
        "No comparison was given, so there are no figures to lead with.",
        "No routing profile was given, so there is no heat map.",
        "No training losses were given, so there are no loss curves.",
        "No task was evaluated, so there are no task scores.",
        "General ability was not evaluated, so forgetting is not known.",
        "No comparison was given, so costs are not shown.",
        "No sample replies were kept.",
        "No configuration was given.",
    ):
        assert sentence in page.words
    assert len(page.of_class("missing")) == 8


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"selected": None}, "No selection was given, so no expert is marked."),
        ({"reliability": None}, "Reliability was not measured."),
        ({"metrics": {"esft": [{"step": 1}]}}, "No training losses were given"),
    ],
)
def test_a_part_of_a_part_may_be_missing(
    changed: Callable[..., ReportData], fields: dict[str, Any], sentence: str
) -> None:
    assert sentence in Page(render(changed(**fields))).words


@pytest.mark.parametrize(
    "field",
    [
        field.name
        for field in dataclasses.fields(ReportData)
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    ],
)
def test_any_field_may_be_left_out(run: ReportData, field: str) -> None:
    given = {one.name: getattr(run, one.name) for one in dataclasses.fields(ReportData) if one.name != field}
    if field == "layer_ids":
        del given["scores_LE"]
    Page(render(ReportData(**given)))


def test_a_run_without_a_task_shows_what_it_has(run: ReportData, changed: Callable[..., ReportData]) -> None:
    evaluations = {
        name: dataclasses.replace(one, metrics={}, samples=(), cloze=None, task=None, split=None)
        for name, one in run.evaluations.items()
    }
    rows = [dataclasses.replace(row, score=None, gain=None, gain_share=None, cloze=None) for row in run.rows]
    words = Page(render(changed(evaluations=evaluations, rows=rows))).words
    assert "No task was evaluated" in words
    assert "+0.300" in words


def test_an_unreliable_selection_is_marked(changed: Callable[..., ReportData]) -> None:
    assert len(Page(render(changed(reliability=0.89))).of_class("warning")) == 1
    assert Page(render(changed(reliability=0.9))).of_class("warning") == []
    assert "Under 0.9: profile more text" in render(changed(reliability=0.89))
    assert "The selection is stable" in render(changed(reliability=0.9))


def test_losses_that_are_not_finite_are_counted(changed: Callable[..., ReportData]) -> None:
    rows = [{"step": step, "loss": loss} for step, loss in enumerate([2.0, float("nan"), float("inf"), 1.0])]
    text = render(changed(metrics={"esft": rows}))
    assert "2 logged losses are not finite and are not drawn." in text
    assert "nan" not in " ".join(attributes["points"] or "" for attributes in Page(text).of_class("line"))


def test_unread_replies_are_shown(run: ReportData, changed: Callable[..., ReportData]) -> None:
    base = run.evaluations["base"]
    assert base.score is not None
    scores = {"chrf": dataclasses.replace(base.score, num_unparsed=7)}
    evaluations = {**run.evaluations, "base": dataclasses.replace(base, metrics=scores)}
    assert "(7 unparsed)" in Page(render(changed(evaluations=evaluations))).words


def test_a_reply_equal_to_its_reference_is_ticked(run: ReportData) -> None:
    assert len(Page(render(run)).of_class("exact")) == 2 + 3


def test_the_file_is_utf8_and_its_folder_is_made(run: ReportData, tmp_path: Path) -> None:
    path = write_report(tmp_path / "runs" / "a" / "report.html", run)
    assert path.read_text(encoding="utf-8") == render(run)
    assert path.stat().st_size < 100_000


def test_a_sparse_adapters_rows_are_drawn_and_summed_up(changed: Callable[..., ReportData]) -> None:
    lines = [
        {"step": step, "loss": 1.0, "rows_updated": 100 * step, "key_expert_load_max": 2.0, "row_bytes_from_disk": 3e9}
        for step in (1, 2, 3)
    ]
    page = render(changed(metrics={"meft": lines}))
    assert "Rows" in page
    assert "largest load of a Key-Expert" in page
    cells = page[page.index("mean of a step") :]
    assert "200" in cells
    assert "3.0 GB" in cells or "3.00 GB" in cells
    assert "mean of a step" not in render(changed(metrics={"esft": [{"step": 1, "loss": 1.0}]}))
