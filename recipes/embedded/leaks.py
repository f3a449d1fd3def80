"""Find which of many texts stand anywhere inside a large corpus: the proof that a task's records were held out.

Looking tens of thousands of texts up one by one in a hundred megabytes takes hours. Here every window of the corpus
is hashed at once (a polynomial hash, by doubling: windows of 16 bytes from two of 8, and so on), the few windows that
hash as a text's beginning does are compared byte by byte, so the answer is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from corpus import normalise

WINDOW_BYTES = 16
BLOCK_CHARS = 4_000_000
BASE = np.uint64(0x100000001B3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sought:
    """Texts to look for, in the normal form of `corpus.normalise`, by the hash of their first window."""

    texts: dict[int, list[bytes]]
    hashes: np.ndarray
    """The keys of `texts`, sorted, uint64."""


def sought(texts: Iterable[str]) -> Sought:
    """Texts as `standing_in` wants them; the shortest that can be looked for has 16 bytes once normalised."""
    by_hash: dict[int, list[bytes]] = {}
    for text in sorted({normalise(text) for text in texts}):
        encoded = text.encode()
        if len(encoded) < WINDOW_BYTES:
            raise ValueError(f"cannot look for {text!r}: it has {len(encoded)} bytes, expected {WINDOW_BYTES} or more")
        (first,) = _window_hashes(encoded[:WINDOW_BYTES])
        by_hash.setdefault(int(first), []).append(encoded)
    return Sought(texts=by_hash, hashes=np.array(sorted(by_hash), dtype=np.uint64))


def standing_in(documents: Iterable[str], wanted: Sought) -> set[str]:
    """Those of the wanted texts that stand inside a document, normalised; none reaches over two documents."""
    found: set[str] = set()
    if not wanted.texts:
        return found
    for block in _blocks(documents):
        hashes = _window_hashes(block)
        places = np.searchsorted(wanted.hashes, hashes).clip(max=len(wanted.hashes) - 1)
        for start in np.flatnonzero(wanted.hashes[places] == hashes).tolist():
            for text in wanted.texts[int(hashes[start])]:
                if block.startswith(text, start):
                    found.add(text.decode())
    return found


def _blocks(documents: Iterable[str]) -> Iterator[bytes]:
    """Normalised documents in blocks of some megabytes, parted by a byte that no text holds."""
    block: list[str] = []
    num_chars = 0
    for document in documents:
        block.append(normalise(document))
        num_chars += len(block[-1])
        if num_chars > BLOCK_CHARS:
            yield "\0".join(block).encode()
            block, num_chars = [], 0
    yield "\0".join(block).encode()


def _window_hashes(data: bytes) -> np.ndarray:
    """Hash of each window of WINDOW_BYTES bytes, uint64 with wrap-around, one fewer a byte that ends no window."""
    hashes = np.frombuffer(data, dtype=np.uint8).astype(np.uint64)
    power, width = BASE, 1
    with np.errstate(over="ignore"):
        while width < WINDOW_BYTES:
            hashes = hashes[:-width] * power + hashes[width:] if len(hashes) > width else hashes[:0]
            power, width = power * power, width * 2
    return hashes
