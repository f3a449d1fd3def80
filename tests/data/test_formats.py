"""Each format becomes the same messages; a record that cannot be one is refused with its place."""

from __future__ import annotations

import re
from typing import Any

import pytest

from metier.data.formats import parse_record
from metier.errors import DataError

WEATHER = {"type": "function", "function": {"name": "weather"}}


def said(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in parse_record(row, "a.jsonl:7").messages]


def test_messages_keep_roles_extras_and_tools() -> None:
    call = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Is it "}, {"type": "text", "text": "warm?"}],
            },
            {"role": "assistant", "content": None, "tool_calls": call},
            {"role": "tool", "content": "21", "tool_call_id": "x", "name": None},
            {"role": "assistant", "content": "Yes."},
        ],
        "tools": [WEATHER],
    }
    record = parse_record(row, "a.jsonl:7")
    assert [message.to_dict() for message in record.messages] == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Is it warm?"},
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": "21", "tool_call_id": "x"},
        {"role": "assistant", "content": "Yes."},
    ]
    assert record.tools == (WEATHER,)
    assert record.origin == "a.jsonl:7"
    assert not record.is_plain


def test_prompt_and_completion_become_user_and_assistant() -> None:
    record = parse_record({"prompt": "2+2=", "completion": "4", "id": 3}, "a:1")
    assert [(m.role, m.content) for m in record.messages] == [("user", "2+2="), ("assistant", "4")]
    assert record.is_plain


@pytest.mark.parametrize("given", [{}, {"input": ""}, {"input": None}])
def test_alpaca_without_input_is_the_instruction(given: dict[str, Any]) -> None:
    row = {"instruction": "Sing.", "output": "La.", "text": "ignored: the whole prompt, formatted", **given}
    assert said(row) == [("user", "Sing."), ("assistant", "La.")]


def test_alpaca_joins_input_and_keeps_system_and_history() -> None:
    row = {
        "instruction": "Translate.",
        "input": "hej",
        "output": "hi",
        "system": "Be brief.",
        "history": [["Hello", "Hi"]],
    }
    assert said(row) == [
        ("system", "Be brief."),
        ("user", "Hello"),
        ("assistant", "Hi"),
        ("user", "Translate.\n\nhej"),
        ("assistant", "hi"),
    ]


def test_sharegpt_roles_are_translated() -> None:
    turns = [("system", "s"), ("human", "h"), ("function_call", "{}"), ("observation", "o"), ("gpt", "g")]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": '[{"name": "f"}]'}
    roles = ["system", "user", "assistant", "tool", "assistant"]
    assert said(row) == list(zip(roles, ["s", "h", "{}", "o", "g"], strict=True))
    assert parse_record(row, "a:1").tools == ({"name": "f"},)


def test_sharegpt_system_prompt_beside_the_turns_is_kept() -> None:
    row = {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}], "system": "s"}
    assert said(row)[0] == ("system", "s")


def test_messages_under_conversations_are_read() -> None:
    row = {"conversations": [{"role": "user", "content": "h"}, {"role": "assistant", "content": "g"}]}
    assert said(row) == [("user", "h"), ("assistant", "g")]


def test_messages_may_be_json_text_as_in_csv() -> None:
    assert said({"messages": '[{"role": "user", "content": "h"}]'}) == [("user", "h")]


def test_text_is_a_record_without_messages() -> None:
    record = parse_record({"text": "All of it."}, "a:1")
    assert (record.messages, record.text) == ((), "All of it.")


def user(**message: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "h"}, message]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            user(content="x"),
            "a.jsonl:7: messages[1]: no 'role'. Add one of system, developer, user, assistant, tool; it has content.",
        ),
        (
            user(role="asistant", content="x"),
            "a.jsonl:7: messages[1]: unknown role 'asistant', expected one of system, developer, user, assistant, tool. Did you mean 'assistant'?",
        ),
        (
            user(role="assistant", content=" \n"),
            "a.jsonl:7: messages[1]: the assistant's 'content' is empty: there is nothing to train on.",
        ),
        (user(role="assistant"), "a.jsonl:7: messages[1]: the assistant's 'content' is empty"),
        (
            user(role="user", content=[{"type": "image"}]),
            "a.jsonl:7: messages[1]: 'content' must be a text or a list of text parts, got [{'type': 'image'}].",
        ),
        (
            {"messages": ["hello"]},
            "a.jsonl:7: messages[0]: expected an object with 'role' and 'content', got 'hello'.",
        ),
        ({"messages": []}, "a.jsonl:7: a record without a message."),
        ({"messages": "[oops"}, "a.jsonl:7: 'messages' is not JSON: Expecting value at column 2."),
        ({"messages": 3}, "a.jsonl:7: 'messages' must be a list, got int."),
        (
            {"prompt": "2+2=", "completion": ""},
            "a.jsonl:7: 'completion' is empty: there is nothing to train on.",
        ),
        (
            {"prompt": [], "completion": "x"},
            "a.jsonl:7: 'prompt' must be a text, got list. Put conversations under 'messages'.",
        ),
        ({"instruction": "Sing.", "output": " "}, "a.jsonl:7: 'output' is empty"),
        (
            {"instruction": "Sing.", "output": "La", "history": [["a"]]},
            "a.jsonl:7: history[0] must be a pair of texts (instruction, output), got ['a'].",
        ),
        (
            {"conversations": [{"from": "gtp", "value": "x"}]},
            "a.jsonl:7: conversations[0]: unknown from 'gtp', expected one of system, human, user, gpt,",
        ),
        ({"conversations": [{"value": "x"}]}, "a.jsonl:7: conversations[0]: no 'from'."),
        (
            {"conversations": [{"from": "gpt", "value": ""}]},
            "a.jsonl:7: conversations[0]: the assistant's 'value' is empty",
        ),
        ({"text": ""}, "a.jsonl:7: 'text' is empty"),
        (
            {**user(role="assistant", content="x"), "tools": ["f"]},
            "a.jsonl:7: tools[0] must be a tool's JSON schema, got 'f'.",
        ),
        (
            {"question": "q", "answer": "a"},
            "a.jsonl:7: a record of unknown format with the keys question, answer. Known formats have the keys: messages; prompt + completion; instruction + output; conversations; text.",
        ),
        ({}, "a.jsonl:7: a record of unknown format with the keys (none)."),
    ],
)
def test_a_bad_record_is_refused_with_its_place(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        parse_record(row, "a.jsonl:7")
