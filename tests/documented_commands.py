"""What a page shows in fences, and its commands as this very Python's environment has them."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a language; of none where none is given."""
    every = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for its_language, block in every if its_language == language]


def words_of(line: str) -> list[str]:
    """A command's words, the program being the one beside this Python."""
    words = shlex.split(line)
    beside = Path(sys.executable).with_name(words[0])
    assert beside.exists(), f"{beside} is not installed"
    return [str(beside), *words[1:]]
