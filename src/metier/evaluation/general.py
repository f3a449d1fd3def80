"""General ability, to show what a run forgot: held-out loss per domain, and a cloze test.

**Held-out loss** is bits per UTF-8 byte, so that tokenizers can be compared: the negative log-likelihood
(base 2) of every token of a document, over the document's bytes. A domain is one text file of documents with
a line `<|endoftext|>` between them; blank lines part nothing, because code and manuals are full of them. Each
document is a sequence of its own after a start token (the tokenizer's bos, else its eos); every token of the
text is predicted, an end is not. A document that is longer than the window is read in windows of which each
repeats the last quarter of the one before as context, so that each token is scored once and all but the first
window's tokens see at least that much. Domains count equally, however long their files are.

**The cloze test** asks which of an item's options follows its context. An option's score is its
log-likelihood given the context, divided by its UTF-8 bytes, because plain sums prefer short options. Context
and option are tokenized as one text; scored are the tokens from the first at which any of the options differ
from each other or from the context alone, which also holds where the tokenizer merges across the seam.
Context and option are joined as they stand, with one space where neither side brings white space.
"""

# N documents or items, O options

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from metier.errors import ConfigError, DataError
from metier.evaluation.bootstrap import mean_interval, ratio_interval
from metier.evaluation.likelihood import Continuations, ScoredSequence, continuation_losses, negative_log_likelihoods
from metier.evaluation.result import ClozeScore, DomainLoss

WINDOW_TOKENS = 1024
CLOZE_FILE = "cloze.jsonl"
DOCUMENT_SEPARATOR = "<|endoftext|>"
_SEPARATOR_LINE = re.compile(rf"^{re.escape(DOCUMENT_SEPARATOR)}[ \t]*$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClozeItem:
    """A context, what may follow it, and which option does."""

    context: str
    options: tuple[str, ...]
    answer: int
    domain: str
    origin: str


def domain_files(folder: Path) -> dict[str, Path]:
    """The domains of a folder of held-out text: one `<domain>.txt` each, sorted by name.

    Raises:
        DataError: the folder has none.
    """
    files = {path.stem: path for path in sorted(folder.glob("*.txt"))}
    if not files:
        raise DataError(f"{folder}: no <domain>.txt file, expected at least one of held-out general text.")
    return files


def read_documents(path: Path, *, max_bytes: int | None = None) -> list[str]:
    """Documents of a domain file, from its beginning up to `max_bytes` UTF-8 bytes; the last one is cut
    there.

    Raises:
        ConfigError: `max_bytes` is not positive.
        DataError: the file cannot be read as UTF-8, or holds no document.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError(f"general_bytes must be at least 1, got {max_bytes}.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
    documents = []
    left = math.inf if max_bytes is None else max_bytes
    for block in _SEPARATOR_LINE.split(text):
        document = block.strip("\n")
        if not document.strip() or left <= 0:
            continue
        encoded = document.encode()
        if len(encoded) > left:
            document = encoded[: int(left)].decode(errors="ignore")
        left -= len(encoded)
        if document:
            documents.append(document)
    if not documents:
        raise DataError(f"{path}: got 0 documents, expected text, with {DOCUMENT_SEPARATOR} lines between documents.")
    return documents


def domain_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    window_tokens: int = WINDOW_TOKENS,
    seed: int = 0,
) -> DomainLoss:
    """Bits per byte of documents; the module's docstring says how. Call it in eval mode and without
    gradients.

    Raises:
        DataError: the tokenizer has neither a bos nor an eos token to start a document with.
    """
    start_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start_id is None:
        raise DataError(
            f"tokenizer {tokenizer.name_or_path!r}: no bos and no eos token, expected one to start "
            "a document with. Set tokenizer.eos_token."
        )
    sequences: list[ScoredSequence] = []
    owners: list[int] = []
    num_tokens = 0
    for index, document in enumerate(documents):
        token_ids = [start_id, *tokenizer(document, add_special_tokens=False)["input_ids"]]
        num_tokens += len(token_ids) - 1
        for window in _windows(token_ids, window_tokens):
            sequences.append(window)
            owners.append(index)
    document_bits = np.zeros(len(documents))
    for owner, nats in zip(owners, negative_log_likelihoods(model, sequences), strict=True):
        document_bits[owner] += nats / math.log(2)
    document_bytes = [len(document.encode()) for document in documents]
    low, high = ratio_interval(document_bits.tolist(), document_bytes, seed=seed)
    return DomainLoss(
        bits_per_byte=float(document_bits.sum() / sum(document_bytes)),
        low=low,
        high=high,
        document_bits=tuple(document_bits.tolist()),
        document_bytes=tuple(document_bytes),
        num_tokens=num_tokens,
        fingerprint=hashlib.sha256(f"\n{DOCUMENT_SEPARATOR}\n".join(documents).encode()).hexdigest()[:16],
    )


def _windows(token_ids: Sequence[int], window_tokens: int) -> Iterator[ScoredSequence]:
    """Cut a document so that each token but the first is scored once, a quarter of a window being context."""
    overlap = max(1, window_tokens // 4)
    begin, scored = 0, 1
    while scored < len(token_ids):
        end = min(begin + window_tokens, len(token_ids))
        yield ScoredSequence(token_ids=tuple(token_ids[begin:end]), start=scored - begin)
        begin, scored = end - overlap, end


def load_cloze(path: Path, *, limit: int | None = None) -> list[ClozeItem]:
    """Items of a cloze file: one JSON object a line with context, options, answer (an index) and domain.

    With a `limit`, items are taken evenly over the file, which may be sorted by domain.

    Raises:
        ConfigError: `limit` is not positive.
        DataError: a line is not such an object, or there is none.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"cloze_items must be at least 1, got {limit}.")
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            item = ClozeItem(
                context=str(values["context"]),
                options=tuple(str(option) for option in values["options"]),
                answer=int(values["answer"]),
                domain=str(values["domain"]),
                origin=f"{path.name}:{number}",
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: not a cloze item ({type(error).__name__}: {error}). "
                'Expected {"context", "options", "answer", "domain"}.'
            ) from error
        if len(set(item.options)) < 2 or len(set(item.options)) < len(item.options) or "" in item.options:
            raise DataError(f"{path}:{number}: needs two or more different options, got {list(item.options)}.")
        if not 0 <= item.answer < len(item.options):
            raise DataError(f"{path}:{number}: answer {item.answer} is no index into {len(item.options)} options.")
        items.append(item)
    if not items:
        raise DataError(f"{path}: got 0 cloze items, expected at least one.")
    if limit is None or limit >= len(items):
        return items
    return [items[position * len(items) // limit] for position in range(limit)]


def cloze_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ClozeItem],
    *,
    seed: int = 0,
) -> ClozeScore:
    """Accuracy on cloze items, as the module's docstring says. Call it in eval mode and without gradients."""
    losses = continuation_losses(model, [_continuations(item, tokenizer) for item in items])
    item_scores = []
    for item, nats in zip(items, losses, strict=True):
        per_byte = [loss / len(option.encode()) for loss, option in zip(nats, item.options, strict=True)]
        item_scores.append(100.0 * (int(np.argmin(per_byte)) == item.answer))
    low, high = mean_interval(item_scores, seed=seed)
    return ClozeScore(
        accuracy=float(np.mean(item_scores)),
        low=low,
        high=high,
        chance=float(np.mean([100.0 / len(item.options) for item in items])),
        item_scores=tuple(item_scores),
    )


def _continuations(item: ClozeItem, tokenizer: PreTrainedTokenizerBase) -> Continuations:
    start_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    prefix = [] if start_id is None else [start_id]

    def encode(text: str) -> list[int]:
        return [*prefix, *tokenizer(text, add_special_tokens=False)["input_ids"]]

    def needs_space(option: str) -> bool:
        return bool(item.context) and not item.context[-1].isspace() and not option[0].isspace()

    texts = [item.context + " " * needs_space(option) + option for option in item.options]
    encoded = [encode(text) for text in texts]
    start = 0
    for column in zip(encode(item.context), *encoded, strict=False):
        if len(set(column)) > 1:
            break
        start += 1
    if start < 1:
        raise DataError(f"{item.origin}: an option starts the text, expected a context before it.")
    return Continuations(
        context_ids=tuple(encoded[0][:start]),
        continuation_ids=tuple(tuple(token_ids[start:]) for token_ids in encoded),
    )
