"""What a request asks, as the token ids that the engine takes: a conversation, a text, or ids as they are.

Torch-free; a tokenizer is given. Encoding a long text takes a while, so `encode` calls happen in a thread: they must
not change the tokenizer, which `PromptEncoder` sees to by encoding once at the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError

from metier.errors import RequestError
from metier.serving.detokenize import Tokenizer


class PromptEncoder:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # a tokenizer's file may ask for truncation, which transformers turns off at the first text: in no thread's way
        tokenizer("a", add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation by the tokenizer's chat template, up to where the assistant's reply begins.

        Args:
            messages: each with `role`, `content` and maybe `name`.

        Raises:
            RequestError: there is no chat template, or it refuses the conversation.
        """
        template = self._tokenizer.chat_template
        if not template:
            raise RequestError(
                f"messages: the tokenizer of {self._tokenizer.name_or_path!r} has no chat template, so that a "
                "conversation cannot be written as text.\nAsk /v1/completions, or serve the model's chat variant."
            )
        if "developer" not in str(template):
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RequestError(f"messages: the model's chat template refuses the conversation: {reason}") from error
        return self._encode(str(text), "messages", adds_special=False)

    def encode_text(self, text: str) -> list[int]:
        """A text with the special tokens that the tokenizer begins texts with.

        Raises:
            RequestError: no token comes of it.
        """
        token_ids = self._encode(text, "prompt", adds_special=True)
        if not token_ids and self._tokenizer.bos_token_id is not None:
            token_ids = [self._tokenizer.bos_token_id]
        if not token_ids:
            raise RequestError("prompt: got an empty text, expected at least one token.")
        return token_ids

    def check_ids(self, token_ids: Sequence[int]) -> list[int]:
        """Token ids as they are.

        Raises:
            RequestError: one is not in the vocabulary.
        """
        unknown = [token_id for token_id in token_ids if not 0 <= token_id < len(self._tokenizer)]
        if unknown:
            raise RequestError(
                f"prompt: got token id {str(unknown[0])[:24]}, expected ids from 0 to {len(self._tokenizer) - 1}."
            )
        return list(token_ids)

    def _encode(self, text: str, where: str, *, adds_special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{where}: got half of a UTF-16 pair (\\u{ord(text[error.start]):04x}), expected whole characters."
            ) from error
        return list(self._tokenizer(text, add_special_tokens=adds_special)["input_ids"])
