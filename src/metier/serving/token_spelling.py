"""How one token is written beside its log probability: as text, and as the bytes that it stands for.

A token alone may be half a character, and a blank at its beginning is lost when it is decoded alone. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from metier.serving.detokenize import INCOMPLETE, Detokenizer, Tokenizer


@dataclass(frozen=True, slots=True)
class SpelledToken:
    text: str
    """A token that is no whole character is written `bytes:\\xe2\\x82`, as OpenAI does."""
    bytes: tuple[int, ...] | None
    """UTF-8; None where the tokenizer does not say which bytes they are."""


class TokenSpelling:
    """Spellings of a tokenizer's tokens, kept once made: the same few come again and again."""

    def __init__(self, tokenizer: Tokenizer, detokenizer: Detokenizer) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = detokenizer
        self.spell = lru_cache(maxsize=65_536)(self._spell)

    def _spell(self, token_id: int) -> SpelledToken:
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        if name is None:
            # models may have more rows than their tokenizer has tokens
            return SpelledToken(f"token:{token_id}", None)
        if token_id in self._detokenizer.byte_ids:
            return _from_bytes(bytes([int(name[3:5], 16)]))
        if token_id in self._detokenizer.special_ids:
            return _from_text(str(name))
        alone = self._detokenizer.decode([token_id])
        if INCOMPLETE in alone:
            raw = _byte_level(str(name))
            return _from_text(alone) if raw is None else _from_bytes(raw)
        # the second of two keeps the blank that the first of a text loses
        twice = self._detokenizer.decode([token_id, token_id])
        return _from_text(twice[len(alone) :] if twice.startswith(alone) else alone)


def _from_text(text: str) -> SpelledToken:
    return SpelledToken(text, tuple(text.encode()))


def _from_bytes(raw: bytes) -> SpelledToken:
    try:
        return SpelledToken(raw.decode(), tuple(raw))
    except UnicodeDecodeError:
        return SpelledToken("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), tuple(raw))


def _byte_level(name: str) -> bytes | None:
    """The bytes of a token in the alphabet of byte-level BPE; None where it is not written in it."""
    values = [_BYTE_OF.get(character) for character in name]
    return None if None in values else bytes(value for value in values if value is not None)


def _alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest begins at U+0100, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _alphabet()
