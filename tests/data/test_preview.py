"""The preview shows trained tokens in green, the rest dimmed, and the counts."""

from __future__ import annotations

import io

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from metier.data.encode import EncodedSet, encode_records
from metier.data.formats import parse_record
from metier.data.preview import preview


def encoded(tokenizer: PreTrainedTokenizerFast, *, max_length: int = 1000) -> EncodedSet:
    rows = [{"prompt": f"[b]Why {i}?[/b]", "completion": f"Für {i}."} for i in range(5)]
    rows.append({"prompt": "What?", "completion": "blue " * 30})
    records = [parse_record(row, f"a.jsonl:{line}") for line, row in enumerate(rows, start=1)]
    return encode_records(records, tokenizer, max_length=max_length)


def shown(items: EncodedSet, tokenizer: PreTrainedTokenizerFast, *, in_colour: bool, num_records: int = 3) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=in_colour, width=100, color_system="standard", _environ={})
    console.print(preview(items, tokenizer, num_records=num_records))
    return output.getvalue()


def test_trained_tokens_are_green_and_context_is_dim(tokenizer: PreTrainedTokenizerFast) -> None:
    text = shown(encoded(tokenizer), tokenizer, in_colour=True, num_records=1)
    green, dim = "\x1b[1;32m", "\x1b[2m"
    assert f"{green}Für 0.<|end|>" in text
    assert f"{dim}[b]Why 0?[/b]<|end|>" in text
    assert f"{dim}<|assistant|>" in text
    assert f"{green}trained on" in text


def test_counts_origins_and_what_is_left_out_are_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    items = encoded(tokenizer, max_length=40)
    text = shown(items, tokenizer, in_colour=False, num_records=2)
    first = items.items[0]
    assert f"{first.num_trained_tokens} of {len(first.input_ids)} tokens trained on" in text
    assert "a.jsonl:2" in text
    assert "a.jsonl:3" not in text
    share = items.num_trained_tokens / items.num_tokens
    assert f"5 records, {items.num_tokens} tokens, {items.num_trained_tokens} trained on ({share:.1%})" in text
    assert "1 of 6 records are longer than max_length=40 and left out" in text
