"""From candidates to a task's three files: no duplicates, nothing that pretraining has seen, split by source package.

A source package is in one split only, because its binary packages share most of their text. Everything is decided by
hashes of names, so a second run writes the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from corpus import DOMAINS, normalise
from leaks import sought, standing_in
from packages import Package, read_packages
from sources import fetch
from tokenizers import Tokenizer

EMBEDDED = Path(__file__).parents[3] / "src" / "metier" / "embedded"
"""The package's room that all data goes to."""
SPLITS = ("test", "validation", "train")
ANSWER_CHARS = 30
"""An answer this long must not stand in pretraining; shorter ones ("network monitor") stand everywhere."""
PARAGRAPH_CHARS = 60
"""A prompt's paragraph this long must not stand in pretraining, and must not be two records' longest one."""
TRANSITIONAL = re.compile(
    r"transition|dummy package|can (safely )?be (safely )?removed|empty package|metapackage", re.IGNORECASE
)
"""Packages that hold nothing; their descriptions describe Debian's upgrades."""
INSTRUCTIONS = {
    "sections": "Classify this package as JSON:\n\n",
    "synopsis": "Summarize this package in one line:\n\n",
    "translate": "Translate to Slovak: ",
}
"""What each task's prompts begin with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A record before it is chosen: the text that follows the instruction, the answer and the source package."""

    text: str
    answer: str
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSize:
    """How many records a split gets at least (the last source may add one or two), and how much a source may give."""

    train: int
    validation: int
    test: int
    max_per_source: int
    max_tokens: int
    """Of text and answer together, by the embedded tokenizer."""


Splits = dict[str, list[Candidate]]


def hidden_texts(text: str, answer: str) -> list[str]:
    """The texts of a record that must not stand in pretraining, normalised."""
    paragraphs = [normalise(paragraph) for paragraph in text.split("\n\n")]
    hidden = [paragraph for paragraph in paragraphs if len(paragraph) >= PARAGRAPH_CHARS]
    return [*hidden, normalise(answer)] if len(normalise(answer)) >= ANSWER_CHARS else hidden


def pretraining_documents(cache: Path, domains: Sequence[str] = DOMAINS) -> Iterable[str]:
    """Every document that pretraining reads, dialogues as the text of their messages."""
    for domain in domains:
        with (cache / "corpus" / f"{domain}.pretrain.jsonl").open(encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                yield record["text"] if "text" in record else "\0".join(m["content"] for m in record["messages"])


def fitting(candidates: Iterable[Candidate], tokenizer: Tokenizer, max_tokens: int) -> list[Candidate]:
    """The candidates whose text and answer have at most `max_tokens` tokens together."""
    chosen = list(candidates)
    texts = tokenizer.encode_batch([c.text for c in chosen], add_special_tokens=False)
    answers = tokenizer.encode_batch([c.answer for c in chosen], add_special_tokens=False)
    return [c for c, text, answer in zip(chosen, texts, answers, strict=True) if len(text) + len(answer) <= max_tokens]


def unseen(candidates: Sequence[Candidate], documents: Iterable[str]) -> list[Candidate]:
    """The candidates of which no text stands in the documents of pretraining."""
    hidden = {id(c): hidden_texts(c.text, c.answer) for c in candidates}
    seen = standing_in(documents, sought(text for texts in hidden.values() for text in texts))
    return [c for c in candidates if seen.isdisjoint(hidden[id(c)])]


def distinct(candidates: Iterable[Candidate], *, max_per_source: int) -> list[Candidate]:
    """One record of those that say the same, and at most `max_per_source` of a source, in the order of `order_of`.

    Two records say the same if, digits apart, their texts are equal or their long answers. Records of two sources
    also do if the longest paragraphs of their texts are equal: siblings that packaging split over several sources.
    """
    chosen: list[Candidate] = []
    said: dict[str, str] = {}
    num_of_source: dict[str, int] = {}
    for candidate in sorted(candidates, key=lambda c: (order_of(c.origin), order_of(c.text))):
        keys = _keys(candidate)
        own = keys.pop("paragraph", None)
        is_said = any(key in said for key in keys.values()) or said.get(own or "", candidate.origin) != candidate.origin
        if is_said or num_of_source.get(candidate.origin, 0) == max_per_source:
            continue
        said |= dict.fromkeys((*keys.values(), *([own] if own else ())), candidate.origin)
        num_of_source[candidate.origin] = num_of_source.get(candidate.origin, 0) + 1
        chosen.append(candidate)
    return chosen


def _keys(candidate: Candidate) -> dict[str, str]:
    longest = max(candidate.text.split("\n\n"), key=len)
    keys = {"text": candidate.text}
    if len(longest) >= PARAGRAPH_CHARS:
        keys["paragraph"] = longest
    if len(candidate.answer) >= ANSWER_CHARS and not candidate.answer.startswith("{"):
        keys["answer"] = candidate.answer
    return {kind: f"{kind}: " + re.sub(r"[\d\W_]+", " ", normalise(key)) for kind, key in keys.items()}


def order_of(text: str) -> bytes:
    """A fixed order without meaning."""
    return hashlib.sha256(f"metier task:{text}".encode()).digest()


def split_by_source(candidates: Sequence[Candidate], size: TaskSize) -> Splits:
    """Fill test, validation and train in turn, whole sources at a time; the rest is left out.

    Raises:
        ValueError: there are not enough candidates.
    """
    wanted = {"test": size.test, "validation": size.validation, "train": size.train}
    of_source: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        of_source.setdefault(candidate.origin, []).append(candidate)
    sources = iter(sorted(of_source, key=order_of))
    splits: Splits = {split: [] for split in SPLITS}
    for split in SPLITS:
        while len(splits[split]) < wanted[split]:
            source = next(sources, None)
            if source is None:
                raise ValueError(f"split {split!r}: got {len(splits[split])} records, expected {wanted[split]}")
            splits[split] += of_source[source]
    return splits


def write(folder: Path, splits: Splits, *, metrics: Sequence[str], description: str, max_new_tokens: int) -> None:
    """Write `task.json` and a JSONL file a split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, candidates in splits.items():
        lines = [json.dumps(record_of(c, folder.name), ensure_ascii=False, separators=(",", ":")) for c in candidates]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    values = {
        "name": folder.name,
        "metrics": list(metrics),
        "description": description,
        "max_new_tokens": max_new_tokens,
    }
    (folder / "task.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sizes = {split: len(candidates) for split, candidates in splits.items()}
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder.name}: {sizes}, {num_bytes / 1e6:.2f} MB\n{description}")


def record_of(candidate: Candidate, task: str) -> dict[str, object]:
    """The record as it is written."""
    return {
        "messages": [
            {"role": "user", "content": INSTRUCTIONS[task] + candidate.text},
            {"role": "assistant", "content": candidate.answer},
        ],
        "origin": candidate.origin,
    }


def chosen_candidates(
    cache: Path, candidates: Callable[[list[Package]], Iterable[Candidate]], size: TaskSize
) -> list[Candidate]:
    """The walk that all builders share, from the package index to distinct candidates that pretraining has not seen."""
    packages = read_packages(fetch(cache))
    tokenizer = Tokenizer.from_file(str(cache / "tokenizer" / "tokenizer.json"))
    found = list(candidates(packages))
    fit = fitting(found, tokenizer, size.max_tokens)
    clean = unseen(fit, pretraining_documents(cache))
    chosen = distinct(clean, max_per_source=size.max_per_source)
    print(f"{len(found)} candidates, {len(fit)} short enough, {len(clean)} unseen, {len(chosen)} distinct")
    return chosen


def parse_arguments(description: str | None) -> tuple[Path, Path]:
    """(cache, output folder of all tasks) from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="the folder that corpus.py and tokenizer.py wrote to")
    parser.add_argument("--output", type=Path, default=EMBEDDED / "tasks", help="default: the package's own tasks")
    arguments = parser.parse_args()
    return arguments.cache, arguments.output
