"""A record through the tokenizer's chat template, with the character spans that are trained on.

Where the template marks the assistant's text with {% generation %}, its marks are taken. Other templates are
rendered turn by turn: what the whole conversation has beyond the prompt of a turn is that turn's reply. That
only holds if each shorter rendering begins the longer ones, which is checked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from metier.data.message import Message, Record
from metier.errors import DataError

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CONTEXT_CHARS = 40


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text. Spans are (start, end) in characters."""

    text: str
    trained_spans: tuple[tuple[int, int], ...]


def render(record: Record, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Render a record's messages.

    Raises:
        DataError: no chat template, a template that refuses the record, ignores its tools or is not
            prefix-stable.
    """
    template = _template(record, tokenizer)
    if _GENERATION_MARK.search(template):
        text, spans = _call(record, record.messages, tokenizer, template, has_marks=True)
    else:
        text, _ = _call(record, record.messages, tokenizer, template)
        spans = [
            _reply_span(record, index, text, tokenizer, template)
            for index, message in enumerate(record.messages)
            if message.role == "assistant"
        ]
    return Rendered(text=text, trained_spans=tuple(spans))


def render_text(record: Record, tokenizer: PreTrainedTokenizerBase) -> str:
    """Render a record's messages without asking which part is trained on."""
    return _call(record, record.messages, tokenizer, _template(record, tokenizer))[0]


def check_tools_are_rendered(record: Record, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template that ignores tools: the model would be trained to call what it never saw."""
    without = Record(messages=record.messages, origin=record.origin)
    if record.tools and render_text(record, tokenizer) == render_text(without, tokenizer):
        raise DataError(
            f"{record.origin}: the record has tools, but the chat template of '{tokenizer.name_or_path}' "
            f"ignores them. Use a tokenizer whose template writes tools, or remove them from the records."
        )


def _template(record: Record, tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            f"{record.origin}: the tokenizer '{tokenizer.name_or_path}' has no chat template, so "
            f"conversations cannot be written as text. Use the model's chat variant, set "
            f"tokenizer.chat_template (or put a chat_template.jinja beside the tokenizer), or give records "
            f"with prompt and completion."
        )
    return str(tokenizer.get_chat_template(None, list(record.tools) if record.tools else None))


def _reply_span(
    record: Record, index: int, text: str, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[int, int]:
    if index == 0:
        raise DataError(
            f"{record.origin}: the record begins with the assistant, so there is no prompt to tell its reply "
            f"from. Put a user message before it, or mark the assistant's text in the chat template with "
            f"{{% generation %}}."
        )
    prompt, _ = _call(record, record.messages[:index], tokenizer, template, add_generation_prompt=True)
    until, _ = _call(record, record.messages[: index + 1], tokenizer, template)
    for shorter in (prompt, until):
        if not text.startswith(shorter):
            raise DataError(_unstable(record, index, shorter, text))
    return len(prompt), len(until)


def _call(
    record: Record,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    *,
    add_generation_prompt: bool = False,
    has_marks: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    options: dict[str, Any] = {**tokenizer.special_tokens_map, "add_generation_prompt": add_generation_prompt}
    try:
        # not tokenizer.apply_chat_template: its mask of the assistant's tokens comes without the spans of
        # characters, and drops a reply that begins with a blank
        texts, spans = render_jinja_template(
            conversations=[[message.to_dict() for message in messages]],
            tools=list(record.tools) if record.tools else None,
            chat_template=template,
            return_assistant_tokens_mask=has_marks,
            **options,
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise DataError(f"{record.origin}: the chat template refuses the record: {error}") from error
    return texts[0], list(spans[0]) if has_marks else []


def _unstable(record: Record, index: int, shorter: str, text: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(shorter, text, strict=False)) if a != b), len(text))
    start = max(0, at - _CONTEXT_CHARS // 2)
    return (
        f"{record.origin}: messages[{index}]: the chat template is not prefix-stable. Up to this message it "
        f"writes {shorter[start : at + _CONTEXT_CHARS]!r}, but in the whole conversation there stands "
        f"{text[start : at + _CONTEXT_CHARS]!r}. Mark the assistant's text in the template with "
        f"{{% generation %}} … {{% endgeneration %}}, or give one record for each reply."
    )
