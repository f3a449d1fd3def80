"""APIs in replies: sets of what is named, against hand-counted intersections and unions."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.errors import DataError
from metier.evaluation.metrics import score_replies

LISTED = "Weather, OpenSky, forecast, says what comes\n\nWeather, OpenSky, history, says what was"
CALL = "torch.hub.load(repo='intel-isl/MiDaS', model='DPT_Hybrid', pretrained=True)"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (LISTED, 100),
        ("weather,opensky , History\n \nWEATHER, OpenSky, forecast, another description", 100),
        ("API MAIN INFO: Weather, OpenSky, forecast", 50),
        ("Weather, OpenSky, forecast\n\nWeather, OpenSky, radar", 100 / 3),
        ("Weather, OpenSky, forecast\n\nWeather, OpenSky, forecast", 50),
        ("Weather OpenSky forecast", 0),
        ("Weather, OpenSky", 0),
    ],
)
def test_apis_are_their_first_three_fields(reply: str, expected: float) -> None:
    score = score_replies("api_iou", [reply], [LISTED])
    assert score.value == pytest.approx(expected)
    assert score.num_unparsed == 0


def test_an_empty_list_is_counted_and_an_empty_reference_refused() -> None:
    assert score_replies("api_iou", [" \n\n "], [LISTED]).num_unparsed == 1
    with pytest.raises(DataError, match="test item 0: the reference lists no API: got ' '"):
        score_replies("api_iou", ["a, b, c"], [" "])


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (CALL, 100),
        (f"model = {CALL}", 100),
        (f"Here it is:\n```python\nimport torch\nmodel = {CALL}\n```\nEnjoy.", 100),
        (
            '{"name": "torch.hub.load", "arguments": {"repo": "intel-isl/MiDaS", "model": "DPT_Hybrid", "pretrained": true}}',
            100,
        ),
        # the name and two of three arguments; four elements here and four there, three in common
        ("torch.hub.load(repo='intel-isl/MiDaS', model='DPT_Large', pretrained=True)", 100 * 3 / 5),
        ("torch.hub.load(repo='intel-isl/MiDaS', pretrained=1)", 100 * 2 / 5),
        # by position is not by keyword
        ("torch.hub.load('intel-isl/MiDaS', 'DPT_Hybrid', pretrained=True)", 100 * 2 / 6),
        ("torch.hub.load()", 25),
        # another function has nothing in common, whatever its arguments
        ("hub.load(repo='intel-isl/MiDaS', model='DPT_Hybrid', pretrained=True)", 0),
        (f"[{CALL}, other()]", 80),
    ],
)
def test_calls_are_their_names_and_arguments(reply: str, expected: float) -> None:
    score = score_replies("call_iou", [reply], [CALL])
    assert score.value == pytest.approx(expected)
    assert score.num_unparsed == 0


@pytest.mark.parametrize(
    "reply",
    [
        '{"name": "f", "arguments": {"a": 1, "b": ["x"]}}',
        '[{"name": "f", "parameters": {"b": ["x"], "a": 1.0}}]',
        '{"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1, \\"b\\": [\\"x\\"]}"}}]}',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": ["x"]}}\n</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": 1, "b": ["x"]}}',
        '```json\n{"name": "f", "arguments": {"a": 1, "b": ["x"]}}\n```',
        "f(b=('x',), a=1)",
    ],
)
def test_one_call_in_every_form(reply: str) -> None:
    assert score_replies("call_iou", [reply], ["f(a=1, b=['x'])"]).value == 100


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I cannot help with that.",
        "f",
        "f(1",
        '{"name": "f", "arguments": [1]}',
        '{"arguments": {"a": 1}}',
        "3",
        "null",
        "[1, 2]",
        "while True: pass",
        "f(a=1)\0",
        "[" * 100_000,
        "-" * 100_000 + "1",
        '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><tool_call>f(</tool_call>',
    ],
)
def test_what_is_no_call_scores_0_and_is_counted(reply: str) -> None:
    score = score_replies("call_iou", [reply, "f(a=1)"], ["f(a=1)", "f(a=1)"])
    assert score.item_scores == (0.0, 100.0)
    assert score.num_unparsed == 1


def test_true_is_not_1_and_an_expression_is_its_code() -> None:
    assert score_replies("call_iou", ["f(a=True)"], ["f(a=1)"]).value == pytest.approx(100 / 3)
    assert score_replies("call_iou", ["f(a = x+1, **more)"], ["f(a=x + 1, **more)"]).value == 100


def test_a_reference_that_is_no_call_is_the_tasks_fault() -> None:
    with pytest.raises(DataError, match="test item 1: the reference is no call: got 'nothing here'"):
        score_replies("call_iou", ["f()", "f()"], ["f()", "nothing here"])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.sampled_from("abcd"), VALUES, max_size=4)


@given(first=ARGUMENTS, second=ARGUMENTS)
def test_calls_in_json_and_code_score_alike_within_0_and_100_and_the_same_both_ways(first: dict, second: dict) -> None:
    def in_json(arguments: dict) -> str:
        return json.dumps({"name": "f", "arguments": arguments})

    def in_code(arguments: dict) -> str:
        return f"f({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"

    score = score_replies("call_iou", [in_json(first)], [in_json(second)], num_resamples=2)
    assert 0 < score.value <= 100
    assert (score.value == 100) == (json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True))
    assert score.value == score_replies("call_iou", [in_code(second)], [in_code(first)], num_resamples=2).value


@given(st.text(max_size=60))
def test_no_reply_is_an_error(reply: str) -> None:
    for metric in ("api_iou", "call_iou"):
        assert 0 <= score_replies(metric, [reply], ["f(a)"], num_resamples=2).value <= 100
