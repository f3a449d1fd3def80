"""The code in a reply: what stands in its first code fence, else all of it."""

from __future__ import annotations

import re

_FENCE = re.compile(
    r"^[ \t]*(?:```|~~~)[ \t]*(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)(?:^[ \t]*(?:```|~~~)|\Z)",
    re.DOTALL | re.MULTILINE,
)
_LANGUAGES = ("", "python", "py", "python3", "json", "tool_code")


def code_of(text: str) -> str:
    """The content of the first fence in Python, JSON or no named language; a text without one as it is.

    A fence that is never closed goes to the end, as in a reply that was cut. Later fences are usually examples of
    use, and fences in other languages (a shell's, say) are not what was asked for.
    """
    for fence in _FENCE.finditer(text):
        if fence["language"].lower() in _LANGUAGES:
            return fence["code"]
    return text
