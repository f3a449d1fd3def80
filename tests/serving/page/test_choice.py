"""Which models are asked: the list, its search, the keys, and what is remembered."""

from __future__ import annotations

from playwright.sync_api import expect

from serving.page.actions import ask, chosen
from serving.page.conftest import OpenPage
from serving.page.stub_server import BASE, StubServer

MANY = [f"law-{index}" for index in range(100)] + [f"code-{index}" for index in range(100)]


def test_nothing_is_asked_without_a_model(open_page: OpenPage, server: StubServer) -> None:
    page = open_page()
    page.get_by_role("button", name="none").click()
    ask(page)
    expect(page.locator("#progress")).to_have_text("Choose at least one model.")
    assert server.bodies == []


def test_the_choice_is_remembered_in_the_browser(open_page: OpenPage, server: StubServer) -> None:
    page = open_page()
    assert chosen(page) == [BASE, "law", "code"], "at first the base and the first two deltas"
    page.get_by_label("law").uncheck()
    again = page.context.new_page()
    again.goto(server.url)
    again.wait_for_selector("#models label")
    assert chosen(again) == [BASE, "code"]


def test_the_address_carries_the_choice_and_goes_before_the_browsers(open_page: OpenPage, server: StubServer) -> None:
    page = open_page()
    page.get_by_label("law").uncheck()
    assert page.url == f"{server.url}#m=tiny-base&m=code"
    other = page.context.new_page()
    other.goto(f"{server.url}#m=law")
    other.wait_for_selector("#models label")
    assert chosen(other) == ["law"]
    other.goto(f"{server.url}#m=code")
    assert chosen(other) == ["code"], "an address that changes on the open page counts too"


def test_a_delta_that_is_away_for_a_while_stays_chosen(open_page: OpenPage, server: StubServer) -> None:
    page = open_page("#m=law&m=code")
    looks_again = "document.dispatchEvent(new Event('visibilitychange'))"
    server.deltas = ["law"]
    page.evaluate(looks_again)
    expect(page.locator("#num-chosen")).to_have_text("1 of 2 chosen")
    server.deltas = ["law", "code"]
    page.evaluate(looks_again)
    expect(page.locator("#num-chosen")).to_have_text("2 of 3 chosen")


def test_a_list_that_is_the_same_keeps_the_focus(open_page: OpenPage) -> None:
    page = open_page()
    page.get_by_label("law").focus()
    with page.expect_response("**/v1/models"):
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    expect(page.get_by_label("law")).to_be_focused()


def test_few_models_have_no_search_field(open_page: OpenPage) -> None:
    expect(open_page().get_by_role("searchbox")).to_be_hidden()


def test_the_search_narrows_two_hundred_deltas(open_page: OpenPage, server: StubServer) -> None:
    server.deltas = MANY
    page = open_page("#m=law-7")
    page.get_by_role("searchbox").fill("CODE-1")
    shown = page.locator(".model:visible .name")
    expect(shown).to_have_text([name for name in MANY if name.startswith("code-1")])
    page.get_by_role("button", name="all shown").click()
    expect(page.locator("#num-chosen")).to_have_text("12 of 201 chosen")
    page.get_by_role("button", name="none").click()
    expect(page.locator("#num-chosen")).to_have_text("0 of 201 chosen")


def test_the_list_is_worked_by_keys_alone(open_page: OpenPage, server: StubServer) -> None:
    server.deltas = MANY
    page = open_page("#m=law-7")
    search = page.get_by_role("searchbox")
    search.fill("code-42")
    search.press("Enter")
    assert chosen(page) == ["law-7", "code-42"]
    search.fill("")
    search.press("ArrowDown")
    for key in ("ArrowDown", "ArrowDown", "ArrowUp", " ", "End", " "):
        page.keyboard.press(key)
    assert chosen(page) == ["law-0", "law-7", "code-42", "code-99"]
    page.keyboard.press("Home")
    page.keyboard.press("ArrowUp")
    expect(search).to_be_focused()
    assert server.bodies == [], "Enter in the search chooses, and does not ask"


def test_many_models_do_not_stretch_the_page(open_page: OpenPage, server: StubServer) -> None:
    height = "document.getElementById('choice').getBoundingClientRect().height"
    few = open_page().evaluate(height)
    server.deltas = MANY
    assert open_page().evaluate(height) < few + 60
