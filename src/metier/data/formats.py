"""What a row means: the record formats people have, each turned into the same messages.

| format            | keys                                                     | trained on                |
|-------------------|----------------------------------------------------------|---------------------------|
| messages          | `messages`: [{role, content, …}], `tools` if any          | the assistant's messages  |
| prompt/completion | `prompt`, `completion`                                    | the completion            |
| alpaca            | `instruction`, `input`, `output`, `system`, `history`     | the outputs               |
| ShareGPT          | `conversations`: [{from, value}], `system`, `tools`       | the model's turns         |
| text              | `text`                                                    | all of it                 |

The first format whose required keys are all there is taken. Other keys are metadata and left alone,
except those that the caller wants kept.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from metier.data.message import ROLES, Message, Record
from metier.errors import DataError

Row = Mapping[str, Any]

# https://github.com/lm-sys/FastChat and the data sets in its format name the same speakers in several ways.
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}


def parse_record(row: Row, origin: str, *, keep: Sequence[str] = ()) -> Record:
    """Turn a row into a record.

    Args:
        row: one row of a source.
        origin: where it stands, for messages and reports.
        keep: further keys that go into the record's `extra`, where the row has them.

    Raises:
        DataError: an unknown format, a missing or unknown role, an empty completion, a wrong type.
    """
    # Parquet and `datasets` fill keys that other rows have with None
    row = {key: value for key, value in row.items() if value is not None}
    for required, parse in _FORMATS.items():
        if all(key in row for key in required):
            record = parse(row, origin)
            extra = {key: row[key] for key in keep if key in row}
            return replace(record, extra=extra) if extra else record
    known = "; ".join(" + ".join(required) for required in _FORMATS)
    raise DataError(
        f"{origin}: a record of unknown format with the keys {', '.join(row) or '(none)'}. "
        f"Known formats have the keys: {known}. Rename the columns, e.g. to prompt and completion."
    )


def _parse_messages(row: Row, origin: str) -> Record:
    messages = [
        _message(item, f"{origin}: messages[{index}]", "role", "content", {role: role for role in ROLES})
        for index, item in enumerate(_list(row["messages"], origin, "messages"))
    ]
    return _record(messages, row, origin)


def _parse_sharegpt(row: Row, origin: str) -> Record:
    turns = _list(row["conversations"], origin, "conversations")
    has_roles = bool(turns) and isinstance(turns[0], Mapping) and "role" in turns[0] and "from" not in turns[0]
    if has_roles:  # many data sets keep plain messages under this key
        return _parse_messages({**row, "messages": turns}, origin)
    messages = _system(row, origin)
    for index, item in enumerate(turns):
        messages.append(_message(item, f"{origin}: conversations[{index}]", "from", "value", _SHAREGPT_ROLES))
    return _record(messages, row, origin)


def _parse_prompt_completion(row: Row, origin: str) -> Record:
    prompt, completion = _text(row, "prompt", origin), _text(row, "completion", origin)
    _refuse_empty(completion, f"{origin}: 'completion'")
    messages = (Message(role="user", content=prompt), Message(role="assistant", content=completion))
    return Record(messages=messages, tools=_tools(row, origin), origin=origin, is_plain=True)


def _parse_alpaca(row: Row, origin: str) -> Record:
    messages = _system(row, origin)
    for index, pair in enumerate(_list(row.get("history", []), origin, "history")):
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"{origin}: history[{index}] must be a pair of texts (instruction, output), got {pair!r}.")
        messages += [Message(role="user", content=pair[0]), Message(role="assistant", content=pair[1])]
    instruction, given = _text(row, "instruction", origin), _text(row, "input", origin, default="")
    output = _text(row, "output", origin)
    _refuse_empty(output, f"{origin}: 'output'")
    messages.append(Message(role="user", content=f"{instruction}\n\n{given}" if given else instruction))
    messages.append(Message(role="assistant", content=output))
    return _record(messages, row, origin)


def _parse_text(row: Row, origin: str) -> Record:
    text = _text(row, "text", origin)
    _refuse_empty(text, f"{origin}: 'text'")
    return Record(messages=(), tools=None, origin=origin, text=text)


_FORMATS: dict[tuple[str, ...], Callable[[Row, str], Record]] = {
    ("messages",): _parse_messages,
    ("prompt", "completion"): _parse_prompt_completion,
    ("instruction", "output"): _parse_alpaca,
    ("conversations",): _parse_sharegpt,
    ("text",): _parse_text,
}


def _message(item: object, where: str, role_key: str, content_key: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{where}: expected an object with '{role_key}' and '{content_key}', got {item!r}.")
    item = {key: value for key, value in item.items() if value is not None}
    if role_key not in item:
        raise DataError(f"{where}: no '{role_key}'. Add one of {', '.join(roles)}; it has {', '.join(item)}.")
    role = roles.get(str(item[role_key]))
    if role is None:
        nearest = difflib.get_close_matches(str(item[role_key]).lower(), roles, n=1)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        raise DataError(f"{where}: unknown {role_key} {item[role_key]!r}, expected one of {', '.join(roles)}.{hint}")
    content = _content(item.get(content_key, ""), where, content_key)
    extra = {key: value for key, value in item.items() if key not in (role_key, content_key)}
    if role == "assistant" and not extra.get("tool_calls"):
        _refuse_empty(content, f"{where}: the assistant's '{content_key}'")
    return Message(role=role, content=content, extra=extra)


def _content(content: object, where: str, key: str) -> str:
    """A message's text: a plain one, or the joined text parts of a list."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if None not in texts:
        return "".join(str(text) for text in texts)
    raise DataError(f"{where}: '{key}' must be a text or a list of text parts, got {str(content)[:80]}.")


def _record(messages: list[Message], row: Row, origin: str) -> Record:
    if not messages:
        raise DataError(f"{origin}: a record without a message. Remove it, or add what the user and assistant said.")
    return Record(messages=tuple(messages), tools=_tools(row, origin), origin=origin)


def _system(row: Row, origin: str) -> list[Message]:
    text = _text(row, "system", origin, default="")
    return [Message(role="system", content=text)] if text else []


def _tools(row: Row, origin: str) -> tuple[Mapping[str, Any], ...] | None:
    tools = _list(row.get("tools", []), origin, "tools")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise DataError(f"{origin}: tools[{index}] must be a tool's JSON schema, got {tool!r}.")
    return tuple(tools) or None


def _list(value: object, origin: str, key: str) -> list[Any]:
    """A list, or the JSON text of one: CSV has no other way, and Parquet often keeps `tools` so."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"{origin}: '{key}' is not JSON: {error.msg} at column {error.colno}.") from error
    if not isinstance(value, list | tuple):
        raise DataError(f"{origin}: '{key}' must be a list, got {type(value).__name__}.")
    return list(value)


def _text(row: Row, key: str, origin: str, *, default: str | None = None) -> str:
    value = row.get(key, default)
    if not isinstance(value, str):
        hint = " Put conversations under 'messages'." if isinstance(value, list | Mapping) else ""
        raise DataError(f"{origin}: '{key}' must be a text, got {type(value).__name__}.{hint}")
    return value


def _refuse_empty(text: str, what: str) -> None:
    if not text.strip():
        raise DataError(f"{what} is empty: there is nothing to train on. Fill it in or remove the record.")
