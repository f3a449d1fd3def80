"""Tokens to text, one token at a time, so that the pieces join to what decoding all tokens at once gives.

A token's text depends on its neighbours: a character may be spread over several byte tokens, and the first blank of a
decoded text is dropped by tokenizers in SentencePiece's manner. So each token is decoded together with the tokens of
the piece before it, and text is held back for as long as a later token could still change it. Special tokens have no
text. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no whole character, or not yet."""
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer(Protocol):
    """What serving needs of a transformers tokenizer."""

    name_or_path: str
    chat_template: Any
    bos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...

    def __len__(self) -> int: ...

    def decode(self, token_ids: Sequence[int], **options: Any) -> Any: ...

    def convert_ids_to_tokens(self, ids: int) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


class Detokenizer:
    """A tokenizer's way back to text, made once; `begin` for each answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        vocabulary = tokenizer.get_vocab()
        self.byte_ids = frozenset(i for token, i in vocabulary.items() if _BYTE_TOKEN.fullmatch(token))
        """Tokens of one byte each, such as `<0xE2>`. A run of them is decoded as one."""

    def decode(self, token_ids: Sequence[int], *, skips_special: bool = True) -> str:
        """The tokens' text at once, blanks as the tokens have them."""
        options = {"skip_special_tokens": skips_special, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(list(token_ids), **options))

    def begin(self) -> IncrementalText:
        return IncrementalText(self)


class IncrementalText:
    """The text of one answer: `push` each token, then `finish`."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._token_ids: list[int] = []
        self._num_before = 0
        """Of these, the tokens of the former piece, which are only there for what they do to the text after them."""
        self._given = ""
        """What has been given out of the tokens' text."""

    def push(self, token_id: int) -> str:
        """The text that is settled by this token; empty where it has none yet."""
        if token_id in self._detokenizer.special_ids:
            return ""
        self._token_ids.append(token_id)
        if token_id in self._detokenizer.byte_ids:
            # one more byte may turn the whole run into characters, or into none
            return ""
        text = self._detokenizer.decode(self._token_ids)
        if text.endswith(INCOMPLETE):
            # bytes that may begin a character are one mark at the end; the marks before it stay
            return self._give(text[:-1])
        piece = self._give(text)
        if piece:
            self._token_ids = self._token_ids[self._num_before :]
            self._num_before = len(self._token_ids)
            self._given = self._detokenizer.decode(self._token_ids)
        return piece

    def finish(self) -> str:
        """What was held back."""
        return self._give(self._detokenizer.decode(self._token_ids)) if self._token_ids else ""

    def _give(self, text: str) -> str:
        piece = text[len(self._given) :]
        self._given += piece
        return piece
