"""The page in a headless browser: choosing, asking, answers side by side, stopping, errors, the key."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from html_page import HOSTILE
from serving.page.actions import ask, column, until
from serving.page.conftest import OpenPage
from serving.page.stub_server import ANSWER, BASE, WORDS, StubServer

FIRST_WORDS = " ".join(WORDS[:3])


def test_base_state_and_deltas_are_shown(open_page: OpenPage, server: StubServer) -> None:
    page = open_page()
    expect(page.get_by_role("heading", level=1)).to_have_text(BASE)
    expect(page.locator("#num-deltas")).to_have_text("2 deltas")
    expect(page.locator("#health")).to_have_text("ready")
    assert page.locator("#models .name").all_inner_texts() == [BASE, "law", "code"]


def test_a_server_that_is_not_ready_is_shown(open_page: OpenPage, server: StubServer, complaints: list[str]) -> None:
    server.health = (503, {"status": "closing", "reason": "told to stop"})
    page = open_page()
    expect(page.locator("#health")).to_have_text("not ready: told to stop")
    assert "503" in complaints.pop()


def test_a_server_that_comes_back_is_seen(open_page: OpenPage, complaints: list[str]) -> None:
    page = open_page(waits=False, offline_paths=["health", "v1/models"])
    expect(page.locator("#health")).to_have_text("not reachable")
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached.")
    assert all("ERR_FAILED" in complaint for complaint in complaints)
    complaints.clear()
    page.unroute_all()
    page.clock.run_for(5000)
    expect(page.get_by_label("law")).to_be_visible()
    expect(page.locator("#health")).to_have_text("ready")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_answers_stream_at_the_same_time(open_page: OpenPage, server: StubServer) -> None:
    server.release.clear()
    page = open_page()
    ask(page)
    for model in (BASE, "law", "code"):
        expect(column(page, model).locator(".answer")).to_have_text(FIRST_WORDS)
        expect(column(page, model).locator(".state")).to_have_text("answering")
    assert server.running == {BASE, "law", "code"}
    expect(page.locator("#progress")).to_have_text("0 of 3 answers done")
    server.release.set()
    expect(column(page, "law").locator(".answer")).to_have_text(ANSWER)
    expect(column(page, "law").locator(".state")).to_have_text("finished")
    expect(page.locator("#progress")).to_have_text("3 of 3 answers done")


def test_columns_stand_side_by_side_and_wrap_on_narrow_screens(open_page: OpenPage) -> None:
    page = open_page()
    ask(page)
    expect(page.locator("#progress")).to_have_text("3 of 3 answers done")
    tops = "columns => columns.map(column => column.getBoundingClientRect().top)"
    assert len(set(page.eval_on_selector_all(".column", tops))) == 1
    page.set_viewport_size({"width": 390, "height": 800})
    assert len(set(page.eval_on_selector_all(".column", tops))) == 3
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_speed_first_token_and_tokens_are_shown(open_page: OpenPage, server: StubServer) -> None:
    server.word_seconds = 0.04
    page = open_page("#m=law")
    server.release.clear()
    ask(page)
    law = column(page, "law")
    expect(law.locator(".answer")).to_have_text(FIRST_WORDS)
    assert not law.locator(".rate").inner_text().startswith("–"), "no speed while the answer streams"
    server.release.set()
    expect(law.locator(".prompt-tokens")).to_have_text("11")
    expect(law.locator(".tokens")).to_have_text("9")
    # at 40 ms a word it is 25 a second, less what the machine is late
    assert 1 < float(law.locator(".rate").inner_text()) < 40
    assert law.locator(".first").inner_text().endswith((" ms", " s"))


def test_where_all_came_at_once_the_speed_is_the_servers(open_page: OpenPage, server: StubServer) -> None:
    server.word_seconds = 0
    page = open_page("#m=law")
    ask(page)
    expect(column(page, "law").locator(".rate")).to_have_text("321")


def test_an_answer_cut_off_at_max_tokens_says_so(open_page: OpenPage, server: StubServer) -> None:
    server.deltas = ["long"]
    page = open_page()
    ask(page)
    expect(column(page, "long").locator(".state")).to_have_text("cut off at max tokens")


def test_thirty_two_columns_stream_at_once(open_page: OpenPage, server: StubServer) -> None:
    server.deltas = [f"delta-{index}" for index in range(31)]
    server.release.clear()
    page = open_page()
    page.get_by_role("button", name="all shown").click()
    ask(page)
    expect(page.locator(".answer", has_text=FIRST_WORDS)).to_have_count(32)
    assert len(server.running) == 32
    server.release.set()
    expect(page.locator("#progress")).to_have_text("32 of 32 answers done")
    expect(page.locator("svg.cells")).to_have_count(32)


def test_pieces_are_drawn_once_a_frame(open_page: OpenPage, server: StubServer) -> None:
    server.word_seconds = 0
    page = open_page("#m=law")
    page.evaluate("""() => {
        window.draws = 0;
        new MutationObserver(() => window.draws += 1)
            .observe(document.getElementById("columns"), {subtree: true, characterData: true});
        window.requestAnimationFrame = (draw) => setTimeout(draw, 300);
    }""")
    ask(page)
    expect(column(page, "law").locator(".answer")).to_have_text(ANSWER)
    assert page.evaluate("window.draws") == 1


def test_stop_ends_one_answer_on_the_server(open_page: OpenPage, server: StubServer) -> None:
    server.deltas = ["endless", "law"]
    page = open_page()
    ask(page)
    expect(column(page, "endless").locator(".answer")).to_contain_text("on on")
    column(page, "endless").get_by_role("button", name="Stop").click()
    expect(column(page, "endless").locator(".state")).to_have_text("stopped")
    until(lambda: server.left == {"endless"})
    expect(column(page, "law").locator(".state")).to_have_text("finished")
    expect(column(page, "endless").get_by_role("button", name="Stop")).to_be_disabled()


def test_stop_all_ends_all_answers_on_the_server(open_page: OpenPage, server: StubServer) -> None:
    server.release.clear()
    page = open_page()
    ask(page)
    until(lambda: len(server.running) == 3)
    page.get_by_role("button", name="Stop all").click()
    until(lambda: server.left == {BASE, "law", "code"})
    expect(page.locator(".state", has_text="stopped")).to_have_count(3)
    expect(page.get_by_role("button", name="Stop all")).to_be_disabled()


def test_asking_again_stops_what_still_runs(open_page: OpenPage, server: StubServer) -> None:
    server.deltas = ["endless"]
    page = open_page("#m=endless")
    ask(page)
    expect(column(page, "endless").locator(".answer")).to_contain_text("on on")
    ask(page, "And now?")
    until(lambda: server.left == {"endless"} and len(server.bodies) == 2)
    expect(page.locator(".column")).to_have_count(1)


def test_a_failing_model_says_why_and_stops_no_other(open_page: OpenPage, server: StubServer) -> None:
    reasons = {
        "breaks": "The server broke off.\nthe engine has died",
        "missing": "The server does not know this model.\nno delta 'missing' is served",
        "crashes": "The server failed. (HTTP status 500)",
        "ends-early": "The answer broke off before its end.",
        "garbled": "The server sent what this page cannot read.",
    }
    server.deltas = [*reasons, "law"]
    page = open_page()
    page.get_by_role("button", name="all shown").click()
    ask(page)
    for model, reason in reasons.items():
        expect(column(page, model).locator(".error")).to_have_text(reason)
        expect(column(page, model).locator(".state")).to_have_text("failed")
    expect(column(page, "law").locator(".answer")).to_have_text(ANSWER)
    expect(column(page, "law").locator(".error")).to_be_hidden()
    expect(page.locator("#progress")).to_have_text("7 of 7 answers done, 5 failed")


def test_a_broken_connection_is_said_in_every_column(
    open_page: OpenPage, server: StubServer, complaints: list[str]
) -> None:
    page = open_page()
    page.route("**/page/ask", lambda route: route.abort())
    ask(page)
    expect(page.locator(".column .error", has_text="The connection to the server broke.")).to_have_count(3)
    assert "ERR_FAILED" in complaints.pop()


def test_what_a_model_writes_is_text_and_never_runs(open_page: OpenPage, server: StubServer) -> None:
    server.deltas = ["hostile"]
    page = open_page()
    page.on("dialog", lambda dialog: pytest.fail(f"a script of the answer ran: {dialog.message}"))
    ask(page)
    answer = column(page, "hostile").locator(".answer")
    expect(column(page, "hostile").locator(".state")).to_have_text("finished")
    assert answer.evaluate("pre => pre.textContent") == HOSTILE
    assert answer.locator("script, img, b").count() == 0


def test_the_policy_stops_an_inline_script(open_page: OpenPage, complaints: list[str]) -> None:
    page = open_page()
    assert complaints == [], "the page itself keeps to the policy"
    page.evaluate("document.head.append(Object.assign(document.createElement('script'), {text: 'window.ran = true'}))")
    assert page.evaluate("window.ran") is None
    assert all("Content Security Policy" in complaint for complaint in complaints)
    complaints.clear()


def test_where_an_answer_differs_from_the_base_is_marked(open_page: OpenPage, server: StubServer) -> None:
    server.deltas = ["law", "code", "brief"]
    page = open_page()
    page.get_by_role("button", name="all shown").click()
    ask(page)
    expect(column(page, "law").locator(".difference")).to_have_text("same as the base")
    expect(column(page, "code").locator(".difference")).to_have_text("differs from the base at word 5")
    expect(column(page, "code").locator("mark")).to_have_text("sleeps")
    expect(column(page, "code").locator(".answer")).to_have_text("The quick brown fox sleeps")
    expect(column(page, "brief").locator(".difference")).to_have_text("the base goes on")


def test_control_enter_asks(open_page: OpenPage, server: StubServer) -> None:
    page = open_page("#m=law")
    page.locator("#prompt").fill("By the keys")
    page.locator("#prompt").press("Control+Enter")
    expect(column(page, "law").locator(".answer")).to_have_text(ANSWER)
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "By the keys"}]


def test_a_chat_carries_all_settings(open_page: OpenPage, server: StubServer) -> None:
    page = open_page("#m=law")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Max tokens").fill("33")
    page.get_by_label("Seed").fill("5")
    ask(page, "Who?")
    until(lambda: len(server.bodies) == 1)
    assert server.bodies[0] == {
        "path": "/v1/chat/completions",
        "model": "law",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}],
        "temperature": 0.7,
        "max_tokens": 33,
        "seed": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "metier": {"experts": True},
    }


def test_a_plain_completion_carries_the_prompt_as_it_is(open_page: OpenPage, server: StubServer) -> None:
    page = open_page("#m=law")
    page.get_by_label("plain completion").check()
    expect(page.get_by_label("System prompt")).to_be_hidden()
    ask(page, "Package: ")
    expect(column(page, "law").locator(".answer")).to_have_text(ANSWER)
    body = server.bodies[0]
    assert (body["path"], body["prompt"], "messages" in body) == ("/v1/completions", "Package: ", False)


def test_the_key_is_asked_for_only_where_the_server_wants_one(
    open_page: OpenPage, server: StubServer, complaints: list[str]
) -> None:
    server.key = "s3cret"
    page = open_page(waits=False)
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    field.fill("s3cret")
    field.press("Enter")
    expect(field).to_be_hidden()
    ask(page)
    expect(column(page, "law").locator(".answer")).to_have_text(ANSWER)
    assert page.evaluate("Object.values(localStorage).join() + document.cookie + location").count("s3cret") == 0
    page.reload()
    page.wait_for_selector("#models label")
    assert all("401" in complaint for complaint in complaints)
    complaints.clear()


def test_a_key_that_has_changed_is_asked_for_again(open_page: OpenPage, server: StubServer) -> None:
    page = open_page("#m=law")
    expect(page.get_by_label("API key")).to_be_hidden()
    server.key = "new"
    ask(page)
    expect(column(page, "law").locator(".error")).to_contain_text("enter it above")
    page.get_by_label("API key").fill("new")
    page.get_by_role("button", name="Use").click()
    expect(page.get_by_label("API key")).to_be_hidden()
    ask(page)
    expect(column(page, "law").locator(".answer")).to_have_text(ANSWER)


def test_copy_takes_the_answer(open_page: OpenPage) -> None:
    page = open_page("#m=law", permissions=["clipboard-read", "clipboard-write"])
    ask(page)
    expect(column(page, "law").locator(".state")).to_have_text("finished")
    column(page, "law").get_by_role("button", name="Copy").click()
    expect(column(page, "law").get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == ANSWER
