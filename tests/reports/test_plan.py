"""A plan's chart: a bar a method, as long as its bytes, in a picture and in a page that fetches nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from html_page import ALLOWED_TAGS, HOSTILE, Page
from metier.cli import app
from metier.config import RunConfig
from metier.errors import ConfigError
from metier.planning.plan import Plan, plan
from metier.planning.spelling import size
from metier.reports.plan import COLORS, save_chart
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_model("deepseek_v2").config.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def made(folder: Path) -> Plan:
    config = RunConfig(model=str(folder), dataset="-", output_dir="-", select_top_k=2, max_length=64, dtype="float32")
    return plan(config, methods=("esft", "full"), device_memory="4MiB", host_memory="1GiB")


def test_a_page_has_a_bar_a_method_whose_parts_are_as_long_as_their_bytes(made: Plan, tmp_path: Path) -> None:
    save_chart(made, tmp_path / "sub" / "plan.html")
    page = Page((tmp_path / "sub" / "plan.html").read_text(encoding="utf-8"))
    assert {name for name, _ in page.elements} <= ALLOWED_TAGS | {"rect"}
    widths: dict[str, list[float]] = {}
    for name, attributes in page.elements:
        if name == "rect":
            widths.setdefault(str(attributes["y"]), []).append(float(str(attributes["width"])))
    totals = [row.estimate.total_device_bytes + row.estimate.host_bytes for row in made.rows if row.estimate]
    assert len(widths) == len(made.rows) == 2
    lengths = [sum(parts) for parts in widths.values()]
    assert lengths[0] / lengths[1] == pytest.approx(totals[0] / totals[1], rel=0.01)
    for total in totals:
        assert size(total) in page.words
    for kind in ("frozen weights", "activations", "optimizer state"):
        assert kind in page.words
    assert "4 MiB of device" in page.words
    assert "Assumed" in page.words


def test_every_kind_has_a_color_of_its_own() -> None:
    assert len(set(COLORS.values())) == len(COLORS)


def test_a_picture_is_a_png(made: Plan, tmp_path: Path) -> None:
    save_chart(made, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "plan.png").stat().st_size > 5000


def test_a_models_name_stays_text(made: Plan, tmp_path: Path) -> None:
    row = made.rows[0]
    hostile = dataclasses.replace(row, config=dataclasses.replace(row.config, model=HOSTILE), why_not=HOSTILE)
    save_chart(dataclasses.replace(made, rows=(hostile,)), tmp_path / "plan.html")
    page = Page((tmp_path / "plan.html").read_text(encoding="utf-8"))
    assert "script" not in {name for name, _ in page.elements}


def test_a_run_whose_activations_are_not_known_says_so(made: Plan, tmp_path: Path) -> None:
    row = made.rows[0]
    assert row.estimate is not None
    untraced = dataclasses.replace(row, estimate=dataclasses.replace(row.estimate, trace=None), why_not="three stacks")
    save_chart(dataclasses.replace(made, rows=(untraced,)), tmp_path / "plan.html")
    page = Page((tmp_path / "plan.html").read_text(encoding="utf-8"))
    assert "esft, no activations" in page.words
    assert "esft: three stacks" in page.words


def test_another_ending_is_refused_before_anything_is_planned(folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", "--model", str(folder), "--chart", str(tmp_path / "plan.pdf")])
    assert done.exit_code != 0
    assert "expected a file that ends in .png or .html" in str(done.output) + str(done.exception)


def test_a_plan_without_bytes_has_no_chart(made: Plan, tmp_path: Path) -> None:
    row = dataclasses.replace(made.rows[0], estimate=None, why_not="no such layers")
    with pytest.raises(ConfigError, match="no such layers"):
        save_chart(dataclasses.replace(made, rows=(row,)), tmp_path / "plan.png")


def test_the_verb_draws_it(folder: Path, tmp_path: Path) -> None:
    command = ["plan", "--model", str(folder), "--method", "lora", "--max_length", "32", "--device-memory", "1GiB"]
    done = CliRunner().invoke(app, [*command, "--chart", str(tmp_path / "plan.html")])
    assert done.exit_code == 0, done.output
    assert "<svg" in (tmp_path / "plan.html").read_text(encoding="utf-8")
