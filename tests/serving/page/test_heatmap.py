"""The small heat map of an answer's expert use: cells, shades, the delta's own, words and numbers."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser, Page, expect

from serving.page.actions import ask, column
from serving.page.conftest import OpenPage
from serving.page.stub_server import BASE, COUNTS, LAYERS, NUM_EXPERTS, REPLACED, StubServer

OWN = {(row, expert) for row, experts in enumerate(REPLACED) for expert in experts}


@pytest.fixture(scope="module")
def answered(browser: Browser, running_server: StubServer) -> Page:
    """One answer of the base and one of a delta, looked at by several tests."""
    page = browser.new_page()
    page.goto(f"{running_server.url}#m=tiny-base&m=law")
    page.wait_for_selector("#models label")
    ask(page)
    expect(page.locator("svg.cells")).to_have_count(2)
    return page


def squares(page: Page, model: str, path: str) -> list[tuple[int, int]]:
    """Row and expert of each square that a path of the map draws."""
    drawn = column(page, model).locator(f"svg.cells path.{path}").get_attribute("d") or ""
    assert drawn.replace("h1v1h-1z", "").count("M") == drawn.count("h1v1h-1z")
    starts = [part.removesuffix("h1v1h-1z").split() for part in drawn.split("M")[1:]]
    return [(int(row), int(expert)) for expert, row in starts]


def test_every_layer_and_expert_has_one_cell(answered: Page) -> None:
    cells = [cell for shade in range(9) for cell in squares(answered, "law", f"shade-{shade}")]
    assert sorted(cells) == [(row, expert) for row in range(len(LAYERS)) for expert in range(NUM_EXPERTS)]


def test_more_use_is_a_darker_cell(answered: Page) -> None:
    shade_of = {cell: shade for shade in range(9) for cell in squares(answered, "law", f"shade-{shade}")}
    for row, counts in enumerate(COUNTS):
        shades = [shade_of[row, expert] for expert in sorted(range(NUM_EXPERTS), key=counts.__getitem__)]
        assert shades == sorted(shades)
    assert shade_of[0, COUNTS[0].index(0)] == 0
    # 2.3 times an even share is in the shade from 2 to 3, and 1.8 times in that from 1.5 to 2
    assert shade_of[0, COUNTS[0].index(12)] == 5
    assert shade_of[2, COUNTS[2].index(12 - 2)] == 4


def test_the_deltas_own_experts_are_outlined(answered: Page) -> None:
    assert set(squares(answered, "law", "own")) == OWN
    assert squares(answered, BASE, "own") == []


def test_the_pointer_reads_a_cell(answered: Page) -> None:
    law = column(answered, "law")
    cells = law.locator("svg.cells")
    width, height = cells.evaluate("svg => [svg.clientWidth, svg.clientHeight]")
    cells.hover(position={"x": width * 3.5 / NUM_EXPERTS, "y": height * 0.5 / len(LAYERS)})
    words = "layer 1, expert 3, the delta’s own: 14% (6 of 44 uses)"
    expect(law.locator(".readout")).to_have_text(words)
    expect(law.locator("svg title")).to_have_text(words)
    answered.mouse.move(0, 0)
    expect(law.locator(".readout")).to_contain_text("The delta’s own 3 experts took")


def test_arrow_keys_read_cells(answered: Page) -> None:
    law = column(answered, "law")
    law.locator("svg.cells").focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowDown", "ArrowDown"):
        answered.keyboard.press(key)
    expect(law.locator(".readout")).to_contain_text("layer 5, expert 1:")


def test_the_map_is_told_in_words(answered: Page) -> None:
    used = sum(COUNTS[row][expert] for row, expert in OWN) / sum(map(sum, COUNTS))
    law = column(answered, "law").get_by_role("img")
    expect(law).to_have_accessible_name(
        f"Expert use, 3 layers by 8 experts. The delta’s own 3 experts took {100 * used:.0f}% of all uses. "
        "Arrow keys read single cells; the table below has all."
    )
    expect(column(answered, BASE).locator(".readout")).to_contain_text("Used most: layer")


def test_a_table_has_every_number(answered: Page) -> None:
    law = column(answered, "law")
    law.get_by_text("Numbers").click()
    rows = law.get_by_role("row")
    expect(rows).to_have_count(1 + len(LAYERS))
    assert rows.nth(0).inner_text().split() == ["layer", *map(str, range(NUM_EXPERTS))]
    for row, (layer, counts) in enumerate(zip(LAYERS, COUNTS, strict=True)):
        expect(rows.nth(1 + row).get_by_role("rowheader")).to_have_text(str(layer))
        expect(rows.nth(1 + row).get_by_role("cell")).to_have_text(
            [f"• {count}" if (row, expert) in OWN else str(count) for expert, count in enumerate(counts)]
        )


def test_a_legend_comes_with_the_first_map(open_page: OpenPage) -> None:
    page = open_page()
    expect(page.locator("#legend")).to_be_hidden()
    ask(page)
    expect(page.locator("#legend")).to_be_visible()
    expect(page.locator("#legend .ramp i")).to_have_text(["none", "0.5×", "1×", "1.5×", "2×", "3×", "4×", "6×", "more"])


def test_a_model_without_expert_layers_has_no_map(open_page: OpenPage, server: StubServer) -> None:
    server.deltas = ["no-experts"]
    page = open_page()
    ask(page)
    expect(page.locator("svg.cells")).to_have_count(1)
    assert column(page, "no-experts").locator(".experts").inner_text() == ""


def test_a_map_that_cannot_be_drawn_spoils_no_other(
    open_page: OpenPage, server: StubServer, complaints: list[str]
) -> None:
    server.deltas = ["odd-experts", "law"]
    page = open_page()
    ask(page)
    expect(column(page, "law").locator("svg.cells")).to_be_visible()
    expect(column(page, "odd-experts").locator(".state")).to_have_text("finished")
    assert complaints != []
    complaints.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_shades_go_one_way_in_lightness(open_page: OpenPage, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    colours = page.eval_on_selector_all(
        "#legend .ramp i", "steps => steps.map(step => getComputedStyle(step, '::before').backgroundColor)"
    )
    lightness = [sum(map(int, colour[4:-1].split(","))) for colour in colours]
    assert len(set(lightness)) == 9
    assert lightness == sorted(lightness, reverse=scheme == "light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(open_page: OpenPage, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    for ink in ("ink", "soft", "accent", "bad"):
        for ground in ("paper", "ground"):
            assert page.evaluate(CONTRAST, [f"--{ink}", f"--{ground}"]) >= 4.5, (ink, ground)
    assert page.evaluate(CONTRAST, ["--on-accent", "--accent"]) >= 4.5


# WCAG 2: relative luminance of sRGB colours
CONTRAST = """([one, other]) => {
    const luminance = (name) => {
        const colour = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
        const channels = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16) / 255);
        const linear = channels.map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    };
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
}"""
