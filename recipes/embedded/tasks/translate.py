"""The task `translate`: English to Slovak, a language of which pretraining has seen little.

    PYTHONPATH=recipes/embedded python -m tasks.translate --cache CACHE

Pairs are synopses, and paragraphs of descriptions that have the same number of them in both languages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from corpus import normalise
from packages import Package

from tasks.build import TRANSITIONAL, Candidate, TaskSize, chosen_candidates, parse_arguments, split_by_source, write

SIZE = TaskSize(train=2000, validation=250, test=400, max_per_source=3, max_tokens=160)
MAX_CHARS = 200
MIN_CHARS = 12
LENGTH_RATIO = (0.6, 1.7)
"""Slovak characters for each English one; beyond that one side says more than the other."""


def is_pair(english: str, slovak: str) -> bool:
    """Whether two texts can be each other's translation."""
    if not MIN_CHARS <= len(english) <= MAX_CHARS or not MIN_CHARS <= len(slovak) <= MAX_CHARS:
        return False
    if normalise(english) == normalise(slovak) or "\n" in english or "\n" in slovak:
        return False
    return LENGTH_RATIO[0] <= len(slovak) / len(english) <= LENGTH_RATIO[1]


def candidates(packages: Iterable[Package]) -> Iterator[Candidate]:
    """Synopses and short paragraphs, English to Slovak."""
    for package in packages:
        if package.use != "translate":
            continue
        english, slovak = package.descriptions["en"], package.descriptions["sk"]
        pairs = [(english.synopsis, slovak.synopsis)]
        if len(english.paragraphs) == len(slovak.paragraphs):
            pairs += zip(english.paragraphs, slovak.paragraphs, strict=True)
        for source_text, answer in pairs:
            if is_pair(source_text, answer) and not TRANSITIONAL.search(source_text):
                yield Candidate(text=source_text, answer=answer, origin=package.source)


def main() -> None:
    """Write the task's files."""
    cache, output = parse_arguments(__doc__)
    splits = split_by_source(chosen_candidates(cache, candidates, SIZE), SIZE)
    write(
        output / "translate",
        splits,
        metrics=("chrf",),
        description="English synopses and short paragraphs of Debian's package descriptions to Slovak.",
        max_new_tokens=96,
    )


if __name__ == "__main__":
    main()
