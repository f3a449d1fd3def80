"""Train the embedded model's tokenizer and lay the training tokens down in the order in which they are read.

    python recipes/embedded/tokenizer.py --cache CACHE      writes CACHE/tokenizer/, CACHE/tokens.bin, CACHE/tokens.json

Byte-level BPE with 8,192 entries, trained on every domain in the proportions of pretraining. `tokens.bin` is one flat
uint16 array: documents, each behind `<|endoftext|>`, cut into pieces of at most 512 tokens and shuffled once with a
fixed seed, so that every batch holds every domain. A trainer that knows its step knows its place in it, so resuming
needs no data state.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from corpus import DOMAINS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 8192
SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")
NUM_TOKENS = 33_000_000
SEED = 2407_01906

SHARES = {
    "packages": 0.20,
    "danish": 0.09,
    "italian": 0.09,
    "french": 0.09,
    "german": 0.07,
    "slovak": 0.012,
    "python": 0.16,
    "manual": 0.10,
    "wordnet": 0.09,
    "prose": 0.055,
    "chat": 0.043,
}
"""Share of the training tokens that each domain gets; a domain with less text is read more than once."""

MAX_PIECE_TOKENS = 512

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def read_documents(cache: Path, domain: str) -> list[str | list[dict[str, str]]]:
    lines = (cache / "corpus" / f"{domain}.pretrain.jsonl").read_text(encoding="utf-8").splitlines()
    return [record.get("text") or record["messages"] for record in map(json.loads, lines)]


def _training_text(documents: dict[str, list]) -> Iterator[str]:
    """About 40 MB in the proportions of pretraining."""
    draw = random.Random(SEED)
    for domain, share in SHARES.items():
        budget = int(40e6 * share)
        for document in draw.sample(documents[domain], len(documents[domain])):
            text = document if isinstance(document, str) else "\n".join(m["content"] for m in document)
            yield text[:20_000]
            budget -= len(text[:20_000])
            if budget < 0:
                break


def train_tokenizer(documents: dict[str, list]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(documents), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def lay_down(documents: dict[str, list], tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, dict[str, int]]:
    """The training tokens, (NUM_TOKENS,) uint16, and how many of them each domain has."""
    draw = random.Random(SEED + 1)
    start = tokenizer.bos_token_id
    pieces: list[np.ndarray] = []
    counts: dict[str, int] = {}
    for domain, share in SHARES.items():
        texts = [
            d
            if isinstance(d, str)
            else tokenizer.apply_chat_template(d, tokenize=False).removeprefix(tokenizer.bos_token)
            for d in documents[domain]
        ]
        budget, chosen = int(NUM_TOKENS * share), []
        while budget > 0:
            draw.shuffle(texts)
            for first in range(0, len(texts), 1000):
                for ids in tokenizer(texts[first : first + 1000], add_special_tokens=False)["input_ids"]:
                    document = np.array([start, *ids][: max(budget, 0)], dtype=np.uint16)
                    chosen += [document[i : i + MAX_PIECE_TOKENS] for i in range(0, len(document), MAX_PIECE_TOKENS)]
                    budget -= len(ids) + 1
                if budget <= 0:
                    break
        pieces += chosen
        counts[domain] = sum(map(len, chosen))
    draw.shuffle(pieces)
    return np.concatenate(pieces), counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    cache: Path = parser.parse_args().cache
    documents = {domain: read_documents(cache, domain) for domain in DOMAINS}
    tokenizer = train_tokenizer(documents)
    tokenizer.save_pretrained(cache / "tokenizer")
    tokens, counts = lay_down(documents, tokenizer)
    tokens.tofile(cache / "tokens.bin")
    (cache / "tokens.json").write_text(json.dumps({"num_tokens": len(tokens), "by_domain": counts}, indent=2))
    print(json.dumps(counts, indent=2))


if __name__ == "__main__":
    main()
