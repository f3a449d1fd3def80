"""Text is escaped unless this room made it."""

from __future__ import annotations

import pytest

from metier.reports.markup import Markup, join, tag, text


def test_children_are_escaped_once() -> None:
    inner = tag("b", "<&>\"'")
    assert inner == "<b>&lt;&amp;&gt;&quot;&#x27;</b>"
    assert tag("p", inner, "<", None) == "<p><b>&lt;&amp;&gt;&quot;&#x27;</b>&lt;</p>"
    assert text(inner) is inner


def test_attributes_are_escaped_and_named_as_in_html() -> None:
    assert tag("i", class_="a", aria_label='">') == '<i class="a" aria-label="&quot;&gt;"></i>'
    assert tag("i", hidden=True, title=None, open=False, x1=0) == '<i hidden x1="0"></i>'


def test_empty_elements_close_themselves() -> None:
    assert tag("meta", name="a") == '<meta name="a">'
    assert tag("line", x1=1) == '<line x1="1"/>'
    with pytest.raises(AssertionError, match="<line> has no content"):
        tag("line", "a")


def test_joined_text_is_escaped_and_a_sum_is_text_again() -> None:
    assert join(["<", Markup("<i>"), None]) == "&lt;<i>"
    assert not isinstance(Markup("<i>") + "<", Markup)


def test_control_characters_are_shown_and_line_breaks_stay() -> None:
    assert text("a\x00\x1b\x7f\n\tb") == "a\ufffd\ufffd\ufffd\n\tb"
