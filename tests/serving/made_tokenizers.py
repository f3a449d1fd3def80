"""Tokenizers of the three kinds whose decoders differ: byte-level BPE, SentencePiece with bytes, and Metaspace."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from metier.embedded import model_path

WORDS = ("▁", "▁Hello", "▁wor", "ld", "é", "€", "a", ".", "�")
SPECIAL = ("<unk>", "<s>", "</s>")


@cache
def byte_level() -> Any:
    """The embedded model's own."""
    return AutoTokenizer.from_pretrained(model_path())


@cache
def sentencepiece_like() -> Any:
    """As Llama 2's and Mixtral's: characters that are no tokens come as a token for each byte."""
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(tokenizer)


@cache
def metaspace() -> Any:
    """As T5's: the first token of a text loses its blank."""
    vocabulary = [(name, -float(index)) for index, name in enumerate((*SPECIAL, *WORDS))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer) -> Any:
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


KINDS = {"byte_level": byte_level, "sentencepiece_like": sentencepiece_like, "metaspace": metaspace}
