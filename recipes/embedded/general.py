"""Write what general ability is measured on: held-out text of every pretraining domain, and a cloze test.

    python recipes/embedded/general.py --cache CACHE         writes general/<domain>.txt and general/cloze.jsonl

Held out by source package or file name is not enough: manual pages have aliases, and licences repeat. So every text
that is taken is looked up in all of pretraining, and left out if a long paragraph of it stands there.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from corpus import DOMAINS, normalise
from leaks import sought, standing_in
from tasks.build import EMBEDDED, pretraining_documents

GENERAL_DOMAINS = tuple(domain for domain in DOMAINS if domain != "chat")
SEPARATOR = "<|endoftext|>\n"
"""A line of its own between two documents; blank lines stand inside code and manuals."""
SEED = 240_701_906
BYTES_PER_DOMAIN = 28_000
DOCUMENT_CHARS = 1_500
"""Longer documents are cut at a line, so that a domain is many documents and each fits into a pretraining sequence."""
PARAGRAPH_CHARS = 60

ITEMS_PER_DOMAIN = 56
ITEMS_PER_DOCUMENT = 8
NUM_OPTIONS = 4
OPTION_WORDS = (4, 6)
CONTEXT_WORDS = 40
MIN_CONTEXT_WORDS = {"wordnet": 8}
"""Elsewhere a context has at least 25 words; a gloss has rarely so many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """The last words of a line or a sentence, and what stands before them."""

    context: str
    option: str
    document: int

    @property
    def shape(self) -> tuple[int, bool]:
        """What distractors share with the right option: the number of words, and whether a sentence ends."""
        return len(self.option.split()), self.option[-1] in ".!?"


def long_paragraphs(document: str) -> list[str]:
    """The paragraphs, normalised, that are too long to stand in two documents by chance."""
    paragraphs = (normalise(paragraph) for paragraph in re.split(r"\n\s*\n", document))
    return [paragraph for paragraph in paragraphs if len(paragraph) >= PARAGRAPH_CHARS]


def cut(document: str) -> str:
    """The beginning of a document, to the end of its last line that fits whole."""
    if len(document) <= DOCUMENT_CHARS:
        return document.strip("\n")
    lines = document[: DOCUMENT_CHARS + 1].rpartition("\n")[0]
    return (lines or document[:DOCUMENT_CHARS]).strip("\n")


def read_heldout(cache: Path, domain: str) -> list[str]:
    """The held-out documents of a domain, in a fixed random order, one of those that begin alike."""
    with (cache / "corpus" / f"{domain}.heldout.jsonl").open(encoding="utf-8") as lines:
        documents = list({cut(text): text for text in (json.loads(line)["text"] for line in lines)}.values())
    random.Random(f"{SEED} {domain}").shuffle(documents)
    return [document for document in documents if SEPARATOR.strip() not in document and "\f" not in document]


def sample(documents: Sequence[str], seen: set[str]) -> tuple[list[str], list[str]]:
    """(BYTES_PER_DOMAIN of unseen documents, the documents that were not looked at)."""
    chosen: list[str] = []
    num_bytes = 0
    for position, document in enumerate(documents):
        text = cut(document)
        if seen.isdisjoint(long_paragraphs(text)):
            chosen.append(text)
            num_bytes += len(text.encode())
        if num_bytes >= BYTES_PER_DOMAIN:
            return chosen, list(documents[position + 1 :])
    raise ValueError(f"got {num_bytes} bytes of unseen held-out text, expected {BYTES_PER_DOMAIN}")


def endings(document: str, number: int, *, min_context_words: int, draw: random.Random) -> list[Ending]:
    """Some endings of lines and sentences with enough words before them, in random order."""
    words = list(re.finditer(r"\S+", document))
    found = []
    for last, word in enumerate(words):
        is_end = word[0][-1] in ".!?" or document[word.end() : word.end() + 1] in ("", "\n")
        num_words = draw.randint(*OPTION_WORDS)
        first = last - num_words + 1
        if not is_end or first < min_context_words:
            continue
        before = max(0, first - CONTEXT_WORDS)
        option = document[words[first].start() : word.end()]
        is_spaced = document[words[first - 1].end() : words[first].start()] == " " and "\n" not in option
        if is_spaced and sum(letter.isalpha() for letter in option) > len(option) // 2:
            context = document[words[before].start() : words[first - 1].end()]
            found.append(Ending(context=context, option=" ".join(option.split()), document=number))
    draw.shuffle(found)
    return found[:ITEMS_PER_DOCUMENT]


def cloze_items(domain: str, found: Sequence[Ending], seen: set[str]) -> Iterator[dict[str, object]]:
    """Items whose distractors end other documents, in as many words and nearly as many bytes as the right option."""
    draw = random.Random(f"{SEED} cloze {domain}")
    positions = [number % NUM_OPTIONS for number in range(ITEMS_PER_DOMAIN)]
    draw.shuffle(positions)
    asked: set[str] = set()
    for ending in draw.sample(found, len(found)):
        if not positions or ending.option in asked or normalise(f"{ending.context} {ending.option}") in seen:
            continue
        others = {
            other.option: other
            for other in draw.sample(found, len(found))
            if other.document != ending.document and other.shape == ending.shape and other.option not in ending.context
        }
        others.pop(ending.option, None)
        size = len(ending.option.encode())
        near = sorted(others, key=lambda option: abs(len(option.encode()) - size))[: NUM_OPTIONS - 1]
        if len(near) == NUM_OPTIONS - 1 and all(abs(len(option.encode()) - size) <= size // 4 for option in near):
            answer = positions.pop()
            asked.add(ending.option)
            options = [*near[:answer], ending.option, *near[answer:]]
            yield {"context": ending.context, "options": options, "answer": answer, "domain": domain}
    if positions:
        raise ValueError(f"{domain}: {len(positions)} of {ITEMS_PER_DOMAIN} cloze items are missing")


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="the folder that corpus.py wrote to")
    parser.add_argument("--output", type=Path, default=EMBEDDED / "general", help="default: the package's own folder")
    arguments = parser.parse_args()
    documents = {domain: read_heldout(arguments.cache, domain) for domain in GENERAL_DOMAINS}
    found = {
        domain: [
            ending
            for number, document in enumerate(texts)
            for ending in endings(
                document,
                number,
                min_context_words=MIN_CONTEXT_WORDS.get(domain, 25),
                draw=random.Random(f"{SEED} {domain} {number}"),
            )
        ]
        for domain, texts in documents.items()
    }
    wanted = {paragraph for texts in documents.values() for text in texts for paragraph in long_paragraphs(cut(text))}
    wanted |= {normalise(f"{e.context} {e.option}") for group in found.values() for e in group}
    seen = standing_in(pretraining_documents(arguments.cache), sought(wanted))

    arguments.output.mkdir(parents=True, exist_ok=True)
    items = []
    for domain, texts in documents.items():
        chosen, rest = sample(texts, seen)
        (arguments.output / f"{domain}.txt").write_text(f"\n{SEPARATOR}".join(chosen) + "\n", encoding="utf-8")
        first = len(texts) - len(rest)
        items += cloze_items(domain, [ending for ending in found[domain] if ending.document >= first], seen)
        print(f"{domain:9} {len(chosen):4} documents, {sum(len(text.encode()) for text in chosen)} bytes")
    lines = [json.dumps(item, ensure_ascii=False) for item in items]
    (arguments.output / "cloze.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"cloze     {len(items):4} items, {len(seen)} of {len(wanted)} held-out texts stand in pretraining")


if __name__ == "__main__":
    main()
